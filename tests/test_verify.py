"""The verb `verify` on good models of every format, and how it prints what it finds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx_models import make, saved, value
from packed_models import only_file
from perplexity_oracle import VOCAB
from verify_models import (
    EXPORTED,
    WIDE,
    exported,
    failures,
    gguf,
    hugging_face,
    perceptron,
    states,
    verify,
    with_manifest,
)

from onnxstream_nb import cli, hub
from onnxstream_nb.convert.checks.verify import Verification
from onnxstream_nb.hub import store
from onnxstream_nb.llm import LanguageModel

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

LANGUAGE = dict.fromkeys(("graph", "shapes", "weights", "tokenizer", "forward", "cache"), "ok")
FORMATS: dict[str, Callable[[Path], Path]] = {
    "float32 GGUF": gguf,
    "Q8_0 GGUF": lambda folder: gguf(folder, "Q8_0"),
    "Q4_1 GGUF": lambda folder: gguf(folder, "Q4_1"),
    "Q4_K GGUF": lambda folder: gguf(folder, "Q4_K", WIDE),
    "Q6_K GGUF": lambda folder: gguf(folder, "Q6_K", WIDE),
    "safetensors in shards": hugging_face,
    "one safetensors file": lambda folder: hugging_face(folder, dtype="F16", shards=1),
    "ONNX with external data": lambda folder: exported(folder),
    "ONNX in one file": lambda folder: exported(folder, external=False),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; compiled kernels stay where they are."""
    for module in (hub, store):
        monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("name", FORMATS)
