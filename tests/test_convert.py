"""Small language models as ONNX: the same logits here, before, and in onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from conversions import check, data_bytes, feeds_of, ours, same, theirs, unchanged
from llama_fixtures import random_weights, write_gguf, write_hf
from llama_oracle import Tiny
from onnx import TensorProto
from onnx_models import refusal

from onnxstream_nb import formats
from onnxstream_nb.convert import elements
from onnxstream_nb.convert.convert import Written, convert
from onnxstream_nb.errors import OutputError, UsageError
from onnxstream_nb.formats import onnx_folder

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

TINY = Tiny(hidden=64, intermediate=96, vocab=80)
TIED = Tiny(hidden=64, intermediate=96, vocab=80, tied=True)
HALVES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
MATRICES = 15  # of TINY: seven a layer, and the table; one more where it isn't tied


def matrices(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of each initializer of two axes."""
    return {t.name: t.data_type for t in model.graph.initializer if len(t.dims) == 2}


@pytest.mark.parametrize("tiny", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("encoding", "stored"),
    [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float16"), ("Q4_1", "float16")],
)
def test_gguf(tmp_path: Path, encoding: str, stored: str, tiny: Tiny) -> None:
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(source, tiny, encoding)
    written = convert(source, out)
    model = check(out)
    assert set(matrices(model).values()) == {HALVES[stored]}
    assert len(matrices(model)) == MATRICES + (not tiny.tied)
    same(theirs(out), ours(out))
    if encoding.endswith("F16"):
        unchanged(out, source)
    else:
        same(ours(out), ours(source), 2e-3)
    _check_size(written, out, tiny)


def _check_size(written: Written, out: Path, tiny: Tiny) -> None:
    """The data files hold each matrix once, two bytes an element, and not much else."""
    elements = sum(w.size for w in random_weights(tiny).values() if w.ndim == 2)
    assert 2 * elements <= written.weight_bytes <= 2 * elements + 4096
    assert data_bytes(out) < 2 * elements + 4096 * (MATRICES + 2)
    assert written.size_bytes + (out / "manifest.json").stat().st_size >= sum(
        path.stat().st_size for path in out.iterdir()
    )


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kept", ["F32", "F16", "BF16"])
def test_safetensors_of_each_type_as_each(tmp_path: Path, kept: str, dtype: str | None) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    write_hf(source, TIED, kept, shards=2)
    convert(source, out, dtype=dtype)
    own = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kept]
    wanted = {**HALVES, "float32": TensorProto.FLOAT}[dtype or own]
    assert set(matrices(check(out)).values()) == {wanted}
    if dtype in (None, own, "float32"):
        unchanged(out, source)
    else:
        same(ours(out), ours(source), 2e-2 if dtype == "bfloat16" else 2e-3)
    same(theirs(out), ours(out))


@pytest.mark.parametrize("tiny", [
    Tiny("qwen2", hidden=64), Tiny("qwen3", hidden=64), Tiny("mistral", hidden=64, window=4),
], ids=lambda tiny: tiny.architecture)  # fmt: skip
def test_architectures(tmp_path: Path, tiny: Tiny) -> None:
    write_hf(tmp_path / "hf", tiny, "F16")
    convert(tmp_path / "hf", tmp_path / "out")
    check(tmp_path / "out")
    unchanged(tmp_path / "out", tmp_path / "hf")
    same(theirs(tmp_path / "out"), ours(tmp_path / "out"))


