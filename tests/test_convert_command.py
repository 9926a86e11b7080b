"""The verb convert: flags, summary, interruption, and a real model where there is one."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import check, check_manifest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny
from tokenizer_fixtures import smollm2

from onnxstream_nb.cli.main import main

TINY = Tiny(hidden=64, intermediate=96, vocab=80)
LARGE = Tiny(hidden=256, intermediate=1024, vocab=8000, layers=2)  # 26 MB as float32


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    code, out, err = convert(capsys, tmp_path / "m.gguf", "-o", tmp_path / "out")
    assert code == 0 and "writing" in err
    assert [line.split()[0] for line in out.splitlines()] == ["written", "files", "size", "time"]
    assert "model.onnx" in out and "MB/s" in out and str(tmp_path / "out") in out
    check(tmp_path / "out")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    code, out, _ = convert(capsys, tmp_path / "m.gguf", "-o", tmp_path / "out", "--json")
    document: dict[str, Any] = json.loads(out)
    files = check_manifest(tmp_path / "out")
    assert code == 0 and document["to"] == "onnx" and document["path"] == str(tmp_path / "out")
    assert {n: f["size"] for n, f in files.items()}.items() <= document["files"].items()
    assert document["size_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert document["weight_bytes"] == document["source_weight_bytes"] > 0
    assert document["seconds"] > 0 and document["mb_per_s"] > 0 and document["peak_rss_mb"] > 0


@pytest.mark.parametrize(("arguments", "wanted"), [
    ([], "--out is missing"),
    (["-o", "{out}", "--dtype", "fp8"], "fp32, fp16, bf16, int8, int4"),
    (["-o", "{out}", "--to", "gguf"], "onnx, onnxstream"),
    (["-o", "{out}", "--block", "64"], "--block is for --dtype int8 or int4"),
    (["-o", "{out}", "--dtype", "fp16", "--matmul-nbits"], "--matmul-nbits is for --dtype"),
    (["-o", "{out}", "--dtype", "int4", "--keep", "int8"], "PATTERN=DTYPE"),
    (["-o", "{out}", "--to", "onnxstream", "--dtype", "int4"], "give fp32 or fp16"),
    (["-o", "{out}", "--to", "onnxstream", "--dtype", "bf16"], "stores fp32 or fp16"),
    (["-o", "{source}"], "exists"),
    (["-o", "{out}/deeper"], "no folder"),
])  # fmt: skip
def test_flags_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: str
) -> None:
    write_hf(tmp_path / "hf", TINY)
    places = {"out": tmp_path / "out", "source": tmp_path / "hf"}
    code, out, err = convert(
        capsys, tmp_path / "hf", *(text.format(**places) for text in arguments)
    )
    assert code == 2 and not out and wanted in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_overwriting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", TINY)
    assert convert(capsys, tmp_path / "hf", "-o", tmp_path / "out")[0] == 0
    before = (tmp_path / "out" / "model.onnx").stat().st_ino
    code, _, err = convert(capsys, tmp_path / "hf", "-o", tmp_path / "out")
    assert code == 2 and "--overwrite" in err
    options = ["-o", tmp_path / "out", "--overwrite", "--dtype", "bf16"]
    assert convert(capsys, tmp_path / "hf", *options)[0] == 0
    assert (tmp_path / "out" / "model.onnx").stat().st_ino != before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path / "hf", TINY)
    (tmp_path / "fixed").mkdir(mode=0o555)
    code, _, err = convert(capsys, tmp_path / "hf", "-o", tmp_path / "fixed" / "out")
    assert code == 2 and "cannot be written" in err and "Permission denied" in err


# -- while it runs

SLOWED = """
import sys, time, resource
from onnxstream_nb.convert import folder
append = folder.OutputFile._append
def slowly(self, view):
    append(self, view)
    if self.size > 4_000_000:
        print("writing", file=sys.stderr, flush=True)
        time.sleep(0.2)
