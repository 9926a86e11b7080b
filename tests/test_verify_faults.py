"""The verb `verify` on damaged models: each damage is named, with the file or tensor it is in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_fixtures import caches as hub_caches
from llama_oracle import Tiny
from onnx import helper, numpy_helper
from onnx_models import make, saved, summing, value
from output_faults import missing_shard, truncated_shard, unknown_architecture, wrong_index
from perplexity_oracle import VOCAB
from verify_models import (
    EXPORTED,
    TINY,
    WIDE,
    exported,
    failures,
    gguf,
    hugging_face,
    only_failure,
    perceptron,
    place_of,
    spoil,
    states,
    verify,
    with_manifest,
    with_tokenizer,
)

from onnxstream_nb import hub
from onnxstream_nb.convert.checks.verify_weights import not_finite, not_finite_blocks
from onnxstream_nb.hub import store

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

caches = hub_caches
Capture = pytest.CaptureFixture[str]


def flip(at: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def put(at: int, raw: bytes) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[at : at + len(raw)] = raw

    return change


# -- files


def test_a_manifest_tells_each_file_that_is_wrong(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "m"
    exported(folder, external=False)
    with_manifest(folder)
    model, config = folder / "model.onnx", folder / "tokenizer_config.json"
    size = config.stat().st_size
    spoil(model, flip(-3000))
    config.write_bytes(config.read_bytes() + b"\n")
    (folder / "tokenizer.json").unlink()
    found = [f for f in failures(verify(folder, capsys, code=1)) if f["check"] == "manifest"]
    assert [f["file"] for f in found] == [str(model), str(folder / "tokenizer.json"), str(config)]
    digest = json.loads((folder / "manifest.json").read_text())["files"]["model.onnx"]["sha256"]
    damaged, missing, longer = (f["detail"] for f in found)
    assert damaged.endswith(f" instead of sha256:{digest}: it is damaged")
    assert missing == "the file is missing"
    assert longer == f"{size + 1} bytes instead of {size}: it is of another version"
    assert {f["remedy"] for f in found} == {"fetch the file again, or make the model again"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", 'no manifest: it has no "files"; make the model again'),
        ('{"files": {"model.onnx": 3}}', "'model.onnx' has no size and sha256"),
        ('{"files": {"model.onnx": {"size": "3", "sha256": ""}}}', "has no size and sha256"),
        ('{"format": 2, "files": {}}', "format 2 is not known"),
    ],
)
def test_damaged_manifests(text: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = perceptron(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    finding = only_failure(path, capsys)
    assert finding["check"] == "manifest" and message in finding["detail"]
    assert str(tmp_path / "manifest.json") in finding["detail"]


def test_a_manifest_reads_no_other_files(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    path = perceptron(folder)
    (tmp_path / "secret").write_bytes(b"123")
    files = {"../secret": {"size": 3, "sha256": "0"}, "m.onnx": {"size": 1, "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    finding = only_failure(path, capsys)
    assert "'../secret' lies outside the model's folder" in finding["detail"]


def test_a_download_whose_files_changed(caches: Path, tmp_path: Path, capsys: Capture) -> None:
    """What was found right once is compared again, and nothing is fetched."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    path = gguf(folder)
    digest = store.file_digest(path, "sha256:", store.Reporter(None))
    record = store.FileRecord(path.stat().st_size, digest, path.stat().st_mtime_ns)
    copy = store.Copy("owner/model:m.gguf", folder, "m.gguf", "c" * 40, {"m.gguf": record})
    store.write_record(copy)
    for name in ("owner/model:m.gguf", str(path)):
        document = verify(Path(name), capsys) if name == str(path) else by_name(name, capsys)
        assert document["path"] == str(path) and states(document)["download"] == "ok"
    _, offset, nbytes = place_of(path, "output.weight")
    spoil(path, flip(offset + nbytes - 4))
    (finding,) = failures(by_name("owner/model:m.gguf", capsys, code=1))
    assert (finding["check"], finding["file"]) == ("download", str(path))
    assert finding["detail"].endswith(f"instead of {digest}: it is damaged")
    assert store.read_record(copy.name) == copy
    git = replace(record, digest="git:" + "0" * 40)
    store.write_record(replace(copy, files={"m.gguf": git, "gone": replace(record, digest="")}))
    damaged, gone = failures(by_name("owner/model:m.gguf", capsys, code=1))
    assert damaged["detail"].startswith("its hash is git:")
    assert (gone["detail"], gone["file"]) == ("the file is missing", str(folder / "gone"))


