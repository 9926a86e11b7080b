"""Conversions of ONNX models and OnnxStream folders: operators, types, bodies, integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from conversions import check, plainly, same
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, refusal, run, saved, value

from onnxstream_nb import Session, formats
from onnxstream_nb.convert.convert import convert
from onnxstream_nb.errors import ModelError, UnsupportedError
from onnxstream_nb.formats.onnx_tensors import raw_data

MODELS = Path(__file__).parent / "fixtures" / "models"
EXPORTS = ("llama_gqa_dyn23", "llama_gqa_op14", "mistral_sw8_op14")
Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def cases(folder: Path) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """Feeds and PyTorch's results of each case."""
    found = []
    for path in sorted(folder.glob("case*.npz")):
        with np.load(path) as data:
            parts = [{k.removeprefix(p): data[k] for k in data if k.startswith(p)}
                     for p in ("in__", "out__")]  # fmt: skip
        found.append((parts[0], parts[1]))
    return found


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_exports(tmp_path: Path, name: str, dtype: str | None) -> None:
    """Every case of an export gives the same here, in onnxruntime, and by PyTorch before."""
    convert(MODELS / name, tmp_path / "out", dtype=dtype)
    check(tmp_path / "out")
    before, after = formats.load(MODELS / name), formats.load(tmp_path / "out")
    assert before.opset == after.opset and len(after.nodes) < len(before.nodes) + 40
    assert (before.inputs, before.outputs) == (after.inputs, after.outputs)
    names = [value.name for value in after.outputs]
    theirs = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    with Session(tmp_path / "out", precision="exact") as session:
        for feeds, wanted in cases(MODELS / name):
            found = session.run(feeds)
            for key, other in zip(names, theirs.run(names, feeds), strict=True):
                same(found[key], other)
                tolerance = {None: 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
                same(found[key], wanted[key], tolerance)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_an_onnxstream_folder(tmp_path: Path, dtype: str | None) -> None:
    source = MODELS / "onnxstream_llama_small"
    convert(source, tmp_path / "out", dtype=dtype)
    check(tmp_path / "out")
    graph = formats.load(tmp_path / "out")
    feeds: dict[str, Array] = {"input_ids": np.array([[3, 17, 5]], np.int64)}
    feeds["position_ids"] = np.arange(3, dtype=np.int64)[None]
    feeds["attention_mask"] = np.ones((1, 3), np.int64)
    for v in graph.inputs:
        if v.name.startswith("pkv") and v.shape is not None:
            feeds[v.name] = np.zeros([s if isinstance(s, int) else 0 for s in v.shape], np.float32)
    results = []
    for path in (source, tmp_path / "out"):
        with Session(path, precision="exact") as session:
            results.append(session.run(feeds, ["logits"])["logits"])
    same(results[1], results[0], 1e-5 if dtype is None else 2e-3)
    same(run(tmp_path / "out" / "model.onnx", feeds)["logits"], results[1])


def test_bytes_of_onnxstream_stay_bytes(tmp_path: Path) -> None:
    """uint8 with a scale and a zero point becomes DequantizeLinear, not floats."""
    folder = tmp_path / "model"
    folder.mkdir()
    q = np.random.default_rng(0).integers(0, 256, (64, 48), dtype=np.uint8)
    (folder / "w.bin").write_bytes(q.tobytes())
    (folder / "model.txt").write_text(
        "n:MatMul*input:x(2,64);w.bin(uint8[0.0125,120]:64,48)*output:y(2,48)\n"
    )
    written = convert(folder, tmp_path / "out")
    assert written.weight_bytes == q.size + 4 + 1
    check(tmp_path / "out")
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    wanted = x @ ((q.astype(np.float32) - 120) * np.float32(0.0125))
    same(plainly(tmp_path / "out" / "model.onnx", {"x": x})["y"], wanted)
    with Session(tmp_path / "out", precision="exact") as session:
        same(session.run({"x": x})["y"], wanted, 1e-4)  # activations of 15 bits meet integers
    convert(folder, tmp_path / "half", dtype="float16")
    assert {t.data_type for t in check(tmp_path / "half").graph.initializer} == {
        TensorProto.FLOAT16
    }
    same(run(tmp_path / "half" / "model.onnx", {"x": x})["y"], wanted, 2e-3)


def product(w: Array, kind: int = TensorProto.FLOAT, **options: Any) -> onnx.ModelProto:
    """y = x w."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = [value("x", kind, ("m", w.shape[0]))], [value("y", kind, ("m", w.shape[1]))]
    return make([node], *shapes, [numpy_helper.from_array(w, "w")], **options)


def matrix(k: int = 64, n: int = 48, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


@pytest.mark.parametrize("external", [False, True])
def test_embedded_and_external_weights(tmp_path: Path, external: bool) -> None:
    (tmp_path / "in").mkdir()
    w = matrix()
    onnx.save(
        product(w), tmp_path / "in" / "m.onnx", save_as_external_data=external, location="w.bin"
    )
    for out in ("out", "out.onnx"):
        convert(tmp_path / "in" / "m.onnx", tmp_path / out)
        model = onnx.load(tmp_path / out / "model.onnx" if out == "out" else tmp_path / out)
        assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), w)
        assert [n.op_type for n in model.graph.node] == ["MatMul"]
    check(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_graph_that_computes_in_halves(tmp_path: Path, dtype: str) -> None:
    """Asked for a type, it computes in float32, and its inputs and outputs are that."""
    w = matrix().astype(np.float16)
    source = saved(product(w, TensorProto.FLOAT16), tmp_path / "m.onnx")
    convert(source, tmp_path / "as_it_is")
    model = check(tmp_path / "as_it_is")
    assert [n.op_type for n in model.graph.node] == ["MatMul"]
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    convert(source, tmp_path / "out", dtype=dtype)
    model = check(tmp_path / "out")
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    x = matrix(2, 64, 1)
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    same(run(tmp_path / "out" / "model.onnx", {"x": x})["y"], x @ w.astype(np.float32), tolerance)


def test_an_old_graph_is_raised_for_bfloat16_only(tmp_path: Path) -> None:
    old = {"opset_imports": [helper.make_opsetid("", 11)], "ir_version": 6}
    source = saved(product(matrix(), **old), tmp_path / "m.onnx")
    for dtype, opset in ((None, 11), ("float16", 11), ("bfloat16", 13)):
        convert(source, tmp_path / f"{dtype}", dtype=dtype)
        assert check(tmp_path / f"{dtype}").opset_import[0].version == opset
        x = matrix(2, 64, 1)
        same(run(tmp_path / f"{dtype}" / "model.onnx", {"x": x})["y"], x @ matrix(), 1e-2)
    older = {"opset_imports": [helper.make_opsetid("", 9)], "ir_version": 4}
    source = saved(product(matrix(), **older), tmp_path / "older.onnx")
    message = refusal(lambda: convert(source, tmp_path / "no", dtype="bfloat16"), UnsupportedError)
    assert "opset 9" in message and "fp16" in message and not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["int4", "uint4", "int8", "uint8"])
def test_integers_stay_what_they_are(tmp_path: Path, kind: str) -> None:
    """Weights behind DequantizeLinear in blocks; a row of 47 has half a byte at its end."""
    rng = np.random.default_rng(3)
    low, high = (-8, 8) if kind == "int4" else (0, 16)
    q = rng.integers(low, high, (64, 47)).astype(getattr(ml_dtypes, kind, kind))
    s = rng.uniform(0.01, 0.02, (2, 47)).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(q, "q"), numpy_helper.from_array(s, "s")]
    source = saved(make(nodes, [value("x", shape=("m", 64))], [value("y", shape=("m", 47))],
                        weights), tmp_path / "m.onnx")  # fmt: skip
    for dtype in (None, "float16"):
        written = convert(source, tmp_path / f"{dtype}", dtype=dtype)
        assert (f"{kind} integers stay" in written.note) == (dtype is not None)
        model = onnx.load(tmp_path / f"{dtype}" / "model.onnx")
        stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        assert np.array_equal(stored["q"], q) and np.array_equal(stored["s"], s)
        check(tmp_path / f"{dtype}")
        x = matrix(2, 64, 1)
        wanted = x @ (q.astype(np.float32) * np.repeat(s, 32, axis=0))
        same(plainly(tmp_path / f"{dtype}" / "model.onnx", {"x": x})["y"], wanted)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "uint2"])
def test_packed_elements(dtype: str) -> None:
    """In pieces of any size, as onnx packs them."""
    bits = int(dtype[-1])
    low, high = (0, 2**bits) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    elements = np.random.default_rng(0).integers(low, high, 1001).astype(getattr(ml_dtypes, dtype))
    wanted = numpy_helper.from_array(elements).raw_data
    for cuts in ([], [1], [2, 4, 4], [3, 10, 11, 500], [1000]):
        pieces = raw_data(np.split(elements, cuts), dtype)
        assert b"".join(bytes(memoryview(p)) for p in pieces) == wanted  # type: ignore[arg-type]


def test_tables_of_positions_stay_exact(tmp_path: Path) -> None:
    """Cosines are looked up by position; words by their ids are weights."""
    tables = {name: matrix(64, 32, i) for i, name in enumerate(("words", "cosines"))}
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["a"]),
        helper.make_node("Gather", ["cosines", "position_ids"], ["b"]),
        helper.make_node("Mul", ["a", "b"], ["y"]),
    ]
    inputs = [value(n, TensorProto.INT64, ("t",)) for n in ("input_ids", "position_ids")]
    source = saved(make(nodes, inputs, [value("y", shape=("t", 32))],
                        [numpy_helper.from_array(a, n) for n, a in tables.items()]),
                   tmp_path / "m.onnx")  # fmt: skip
    convert(source, tmp_path / "out", dtype="float16")
    kinds = {t.name: t.data_type for t in check(tmp_path / "out").graph.initializer}
    assert kinds == {"words": TensorProto.FLOAT16, "cosines": TensorProto.FLOAT}
    feeds = {"input_ids": np.array([5, 9]), "position_ids": np.array([0, 1])}
    wanted = tables["words"][[5, 9]].astype(np.float16) * tables["cosines"][[0, 1]]
    same(run(tmp_path / "out" / "model.onnx", feeds)["y"], wanted, 1e-6)


def test_convolutions(tmp_path: Path) -> None:
    w, b = (np.random.default_rng(0).standard_normal(s).astype(np.float32)
            for s in ((16, 8, 3, 3), (16,)))  # fmt: skip
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])
    tensors = [numpy_helper.from_array(a, n) for n, a in (("w", w), ("b", b))]
    image = value("x", shape=(1, 8, "h", "w_")), value("y", shape=(1, 16, "h", "w_"))
    source = saved(make([node], [image[0]], [image[1]], tensors), tmp_path / "m.onnx")
    written = convert(source, tmp_path / "out", dtype="float16")
    assert written.weight_bytes == 2 * w.size + 4 * b.size
    check(tmp_path / "out")
    x = np.random.default_rng(1).standard_normal((1, 8, 10, 10)).astype(np.float32)
    found = run(tmp_path / "out" / "model.onnx", {"x": x})["y"]
    same(found, run(source, {"x": x})["y"], 2e-3)


def test_bodies(tmp_path: Path) -> None:
    """A weight that the body of an If takes from outside, and one of its own."""
    w, v = matrix(64, 64), matrix(64, 64, 2)
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"])], "then", [], [value("a", shape=None)]
    )
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["b"])], "else", [], [value("b", shape=None)],
        [numpy_helper.from_array(v, "v")],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
    inputs = [value("x", shape=("m", 64)), value("c", TensorProto.BOOL, ())]
    source = saved(
        make([node], inputs, [value("y", shape=("m", 64))], [numpy_helper.from_array(w, "w")]),
        tmp_path / "m.onnx",
    )
    for out in ("out", "out.onnx"):
        written = convert(source, tmp_path / out, dtype="float16")
        assert written.source_bytes == w.nbytes + v.nbytes
        file = tmp_path / out / "model.onnx" if out == "out" else tmp_path / out
        for c, weight in ((True, w), (False, v)):
            x = matrix(2, 64, 1)
            found = run(file, {"x": x, "c": np.array(c)})["y"]
            same(found, x @ weight)


def test_simplification(tmp_path: Path) -> None:
    """Constants are folded, shapes known, and what is dead or done twice is gone."""
    w = matrix()
    constants = {"w": w, "a": np.array([2, 3], np.int64), "b": np.array([1, 1], np.int64)}
    nodes = [
        helper.make_node("Identity", ["x"], ["x0"]),
        helper.make_node("MatMul", ["x0", "w"], ["y0"]),
        helper.make_node("Mul", ["x", "x"], ["unused"]),
        helper.make_node("MatMul", ["x", "w"], ["y1"]),
        helper.make_node("Add", ["a", "b"], ["shape0"]),
        helper.make_node("Sub", ["shape0", "shape0"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["zero_f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["zero_f"], ["none"], keepdims=0),
        helper.make_node("Add", ["y0", "y1"], ["y2"]),
        helper.make_node("Add", ["y2", "none"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    source = saved(make(nodes, [value("x", shape=("m", 64))], [value("y", shape=("m", 48))],
                        tensors), tmp_path / "m.onnx")  # fmt: skip
    convert(source, tmp_path / "out")
    model = check(tmp_path / "out")
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("MatMul") == 1 and not {"Identity", "Mul", "Sub", "Cast"} & set(kinds)
    x = matrix(2, 64, 1)
    same(run(tmp_path / "out" / "model.onnx", {"x": x})["y"], run(source, {"x": x})["y"])


def test_damaged_sources(tmp_path: Path) -> None:
    """What cannot be read is refused, and nothing is left."""
    w = matrix(300, 300)
    onnx.save(product(w), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(whole[:-1])
    assert "truncated" in refusal(lambda: convert(tmp_path / "m.onnx", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    assert "no model" in refusal(lambda: convert(tmp_path / "empty", tmp_path / "out"))
    assert "no such" in refusal(lambda: convert(tmp_path / "absent", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxstream_nb.convert import convert as module

    onnx.save(product(matrix(300, 300)), tmp_path / "m.onnx", save_as_external_data=True,
              location="w.bin")  # fmt: skip
    read = module.read

    def reading(source: Path) -> Any:
        draft = read(source)
        (tmp_path / "w.bin").write_bytes(b"short")
        return draft

    monkeypatch.setattr(module, "read", reading)
    message = refusal(lambda: convert(tmp_path / "m.onnx", tmp_path / "out"), ModelError)
    assert "w.bin" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "w.bin"]


def test_metadata_goes_along(tmp_path: Path) -> None:
    model = product(matrix())
    helper.set_model_props(model, {"author": "somebody", "n": json.dumps([1])})
    source = saved(model, tmp_path / "m.onnx")
    convert(source, tmp_path / "out")
    props = {p.key: p.value for p in check(tmp_path / "out").metadata_props}
    assert props == {"author": "somebody", "n": "[1]"}