def test_a_good_model(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    path = FORMATS[name](tmp_path / "m")
    other = dict.fromkeys(("manifest", "download", "packed"), "skipped")
    assert states(verify(path, capsys)) == LANGUAGE | other


@pytest.mark.parametrize(
    "name", ["llama_gqa_op14/model.onnx", "mistral_sw8_op14", "llama_gqa_dyn23/model.onnx",
             "onnxstream_llama_small", "onnxstream_llama_small/model.txt"],
)  # fmt: skip
def test_exports_of_others(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = states(verify(EXPORTED / name, capsys))
    assert found == LANGUAGE | dict.fromkeys(
        ("manifest", "download", "packed", "tokenizer"), "skipped"
    )


def test_a_manifest_and_the_exact_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "m"
    path = exported(folder)
    total = sum(p.stat().st_size for p in with_manifest(folder).iterdir())
    total -= (folder / "manifest.json").stat().st_size
    document = verify(path, capsys)
    checks = document["checks"]
    assert document.keys() == {"model", "path", "ok", "checks"}
    assert document["model"] == document["path"] == str(path) and document["ok"] is True
    assert all(list(c) == ["check", "state", "detail", "file", "tensor", "remedy"] for c in checks)
    details = {c["check"]: c["detail"] for c in checks}
    nodes = details["graph"].split()[0]
    assert details == {
        "manifest": f"4 files, {total / 1e3:.0f} kB: sizes and sha256",
        "download": "the model did not come by pull",
        "graph": details["graph"],
        "shapes": f"{details['shapes'].split()[0]} of {details['shapes'].split()[2]} results; "
        f"logits (1, sequence, {VOCAB})",
        "weights": "22 of floats, 172 kB, are finite",
        "tokenizer": f"{VOCAB} ids, {VOCAB} rows of token_embd.weight; a reply ends with 375, 377",
        "forward": f"logits (9, {VOCAB}) after 9 tokens are finite, and the same twice",
        "cache": details["cache"],
        "packed": "no packed weights are kept of this model",
    }
    assert int(nodes) > 20 and details["graph"].endswith("23 weights, 172 kB in 1 file")
    assert details["cache"].endswith(" of their deviation from those at once")
    far = float(details["cache"].split()[6])
    assert 0 <= far < 0.01
    assert {(c["file"], c["tensor"], c["remedy"]) for c in checks} == {("", "", "")}
    assert states(verify(folder, capsys)) == states(document)


def test_the_real_entry_point(tmp_path: Path) -> None:
    path = gguf(tmp_path)
    line = [sys.executable, "-m", "onnxstream_nb", "verify", str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    marks = [tuple(each.split()[:2]) for each in lines[:-1]]
    assert marks == [
        ("skipped", "manifest"), ("skipped", "download"), ("ok", "graph"), ("ok", "shapes"),
        ("ok", "weights"), ("ok", "tokenizer"), ("ok", "forward"), ("ok", "cache"),
        ("skipped", "packed"),
    ]  # fmt: skip
    assert lines[4].startswith("ok       weights    22 of floats, ")
    assert lines[-1] == "no check failed"
    assert "reading weights: " in done.stderr and " MB" in done.stderr


def test_a_graph_that_is_no_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = perceptron(tmp_path)
    document = verify(path, capsys, "--size", "8", "--size", "width=5")
    assert states(document) == dict.fromkeys(("graph", "shapes", "weights", "forward"), "ok") | (
        dict.fromkeys(("manifest", "download", "tokenizer", "cache", "packed"), "skipped")
    )
    (forward,) = (c for c in document["checks"] if c["check"] == "forward")
    assert forward["detail"] == "1 finite output of x [1, 8, 5, 3], and the same twice"


def test_sizes_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = perceptron(tmp_path)
    for size, message in (
        ("length=5", "--size length: the inputs have no open size of that name; they are x (1, '"),
        ("width=0", "--size: must be at least 1, not 0"),
        ("width", "--size: 'width' is not a whole number"),
    ):
        assert cli.main(["verify", str(path), "--size", size]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_an_operator_that_cannot_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a model may well be whole."""
    node = helper.make_node("Elsewhere", ["x"], ["y"], domain="com.acme")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.acme", 1)]
    model = make([node], [value("x")], [value("y")], opset_imports=opsets)
    document = verify(saved(model, tmp_path / "m.onnx"), capsys)
    (forward,) = (c for c in document["checks"] if c["check"] == "forward")
    assert forward["state"] == "skipped" and "not supported: Elsewhere" in forward["detail"]


def test_masks_may_be_infinite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they are added, and not where they are multiplied."""
    mask = np.triu(np.full((40, 40), -np.inf, np.float32), 1)
    for op_type, state in (("Add", "ok"), ("MatMul", "failed")):
        nodes = [helper.make_node(op_type, ["x", "mask"], ["s"]),
                 helper.make_node("Softmax", ["s"], ["y"])]  # fmt: skip
        image = value("x", shape=(40, 40))
        model = make(nodes, [image], [value("y", shape=(40, 40))],
                     [numpy_helper.from_array(mask, "mask")])  # fmt: skip
        path = saved(model, tmp_path / "m.onnx")
        document = verify(path, capsys, code=int(state == "failed"))
        assert states(document)["weights"] == state


def test_packed_weights_are_compared(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], panels_pay: None
) -> None:
    path = gguf(tmp_path, "Q8_0")
    LanguageModel(path, packed=cache / "packed").close()
    found = {c["check"]: c for c in verify(path, capsys)["checks"]}["packed"]
    size = only_file(cache / "packed").stat().st_size
    assert found["detail"] == f"1 file, {size / 1e3:.3g} kB: checksums"
    other = tmp_path / "other"
    other.mkdir()
    assert states(verify(gguf(other, "Q8_0"), capsys))["packed"] == "skipped"
    damaged = only_file(cache / "packed")
    data = bytearray(damaged.read_bytes())
    data[-5000] ^= 1
    damaged.write_bytes(data)
    (finding,) = failures(verify(path, capsys, code=1))
    assert (finding["check"], finding["file"]) == ("packed", str(damaged))
    assert finding["tensor"] == "output.weight" and finding["remedy"].startswith("delete ")
    shutil.copy(path, tmp_path / "copy")  # another time: packed from an earlier state
    shutil.copy(tmp_path / "copy", path)
    skipped = {c["check"]: c for c in verify(path, capsys)["checks"]}["packed"]
    assert skipped["detail"] == "1 file of an earlier state of the model"


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        (str(tmp_path / "empty"), "no model in this folder; looked for"),
        (str(tmp_path / "nothing"), "is no path and not on this disk; `onnxstream_nb list`"),
        ("mistral-7b", "is no path and not on this disk; `onnxstream_nb list`"),
    ):
        assert cli.main(["verify", name]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1


def test_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxstream_nb.convert.checks import verify_weights

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_weights, "not_finite", interrupted)
    assert cli.main(["verify", str(gguf(tmp_path))]) == 130
    out, err = capsys.readouterr()
    assert err.endswith("interrupted\n") and out.splitlines()[-1].startswith("ok       shapes")


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read whole to look at its elements."""
    from onnxstream_nb import files
    from onnxstream_nb.convert.checks import verify_weights

    largest = []
    whole = files.Files.read_into

    def watched(self: files.Files, memory: object, ref: object, start: int, stop: int) -> object:
        largest.append(stop - start)
        return whole(self, memory, ref, start, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(files.Files, "read_into", watched)
    monkeypatch.setattr(verify_weights, "READ", 1000)
    said: list[str] = []
    checks = Verification(gguf(tmp_path), lambda text, _: said.append(text))
    found = [finding for finding in checks if finding.check == "weights"]
    assert [finding.state for finding in found] == ["ok"]
    assert max(largest) <= 1000 and len(largest) > 100
    assert said.count("reading weights: 0.1 of 0.2 MB") > 1
    assert json.dumps(said).count("comparing hashes") == 0