def by_name(name: str, capsys: Capture, code: int = 0) -> dict[str, Any]:
    assert hub.recorded(name) is not None and not Path(name).exists()
    return verify(Path(name), capsys, code=code)


# -- the graph


def test_checksums_of_external_data(tmp_path: Path, capsys: Capture) -> None:
    path = exported(tmp_path / "m")
    data = path.with_name("model.onnx.data")
    spoil(data, flip(100))
    (finding,) = failures(verify(path, capsys, code=1))
    assert finding["check"] == "graph"
    assert "external data of 'token_embd.weight'" in finding["detail"]
    assert "the SHA1 of 'model.onnx.data' is " in finding["detail"]


def truncated_gguf(folder: Path) -> tuple[Path, str]:
    path = gguf(folder)
    path.write_bytes(path.read_bytes()[:-8])
    return path, "tensor 'output.weight' ends at byte"


def truncated_data(folder: Path) -> tuple[Path, str]:
    path = exported(folder)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-8])
    return path, "the SHA1 of 'model.onnx.data' is "


def missing_data(folder: Path) -> tuple[Path, str]:
    path = exported(folder)
    path.with_name("model.onnx.data").unlink()
    return path, "its weights file 'model.onnx.data' is missing; fetch it as well"


def short_bin(folder: Path) -> tuple[Path, str]:
    shutil.copytree(EXPORTED / "onnxstream_llama_small", folder, dirs_exist_ok=True)
    path = folder / "model_2E_model_2E_embed_5F_tokens_2E_weight.bin"
    path.write_bytes(path.read_bytes()[:-4])
    return folder, path.name


def missing_bin(folder: Path) -> tuple[Path, str]:
    shutil.copytree(EXPORTED / "onnxstream_llama_small", folder, dirs_exist_ok=True)
    path = folder / "model_2E_model_2E_embed_5F_tokens_2E_weight.bin"
    path.unlink()
    return folder, path.name


def wrong_shape(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder, config=None)
    config = json.loads((path / "config.json").read_text())
    config["intermediate_size"] = TINY.intermediate + 1
    (path / "config.json").write_text(json.dumps(config))
    return path, "mlp"


@pytest.mark.parametrize(
    "damage",
    [truncated_gguf, truncated_shard, missing_shard, wrong_index, truncated_data, missing_data,
     short_bin, missing_bin, unknown_architecture, wrong_shape],
)  # fmt: skip
def test_graphs_that_cannot_be_read(
    damage: Callable[[Path], tuple[Path, str]], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "m").mkdir()
    path, message = damage(tmp_path / "m")
    document = verify(path, capsys, code=1)
    (finding,) = failures(document)
    assert finding["check"] == "graph" and message in finding["detail"]
    later = ("shapes", "weights", "tokenizer", "forward", "cache", "packed")
    assert [c["check"] for c in document["checks"]][-6:] == list(later)
    assert {c["detail"] for c in document["checks"][-6:]} == {"the graph could not be read"}