folder.OutputFile._append = slowly
folder.IN_FLIGHT = 1 << 20
from onnxstream_nb.cli.main import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_conversion_that_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sent: signal.Signals
) -> None:
    """In the middle of the weights; then it is done again, and complete."""
    write_hf(tmp_path / "hf", LARGE)
    command = [sys.executable, "-c", SLOWED, str(tmp_path / "hf"), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.strip() == "writing" for line in process.stderr)
        process.send_signal(sent)
        err = process.stderr.read()
        process.wait(60)
    assert not (tmp_path / "out").exists() and "Traceback" not in err
    left = [p for p in tmp_path.iterdir() if p.name != "hf"]
    if sent == signal.SIGINT:
        assert process.returncode == 130 and not left
    else:
        assert [p.name for p in left] == [f".out.{process.pid}.partial"]
    assert convert(capsys, tmp_path / "hf", "-o", tmp_path / "out", "--dtype", "fp16")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    check_manifest(tmp_path / "out")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The system itself refuses bytes, as on a disk that is full."""
    write_hf(tmp_path / "hf", LARGE)
    limits = (10_000_000, 10_000_000)
    done = subprocess.run(
        [sys.executable, "-m", "onnxstream_nb", "convert", str(tmp_path / "hf"), "-o",
         str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and "another disk" in last
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


MEASURED = """
import sys
from pathlib import Path
from onnxstream_nb.convert import elements, folder
elements.STRIP, elements.PIECE, folder.IN_FLIGHT = 1 << 22, 1 << 19, 1 << 22
from onnxstream_nb.convert.convert import convert
from onnxstream_nb.device import peak_rss
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="float16")
first = peak_rss()
convert(Path(sys.argv[3]), Path(sys.argv[4]), dtype="float16")
print(peak_rss() - first)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 64 MB in matrices of 32 MB, beside a small one; pieces are scaled down alike."""
    wide = Tiny(hidden=512, intermediate=256, vocab=16384, layers=1)
    for name, tiny in (("small", Tiny(hidden=512, vocab=64, layers=1)), ("large", wide)):
        write_hf(tmp_path / name, tiny)
    paths = [str(tmp_path / n) for n in ("small", "small-out", "large", "large-out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 28_000_000


# -- a real model

REFERENCES = Path(__file__).parent / "fixtures" / "tokenizers" / "smollm2_prompts.json"


@pytest.mark.skipif(
    "ONNXSTREAM_TEST_SMOLLM2" not in os.environ, reason="set ONNXSTREAM_TEST_SMOLLM2 to its GGUF"
)
def test_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its GGUF to float16 ONNX: the reference's greedy ids, here and in onnxruntime, and texts."""
    import onnxruntime

    from onnxstream_nb.llm import LanguageModel
    from onnxstream_nb.tokenizer import load_tokenizer

    source = smollm2()
    assert source is not None
    code, out, _ = convert(capsys, source, "-o", tmp_path / "out", "--json")
    assert code == 0
    document = json.loads(out)
    elements = 134_515_008  # SmolLM2-135M's parameters, the tied table once
    assert 2 * elements <= document["weight_bytes"] <= 2.001 * elements
    check(tmp_path / "out")
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    cases = json.loads(REFERENCES.read_text("utf-8"))
    model = LanguageModel(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for case in cases:
        ids = [int(model.feed(case["input_ids"]).argmax())]
        while len(ids) < len(case["output_ids"]):
            ids.append(int(model.feed(ids[-1:]).argmax()))
        model.rewind(0)
        assert ids == case["output_ids"], case["prompt"]
        assert before.encode(case["prompt"]) == after.encode(case["prompt"])
        assert before.decode(ids) == after.decode(ids)
        assert _greedy(session, case["input_ids"], len(ids)) == ids
    model.close()


def _greedy(session: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest ids by onnxruntime, over the cache that the graph gives."""
    names = [o.name for o in session.get_outputs()]
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs() if "past" in i.name
    }  # fmt: skip
    ids, step, position = [], prompt, 0
    while len(ids) < count:
        feeds = {"input_ids": np.array([step], np.int64), **past}
        feeds["position_ids"] = np.arange(position, position + len(step), dtype=np.int64)[None]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        position += len(step)
        step = [int(found["logits"][0, -1].argmax())]
        ids += step
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return ids
