"""Weights in 8 bits as OnnxStream's exporter makes them, in drafts and in folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integer_models import conv_net, draft_of, images, silent, snr, theirs
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb import formats
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.folder import output_folder
from onnxstream_nb.convert.onnxstream.onnxstream_uint8 import (
    as_floats,
    exported,
    nearest,
    uint8_weights,
)
from onnxstream_nb.convert.onnxstream.text_folder import write_text_folder
from onnxstream_nb.convert.quantisation.integer import prepared
from onnxstream_nb.session import Session

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

Array = np.ndarray[Any, Any]


def oracle(a: Array) -> tuple[Array, float, int] | None:
    """What OnnxStream's exporter (onnx2txt.ipynb) does, word for word where it matters."""
    flat = a.flatten().tolist()
    s = sorted(f for f in flat if math.isfinite(f))
    if len(s) == 1 and len(flat) == 1:
        return np.array([1], "ubyte"), abs(flat[0]), 0 if flat[0] >= 0 else 2
    if len(s) < 2:
        return None
    left = s[int(len(s) * 0.001)]
    right = s[int(len(s) * 0.001 * -1 - 1)]
    if left > 0 and right > 0:
        left = 0
    elif left < 0 and right < 0:
        right = 0
    if right <= left:
        return None
    scale = (right - left) / 255.0
    zero = min(255, int(abs(left) / scale))
    return np.clip((a / scale) + zero, 0, 255).astype("ubyte"), scale, zero


@pytest.mark.parametrize("size", [1, 2, 3, 999, 1000, 1001, 1999, 2000, 5000])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("spread", [1.0, 1e-12, 1e12])
def test_integers_are_those_of_the_exporter(size: int, shift: float, spread: float) -> None:
    rng = np.random.default_rng(size)
    weight = ((rng.standard_t(3, size) + shift) * spread).astype(np.float32)
    found, wanted = exported(weight), oracle(weight)
    assert found is not None and wanted is not None
    np.testing.assert_array_equal(found.integers, wanted[0])
    assert (found.scale, found.zero_point) == wanted[1:]
    assert found.integers.dtype == np.uint8
    inside = np.sort(weight)[int(size * 0.001) : size - int(size * 0.001)]
    values = np.sort(found.values)[int(size * 0.001) : size - int(size * 0.001)]
    assert np.abs(values - inside).max() <= 1.01 * found.scale  # cut off, not rounded


@pytest.mark.parametrize("values", [[], [2, 2, 2], [0, 0], [-3, -3], [np.nan, 1], [np.nan], [0.0]])
def test_ranges_that_are_none(values: Any) -> None:
    weight = np.array(values, np.float32)
    found, wanted = exported(weight), oracle(weight)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        np.testing.assert_array_equal(found.integers, wanted[0])
        assert (found.scale, found.zero_point) == wanted[1:]


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_whole_ranges_are_rounded_to_nearest(shift: float) -> None:
    weight = (np.random.default_rng(0).standard_t(3, (30, 50)) + shift).astype(np.float32)
    found, cut = nearest(weight), exported(weight)
    assert found is not None and cut is not None
    assert np.abs(found.values - weight).max() <= 0.501 * found.scale
    assert snr(weight, found.values) > snr(weight, cut.values)
    zero = nearest(np.array([0, 3, -1], np.float32))
    assert zero is not None and zero.values[0] == 0
    assert nearest(np.zeros(4, np.float32)) is None and nearest(np.zeros(0, np.float32)) is None


def test_infinities_are_clipped() -> None:
    found = exported(np.array([np.inf, -1, 2, -np.inf], np.float32))
    assert found is not None and found.integers.tolist() == [255, 0, 255, 0]


def test_which_weights_stay_floats() -> None:
    draft = prepared(draft_of(conv_net()))
    kept = as_floats(draft.graph)
    biases = {n.inputs[2] for n in draft.graph.nodes if n.op_type == "Conv"}
    assert biases and kept == biases
    found = uint8_weights(draft, silent).graph.initializers
    assert {n for n, r in found.items() if r.encoding != "uint8"} == biases


def folder_of(draft: Draft, path: Path) -> Path:
    with output_folder(path) as folder:
        write_text_folder(draft, folder, silent, dtype="uint8")
    return path