def test_shapes_that_disagree(tmp_path: Path, capsys: Capture) -> None:
    """A matrix that is turned: it has all of its bytes, and does not fit what it multiplies."""
    w = np.ones((40, 3), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    model = make([node], [value("x", shape=(2, 3))], [value("y", shape=(2, 40))],
                 [numpy_helper.from_array(w, "w")])  # fmt: skip
    document = verify(saved(model, tmp_path / "m.onnx"), capsys, code=1)
    (shapes,) = failures(document)
    assert shapes["check"] == "shapes" and states(document)["forward"] == "skipped"
    assert "MatMul" in shapes["detail"] and "product" in shapes["detail"]


def test_an_output_of_another_shape_than_declared(tmp_path: Path, capsys: Capture) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model = make([node], [value("x", shape=(2, 3))], [value("y", shape=(2, 4))])
    finding = only_failure(saved(model, tmp_path / "m.onnx"), capsys)
    assert finding["check"] == "shapes" and "(4)" in finding["detail"]


# -- weights


@pytest.mark.parametrize(
    ("dtype", "raw", "row", "column"),
    [("F32", b"\x00\x00\xc0\x7f", 3, 17), ("F32", b"\x00\x00\x80\xff", 0, 0),
     ("F16", b"\x00\x7c", 5, 31), ("BF16", b"\xc1\x7f", 63, 1)],
)  # fmt: skip
def test_a_number_that_is_not_finite(
    dtype: str, raw: bytes, row: int, column: int, tmp_path: Path, capsys: Capture
) -> None:
    folder = hugging_face(tmp_path / "m", dtype=dtype)
    tensor = "model.layers.1.mlp.up_proj.weight"
    file, offset, _ = place_of(folder, tensor)
    spoil(file, put(offset + len(raw) * (row * TINY.hidden + column), raw))
    weights, *others = failures(verify(folder, capsys, code=1))
    assert (weights["check"], weights["tensor"], weights["file"]) == ("weights", tensor, str(file))
    # the graph has the matrix as (K, N), the file as N rows of K
    assert weights["detail"] == (
        f"the element [{column}, {row}] of [{TINY.hidden}, {TINY.intermediate}]"
        " is not a finite number"
    )
    assert {finding["check"] for finding in others} <= {"forward"}


@pytest.mark.parametrize(
    ("encoding", "nbytes", "at", "block"),
    [("Q8_0", 34, 0, 32), ("Q4_0", 18, 0, 32), ("Q4_1", 20, 0, 32), ("Q4_1", 20, 2, 32),
     ("Q4_K", 144, 2, 256), ("Q5_K", 176, 0, 256), ("Q6_K", 210, 208, 256)],
)  # fmt: skip
def test_a_scale_that_is_not_finite(
    encoding: str, nbytes: int, at: int, block: int, tmp_path: Path, capsys: Capture
) -> None:
    path = gguf(tmp_path, encoding, WIDE)
    tensor, row, number = "blk.0.ffn_up.weight", 7, 256 // block - 1
    _, offset, _ = place_of(path, tensor)
    spoil(path, put(offset + nbytes * (row * 256 // block + number) + at, b"\x00\x7c"))
    weights, *others = failures(verify(path, capsys, code=1))
    assert (weights["check"], weights["tensor"], weights["file"]) == ("weights", tensor, str(path))
    assert weights["detail"] == (
        f"the scale of the {encoding.lower()} block at [{number * block}, {row}] of [256, 256]"
        " is not a finite number"
    )
    assert {finding["check"] for finding in others} <= {"forward"}


def test_every_half_precision_number() -> None:
    """Against NumPy's and ml_dtypes' own idea, for all bit patterns."""
    import ml_dtypes

    bits = np.arange(1 << 16, dtype=np.uint16)
    for name, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        with np.errstate(invalid="ignore"):
            wanted = ~np.isfinite(bits.view(kind).astype(np.float64))
        assert (not_finite(bits.view(np.uint8), name) == wanted).all(), name
    with np.errstate(invalid="ignore"):
        check_other_floats()


def check_other_floats() -> None:
    import ml_dtypes

    eight = np.arange(256, dtype=np.uint8)
    wanted = ~np.isfinite(eight.view(ml_dtypes.float8_e5m2).astype(np.float32))
    assert (not_finite(eight, "float8e5m2") == wanted).all()
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1 << 32, 10000, dtype=np.uint32)
    numbers[::7] |= 0x7F800000
    assert (not_finite(numbers.view(np.uint8), "float32") == ~np.isfinite(numbers.view("f4"))).all()
    blocks = rng.integers(0, 0x70, (100, 34), dtype=np.uint8)
    blocks[41, :2] = 0x00, 0xFC
    assert np.flatnonzero(not_finite_blocks(blocks.reshape(-1), "q8_0")).tolist() == [41]


# -- the tokenizer


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    path = gguf(tmp_path, tiny=Tiny(vocab=300, context=64))
    found = failures(verify(path, capsys, code=1))
    assert {(f["check"], f["tensor"]) for f in found} == {("tokenizer", "token_embd.weight")}
    first, bos, *ends = (f["detail"] for f in found)
    assert first.startswith(f"it has {VOCAB} ids, and token_embd.weight 300 rows: none for 300 (")
    assert bos == "its BOS is 378, and token_embd.weight has 300 rows"
    assert ends == [f"its EOS is {i}, and token_embd.weight has 300 rows" for i in (375, 377)]
    assert all(f["remedy"].startswith("put the tokenizer beside it that") for f in found)


def test_an_eos_out_of_range(tmp_path: Path, capsys: Capture) -> None:
    path = gguf(tmp_path, **{"tokenizer.ggml.eos_token_id": 9999})
    found = failures(verify(path, capsys, code=1))
    assert [f["check"] for f in found] == ["tokenizer"]
    assert "9999" in found[0]["detail"]


def test_a_special_token_without_a_row_is_told(tmp_path: Path, capsys: Capture) -> None:
    """Of Gemma 3's text models, for one: an image's placeholder is beyond the table."""
    path = exported(tmp_path / "m", tiny=Tiny(vocab=VOCAB, context=64))
    file = path.parent / "tokenizer.json"
    found = json.loads(file.read_text("utf-8"))
    found["added_tokens"].append(
        {**found["added_tokens"][0], "id": VOCAB, "content": "<image>", "special": True}
    )
    file.write_text(json.dumps(found), "utf-8")
    (finding,) = (c for c in verify(path, capsys)["checks"] if c["check"] == "tokenizer")
    assert finding["state"] == "ok"
    assert finding["detail"].endswith(f"; '<image>' ({VOCAB}) has no row, and must not occur")


def test_a_damaged_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    path = exported(tmp_path / "m")
    (path.parent / "tokenizer.json").write_text('{"model": 3}')
    document = verify(path, capsys, code=1)
    assert states(document)["tokenizer"] == "failed"
    assert str(path.parent / "tokenizer.json") in failures(document)[0]["detail"]


def test_a_tokenizer_that_loses_text(tmp_path: Path, capsys: Capture) -> None:
    path = exported(tmp_path / "m")
    file = path.parent / "tokenizer.json"
    found = json.loads(file.read_text("utf-8"))
    found["normalizer"] = {"type": "Replace", "pattern": {"String": "fox"}, "content": "foxfox"}
    file.write_text(json.dumps(found), "utf-8")
    (finding,) = failures(verify(path, capsys, code=1))
    assert finding["check"] == "tokenizer" and "comes back as " in finding["detail"]
    found["normalizer"] = {"type": "Lowercase"}  # a normal form is no loss
    file.write_text(json.dumps(found), "utf-8")
    assert states(verify(path, capsys))["tokenizer"] == "ok"


# -- the forward pass


def test_logits_that_overflow(tmp_path: Path, capsys: Capture) -> None:
    """All weights are finite, and what they give is not."""
    folder = hugging_face(tmp_path / "m", dtype="F32")
    file, offset, nbytes = place_of(folder, "lm_head.weight")
    spoil(file, put(offset, np.full(nbytes // 4, 3e38, np.float32).tobytes()))
    document = verify(folder, capsys, code=1)
    (finding,) = failures(document)
    assert (finding["check"], finding["tensor"]) == ("forward", "logits")
    assert finding["detail"].startswith("the logit of id ") and states(document)["cache"] == (
        "skipped"
    )


def test_outputs_that_overflow(tmp_path: Path, capsys: Capture) -> None:
    finding = only_failure(perceptron(tmp_path, scale=1e38), capsys, "--size", "20")
    assert (finding["check"], finding["tensor"]) == ("forward", "y")
    assert finding["detail"] == "of x [1, 20, 20, 3] it computes numbers that are not finite"


def test_a_sample_that_is_too_small(tmp_path: Path, capsys: Capture) -> None:
    """The model is whole: it is its open sizes that were guessed."""
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[4, 4])
    x, y = value("x", shape=(1, 3, "height", "width")), value("y", shape=(1, 3, "h", "w"))
    path = saved(make([pool], [x], [y]), tmp_path / "m.onnx")
    finding = only_failure(path, capsys)
    assert finding["detail"].startswith("of x [1, 3, 1, 1]: ")
    assert "--size 64" in finding["remedy"]
    finding = only_failure(path, capsys, "--size", "2")
    assert "--size" not in finding["remedy"]
    assert states(verify(path, capsys, "--size", "8"))["forward"] == "ok"


def test_a_cache_that_is_not_read(tmp_path: Path, capsys: Capture) -> None:
    """Logits depend on what is new alone: of a token, not on those before it."""
    path = saved(summing(over="new")[0], tmp_path / "m.onnx")
    finding = only_failure(path, capsys)
    assert finding["check"] == "cache" and "export it again" in finding["remedy"]
    assert float(finding["detail"].split()[6]) > 0.5


def test_a_run_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from onnxstream_nb.session import Session

    run, calls = Session.run, []

    def drifting(self: Session, *arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        found = run(self, *arguments, **options)
        return {name: result + len(calls) for name, result in found.items()}

    monkeypatch.setattr(Session, "run", drifting)
    finding = only_failure(perceptron(tmp_path), capsys)
    assert finding["check"] == "forward"
    assert finding["detail"].endswith(", but not the same in a second run")


def test_a_tokenizer_beside_an_onnxstream_folder(tmp_path: Path, capsys: Capture) -> None:
    """Its model has 1000 ids, and the tokenizer fewer."""
    shutil.copytree(EXPORTED / "onnxstream_llama_small", tmp_path / "m")
    with_tokenizer(tmp_path / "m")
    (finding,) = (c for c in verify(tmp_path / "m", capsys)["checks"] if c["check"] == "tokenizer")
    assert finding["detail"].startswith(f"{VOCAB} ids, 1000 rows of ")