def test_one_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", TIED, "F16")
    written = convert(tmp_path / "m.gguf", tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.onnx"]
    assert written.files == {"out.onnx": (tmp_path / "out.onnx").stat().st_size}
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (
        model.SerializeToString()
        == onnx.ModelProto.FromString((tmp_path / "out.onnx").read_bytes()).SerializeToString()
    )
    unchanged(tmp_path / "out.onnx", tmp_path / "m.gguf")
    same(theirs(tmp_path / "out.onnx"), ours(tmp_path / "m.gguf"))


def test_one_file_of_more_than_protobuf_holds(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY)
    graph = formats.load(tmp_path / "hf")
    name = "model.embed_tokens.weight"
    huge = replace(graph.initializers[name], shape=(2**25, 64))
    graph = graph.with_(initializers={**graph.initializers, name: huge})
    message = refusal(
        lambda: onnx_folder.write_file(graph, *[cast(Any, None)] * 3),
        UsageError,
    )
    assert "2 GiB" in message and "without .onnx" in message


@pytest.mark.parametrize("limit", [8192, 20_000, 100_000])
def test_shards(tmp_path: Path, limit: int) -> None:
    """Each at most so large, or a single tensor; the fewest would not be one a tensor."""
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    convert(tmp_path / "m.gguf", tmp_path / "out", shard_bytes=limit)
    check(tmp_path / "out", limit)
    files = sorted((tmp_path / "out").glob("*.data"))
    assert [f.name for f in files] == [f"model-{i:05d}.data" for i in range(1, len(files) + 1)]
    assert len(files) < MATRICES if limit > 8192 else len(files) >= 12
    unchanged(tmp_path / "out", tmp_path / "m.gguf")


def test_converted_again(tmp_path: Path) -> None:
    """From what was written to every other type, and back: a graph is not changed by its own."""
    write_hf(tmp_path / "hf", TIED, "F16")
    convert(tmp_path / "hf", tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "again")
    for name in ("model-00001.data", "model.onnx"):
        assert len({(tmp_path / f / name).read_bytes() for f in ("half", "again")}) == 1, name
    convert(tmp_path / "half", tmp_path / "full", dtype="float32")
    assert set(matrices(check(tmp_path / "full")).values()) == {TensorProto.FLOAT}
    assert len(matrices(check(tmp_path / "full"))) == MATRICES  # the tied table is one still
    unchanged(tmp_path / "full", tmp_path / "half")
    same(theirs(tmp_path / "full"), ours(tmp_path / "half"))


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = -70000.0
    write_hf(tmp_path / "hf", TINY, weights=weights)
    message = refusal(
        lambda: convert(tmp_path / "hf", tmp_path / "out", dtype="float16"), UsageError
    )
    assert "layers.1.mlp.up_proj.weight" in message and "70000" in message
    assert "--dtype bf16" in message
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    convert(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")
    same(theirs(tmp_path / "out"), ours(tmp_path / "out"), 1e-3)


def test_large_matrices_pass_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file whatever the size of pieces and strips."""
    for encoding in ("F32", "Q4_1"):
        source = tmp_path / f"{encoding}.gguf"
        write_gguf(source, TINY, encoding)
        convert(source, tmp_path / "whole", dtype="float16", overwrite=True)
        with monkeypatch.context() as patch:
            patch.setattr(elements, "PIECE", 7 * 64)
            patch.setattr(elements, "STRIP", 1000)
            patch.setattr(elements, "CHUNK", 1000)
            convert(source, tmp_path / "pieces", dtype="float16", overwrite=True)
        files = [(tmp_path / f / "model-00001.data").read_bytes() for f in ("whole", "pieces")]
        assert files[0] == files[1]


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", TINY)
    (tmp_path / "there").mkdir()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("there", {}, "--overwrite"),
        ("hf", {"overwrite": True}, "another output"),
        ("nowhere/out", {}, "no folder"),
        ("out", {"to": "gguf"}, "onnx, onnxstream"),
        ("out.onnx", {"to": "onnxstream"}, "without .onnx"),
        ("out", {"to": "onnxstream", "dtype": "bfloat16"}, "--dtype bf16: OnnxStream stores"),
    ]
    for name, options, wanted in cases:
        message = refusal(lambda n=name, o=options: convert(tmp_path / "hf", tmp_path / n, **o),  # type: ignore[misc]
                          UsageError)  # fmt: skip
        assert wanted in message, message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "there"]


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxstream_nb.convert.folder.disk_free", lambda path: 1000)
    write_hf(tmp_path / "hf", TINY)
    message = refusal(lambda: convert(tmp_path / "hf", tmp_path / "out"), OutputError)
    assert "1.00 kB free" in message and "another disk" in message
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_run_with_a_past_of_the_written_graph(tmp_path: Path) -> None:
    """The graph's inputs and outputs keep their names, and the feeds of the source fit."""
    write_hf(tmp_path / "hf", TINY, "F16")
    convert(tmp_path / "hf", tmp_path / "out")
    before, after = formats.load(tmp_path / "hf"), formats.load(tmp_path / "out")
    assert (before.inputs, before.outputs) == (after.inputs, after.outputs)
    assert dict(before.metadata) == dict(after.metadata)
    assert set(feeds_of(after, [1])) == {v.name for v in after.inputs}
    assert all(np.asarray(f).dtype in (np.int64, np.float32) for f in feeds_of(after, [1]).values())