def test_a_folder_holds_the_exporters_integers_and_runs(tmp_path: Path) -> None:
    model, x = conv_net(), images(2, seed=5)
    draft = prepared(draft_of(model))
    path = folder_of(draft, tmp_path / "net")
    text = (path / "model.txt").read_text("utf-8")
    for name, ref in draft.graph.initializers.items():
        wanted = oracle(draft.read(ref))
        if name in as_floats(draft.graph) or wanted is None:
            continue
        files = [f for f in path.glob("*.bin") if f.read_bytes() == wanted[0].tobytes()]
        turned = [f for f in path.glob("*.bin") if f.read_bytes() == wanted[0].T.tobytes()]
        assert files or turned, name
        assert f"(uint8[{float(wanted[1])},{wanted[2]}]:" in text
    exact, loaded = theirs(model, {"x": x}), formats.load(path)
    name = loaded.inputs[0].name
    with Session(loaded, threads=1) as session:
        y = next(iter(session.run({name: x}).values()))
    assert snr(exact, y) > 8  # one scale a tensor, cut off
    used = {name: q for name, q in uint8_weights(draft, silent).made.items()}
    plain = draft.with_(draft.graph, used)
    with Session(rebuilt(plain), threads=1) as session:
        np.testing.assert_allclose(y, session.run({"x": x})["y"], 1e-3, 1e-3)


def rebuilt(draft: Draft) -> bytes:
    from onnxstream_nb.formats.onnx_write import to_model_proto

    content: bytes = to_model_proto(draft.graph, draft.read).SerializeToString()
    return content


def test_a_language_model_keeps_its_frequencies(tmp_path: Path) -> None:
    tiny = Tiny(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=300, layers=2)
    write_gguf(tmp_path / "tiny.gguf", tiny)
    draft = Draft(formats.load(tmp_path / "tiny.gguf"))
    path = folder_of(draft, tmp_path / "folder")
    loaded = formats.load(path)
    kinds = {r.encoding for r in loaded.initializers.values() if len(r.shape) == 2}
    assert kinds == {"uint8"}
    vectors = [r for r in loaded.initializers.values() if sum(s > 1 for s in r.shape) < 2]
    assert vectors and all(r.encoding != "uint8" for r in vectors)
    ids = np.array([[5, 17, 99, 250, 3, 42]])
    logits = []
    for graph in (draft.graph, loaded):
        feeds = {value.name: feed(value.name, value.shape, ids) for value in graph.inputs}
        with Session(graph, threads=1) as session:
            logits.append(session.run(feeds, ["logits"])["logits"])
    assert snr(logits[0], logits[1]) > 20
    sizes = sum(f.stat().st_size for f in path.glob("*.bin"))
    assert sizes < 0.3 * sum(4 * math.prod(r.shape) for r in draft.graph.initializers.values())


def feed(name: str, shape: Any, ids: Array) -> Array:
    if name == "input_ids":
        return ids
    if name == "position_ids":
        return np.arange(ids.size)[None]
    if name == "attention_mask":
        return np.ones(ids.shape, np.int64)
    return np.zeros([size if isinstance(size, int) else 0 for size in shape[1:]], "f4")[None]


def test_a_tied_table_is_looked_up_and_multiplied(tmp_path: Path) -> None:
    tiny = Tiny(hidden=64, intermediate=96, vocab=320, layers=1, tied=True)
    write_gguf(tmp_path / "tiny.gguf", tiny)
    draft = Draft(formats.load(tmp_path / "tiny.gguf"))
    path = folder_of(draft, tmp_path / "folder")
    tables = [f for f in path.glob("*.bin") if f.stat().st_size == 320 * 64]
    assert len(tables) == 1
    ids, rounded = np.array([[5, 17, 99, 250, 3, 42]]), uint8_weights(draft, silent)
    logits = []
    for graph in (rebuilt(draft.with_(draft.graph, rounded.made)), formats.load(path)):
        with Session(graph, threads=1) as session:
            given = {v.name: feed(v.name, v.shape, ids) for v in session.inputs}
            logits.append(session.run(given, ["logits"])["logits"])
            kinds = {r.encoding for r in session.graph.initializers.values()}
    assert {"uint8", "affine8"} <= kinds  # the rows that are looked up, and the matrices
    assert snr(logits[0], logits[1]) > 40
