"""The step that quantises weights: what it writes, for which matrices, and that it runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, value
from quantising import agreed, distance, quantised

from onnxstream_nb.convert.convert import convert
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.quantisation.matrices import find
from onnxstream_nb.convert.quantisation.quantise import QuantiseOptions
from onnxstream_nb.errors import ModelError, UnsupportedError, UsageError
from onnxstream_nb.formats.onnx import read_bytes

Array = np.ndarray[Any, Any]
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def product(
    k: int, n: int, form: str = "MatMul", kind: str = "float32", opset: int = 14
) -> tuple[Draft, Array, dict[str, Array]]:
    """x w of one form, w (K, N) itself, and a feed."""
    rng = np.random.default_rng((k, n))
    w = rng.standard_normal((k, n)).astype(kind)
    turned = form in ("Transpose", "Gemm transB")
    weights = {"w": np.ascontiguousarray(w.T if turned else w)}
    if form.startswith("Gemm"):
        weights["b"] = rng.standard_normal(n).astype(kind)
        given = {"transB": 1} if turned else {}
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="the/gemm", **given)]
    elif turned:
        nodes = [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
                 helper.make_node("MatMul", ["x", "t"], ["y"], name="the/matmul")]  # fmt: skip
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="the/matmul")]
    element = TYPES[kind]
    model = make(
        nodes, [value("x", element, ("m", k))], [value("y", element, ("m", n))],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
        opset_imports=[helper.make_opsetid("", opset)],
    )  # fmt: skip
    x = rng.standard_normal((3, k)).astype(kind)
    return Draft(read_bytes(model.SerializeToString())), w, {"x": x}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("form", ["MatMul", "Transpose", "Gemm", "Gemm transB"])
@pytest.mark.parametrize("nbits", [False, True])
def test_products_of_every_form_run_alike(
    form: str, dtype: str, asymmetric: bool, nbits: bool
) -> None:
    draft, _, feeds = product(75, 21, form)
    wanted = agreed(draft, feeds, "y")
    found = quantised(draft, dtype=dtype, asymmetric=asymmetric, matmul_nbits=nbits)
    assert distance(agreed(found, feeds, "y"), wanted) < (0.15 if dtype == "int4" else 0.01)
    operators = {node.op_type for node in found.graph.nodes}
    assert ("MatMulNBits" in operators) == nbits != ("DequantizeLinear" in operators)
    assert "w" not in found.graph.initializers


@pytest.mark.parametrize("shape", [(1, 1), (16, 5), (33, 1), (31, 17), (65, 2), (96, 48)])
@pytest.mark.parametrize("block", [0, 16, 32, 64])
def test_any_size_of_matrix_and_block(shape: tuple[int, int], block: int) -> None:
    draft, _, feeds = product(*shape)
    found = quantised(draft, block=block)
    size = found.graph.initializers["w.scales"].shape
    assert size == ((-(-shape[0] // block), shape[1]) if block else (shape[1],))
    agreed(found, feeds, "y")


def test_what_is_written_of_a_matrix() -> None:
    draft, w, _ = product(64, 8)
    found = quantised(draft, asymmetric=True)
    kinds = {name: (ref.dtype, ref.shape) for name, ref in found.graph.initializers.items()}
    assert kinds == {
        "w.uint4": ("uint4", (64, 8)), "w.scales": ("float16", (2, 8)), "w.zeros": ("uint4", (2, 8))
    }  # fmt: skip
    assert found.graph.opset[""] >= 21
    cast, dequantise, multiply = found.graph.nodes
    assert (cast.op_type, cast.inputs) == ("Cast", ("w.scales",))
    assert dequantise.outputs == ("w",) and multiply.inputs == ("x", "w")
    assert dict(dequantise.attributes) == {"axis": 0, "block_size": 32}
    q, s, z = (found.made[name]().astype(np.float32) for name in ("w.uint4", "w.scales", "w.zeros"))
    dense = (q - z.repeat(32, axis=0)) * s.repeat(32, axis=0)
    assert np.abs(dense - w).max() < 0.3


def test_symmetric_integers_have_no_zero_points_and_scales_may_be_float32() -> None:
    draft, _, feeds = product(64, 8)
    found = quantised(draft, dtype="int8", scales="float32")
    assert found.graph.initializers.keys() == {"w.int8", "w.scales"}
    assert found.graph.initializers["w.scales"].dtype == "float32"
    assert found.made["w.int8"]().min() >= -127
    agreed(found, feeds, "y")


def test_a_matrix_is_rounded_once_for_integers_and_scales(monkeypatch: Any) -> None:
    from onnxstream_nb.convert.quantisation import weight_only

    draft, _, _ = product(64, 8)
    found, calls = quantised(draft, asymmetric=True), []
    inner = weight_only.nearest
    monkeypatch.setattr(weight_only, "nearest", lambda *a: (calls.append(1), inner(*a))[1])
    for make_it in found.made.values():
        make_it()
    assert len(calls) == 1


def test_a_graph_of_half_floats_stays_one() -> None:
    draft, _, feeds = product(64, 16, kind="float16")
    found = quantised(draft)
    assert {node.op_type for node in found.graph.nodes} == {"DequantizeLinear", "MatMul"}
    got = agreed_in_halves(found, feeds)
    assert got.dtype == np.float16


def agreed_in_halves(found: Draft, feeds: dict[str, Array]) -> Array:
    from quantising import by_onnxruntime, by_us, model_of

    model = model_of(found)
    theirs = by_onnxruntime(model, feeds, "y")
    ours = by_us(read_bytes(model.SerializeToString()), feeds, "y")
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=2e-2)
    return ours


# -- tables ----------------------------------------------------------------------------------------


def language_model(way: str) -> tuple[Draft, dict[str, Array]]:
    """A table (V, D) of which rows are looked up; and the head: tied, by a Transpose or as a
    second view of the same bytes, or of its own."""
    rng = np.random.default_rng(3)
    table = rng.standard_normal((40, 24)).astype(np.float32)
    weights = {"table": table, "w": rng.standard_normal((24, 24)).astype(np.float32) / 5}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="embed"),
             helper.make_node("MatMul", ["rows", "w"], ["hidden"], name="inner")]  # fmt: skip
    if way == "transpose":
        nodes += [helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0])]
    else:
        weights["head"] = np.ascontiguousarray(table.T)
    nodes += [helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="lm_head")]
    model = make(
        nodes, [value("input_ids", TensorProto.INT64, (1, "t"))],
        [value("logits", TensorProto.FLOAT, (1, "t", 40))],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
        opset_imports=[helper.make_opsetid("", 23)],
    )  # fmt: skip
    graph = read_bytes(model.SerializeToString())
    if way == "view":
        from dataclasses import replace

        refs = dict(graph.initializers)
        refs["head"] = replace(refs["table"], name="head", shape=(24, 40), transposed=True)
        graph = graph.with_(initializers=refs)
    return Draft(graph), {"input_ids": np.array([[3, 0, 39, 7]])}


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", [0, 32, 16])
@pytest.mark.parametrize("way", ["transpose", "view"])
def test_a_tied_table_is_stored_once_in_eight_bits(way: str, block: int, asymmetric: bool) -> None:
    draft, feeds = language_model(way)
    found = quantised(draft, block=block, asymmetric=asymmetric)
    kind = "uint8" if asymmetric else "int8"
    large = [ref for ref in found.graph.initializers.values() if 40 in ref.shape and len(ref.shape)]
    assert [ref.dtype for ref in large if ref.shape == (40, 24)] == [kind]
    assert distance(agreed(found, feeds, "logits"), agreed(draft, feeds, "logits")) < 0.2
    lookup = next(n for n in found.graph.nodes if n.op_type == "Gather")
    assert lookup.inputs[0] == f"table.{kind}"  # only the rows that are looked up are dequantised


def test_a_head_of_its_own_has_eight_bits_unless_it_is_asked_for_fewer() -> None:
    draft, feeds = language_model("own")
    assert {"head.int8", "table.int8", "w.int4"} <= quantised(draft).graph.initializers.keys()
    found = quantised(draft, keep=(("head", "int4"),))
    assert "head.int4" in found.graph.initializers
    agreed(found, feeds, "logits")


@pytest.mark.parametrize("way", ["own", "transpose"])
def test_tables_are_no_factors_of_matmul_nbits(way: str) -> None:
    draft, feeds = language_model(way)
    found = quantised(draft, matmul_nbits=True)
    operators = [node.op_type for node in found.graph.nodes]
    assert operators.count("MatMulNBits") == (2 if way == "own" else 1)
    agreed(found, feeds, "logits")


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["lm_head", "*head*", "head", "lm_*"])
def test_kept_layers_match_names_of_nodes_weights_and_roles(pattern: str) -> None:
    draft, feeds = language_model("own")
    found = quantised(draft, dtype="int8", keep=((pattern, "fp32"),))
    assert found.graph.initializers["head"].dtype == "float32"
    assert "w.int8" in found.graph.initializers
    agreed(found, feeds, "logits")


def test_the_first_pattern_counts() -> None:
    draft, _ = language_model("own")
    found = quantised(draft, keep=(("inner", "int8"), ("*", "fp16")))
    assert found.graph.initializers.keys() == {"w.int8", "w.scales", "table", "head"}
    assert found.graph.initializers["head"].encoding == "float16"


def test_roles_of_a_language_model() -> None:
    draft, _ = language_model("view")
    table, inner = find(draft)
    assert (table.alias, table.roles, inner.roles) == ("head", {"head", "table"}, frozenset())


# -- what cannot be quantised ----------------------------------------------------------------------


def test_weights_that_are_no_finite_numbers_are_named() -> None:
    draft, _, _ = product(64, 8)
    broken = draft.with_(draft.graph, {"w": lambda: np.full((64, 8), np.nan, np.float32)})
    with pytest.raises(ModelError, match=r"^w: not all weights are finite"):
        quantised(broken).made["w.int4"]()


def test_scales_beyond_float16_name_the_remedy() -> None:
    draft, _, _ = product(64, 8)
    large = draft.with_(draft.graph, {"w": lambda: np.full((64, 8), 1e9, np.float32)})
    with pytest.raises(ModelError, match=r"^w: .*--scales float32"):
        quantised(large).made["w.scales"]()
    found = quantised(large, scales="float32").made["w.scales"]()
    assert np.isfinite(found).all()


def test_a_graph_without_matrices_is_refused() -> None:
    draft, _, _ = product(64, 8)
    done = quantised(draft)
    for again in ({}, {"keep": (("*", "fp32"),)}):
        with pytest.raises(UnsupportedError, match="no matrix of floats"):
            quantised(done if not again else draft, **again)


def test_matrices_that_are_read_otherwise_stay() -> None:
    weights = {name: np.ones((8, 8), np.float32) for name in "abcd"}
    nodes = [helper.make_node("MatMul", ["x", "a"], ["p"]),
             helper.make_node("Add", ["p", "a"], ["q"]),  # also an addend
             helper.make_node("MatMul", ["b", "q"], ["r"]),  # the first factor
             helper.make_node("Gemm", ["r", "c"], ["s"], alpha=2.0),
             helper.make_node("MatMul", ["s", "d"], ["y"])]  # fmt: skip
    tensors = [numpy_helper.from_array(a, name) for name, a in weights.items()]
    inputs, outputs = [value("x", shape=(8, 8))], [value("y", shape=(8, 8))]
    model = make(nodes, inputs, outputs, tensors, opset_imports=[helper.make_opsetid("", 21)])
    draft = Draft(read_bytes(model.SerializeToString()))
    assert [m.name for m in find(draft)] == ["d"]
    found = quantised(draft)
    assert found.graph.initializers.keys() == {"a", "b", "c", "d.int4", "d.scales"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "best"}, "rtn, awq, gptq"),
        ({"dtype": "int3"}, "int4, int8"),
        ({"block": 31}, "--block 31"),
        ({"block": 48, "matmul_nbits": True}, "power of two"),
        ({"keep": (("*", "int5"),)}, "'int5' is none of"),
        ({"method": "awq"}, "--calibration"),
        ({"method": "gptq"}, "--calibration"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantiseOptions(**given)


def test_four_bits_are_packed_in_the_file() -> None:
    draft, _, _ = product(64, 8)
    from quantising import model_of

    tensor = next(t for t in model_of(quantised(draft)).graph.initializer if t.name == "w.int4")
    assert tensor.data_type == onnx.TensorProto.INT4 and len(tensor.raw_data) == 64 * 8 // 2
    assert numpy_helper.to_array(tensor).dtype == ml_dtypes.int4


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_rounded_some_at_a_time(transposed: bool, tmp_path: Any, monkeypatch: Any) -> None:
    from onnxstream_nb.convert import elements
    from onnxstream_nb.graph import Graph, Node, Value, WeightRef

    rows = np.random.default_rng(4).standard_normal((50, 40)).astype(np.float16)
    path = tmp_path / "weights.bin"
    path.write_bytes(rows.tobytes())
    ref = WeightRef("w", (50, 40), "float32", path, 0, rows.nbytes, "float16")
    node = Node("Gemm", ("x", "w"), ("y",), {"transB": 1})
    if transposed:
        from dataclasses import replace

        ref = replace(ref, shape=(40, 50), transposed=True)
        node = Node("MatMul", ("x", "w"), ("y",))
    x, y = Value("x", "float32", (1, 40)), Value("y", "float32", (1, 50))
    draft = Draft(Graph((node,), (x,), (y,), {"w": ref}, {"": 21}))
    whole = {name: make_it() for name, make_it in quantised(draft, asymmetric=True).made.items()}
    monkeypatch.setattr(elements, "PIECE", 40 * 7)
    for name, make_it in quantised(draft, asymmetric=True).made.items():
        np.testing.assert_array_equal(make_it(), whole[name])


def test_what_is_quantised_already_is_refused(tmp_path: Path) -> None:
    """The scales of a tied table are floats whose rows are looked up, and yet no table."""
    write_gguf(tmp_path / "m.gguf", Tiny(tied=True), "F32")
    step = partial(quantised, method="rtn")
    convert(tmp_path / "m.gguf", tmp_path / "once", steps=(step,))
    with pytest.raises(UnsupportedError, match="quantised already"):
        convert(tmp_path / "once", tmp_path / "twice", steps=(step,))
