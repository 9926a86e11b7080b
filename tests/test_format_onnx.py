"""formats/onnx.py against the onnx package and onnxruntime."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, adding, make, ramp, refusal, run, saved, value
from weight_bytes import logical, stored

from onnxstream_nb.errors import UsageError
from onnxstream_nb.formats import load, load_bytes
from onnxstream_nb.formats.onnx import read, to_model_proto, write
from onnxstream_nb.graph import DTYPES, Graph, Node, Value, WeightRef

MODELS = Path(__file__).parent / "fixtures" / "models"
EXPORTS = ("llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23")
NUMERIC_TYPES = sorted(set(DTYPES) - {TensorProto.STRING})


# --- Real exports


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_a_written_graph_computes_what_the_original_does(
    name: str, external: bool, tmp_path: Path
) -> None:
    written = tmp_path / "again.onnx"
    write(load(MODELS / name), written, read=logical, external=external)
    onnx.checker.check_model(str(written), full_check=True)
    assert (tmp_path / "again.onnx.data").exists() == external
    case = np.load(MODELS / name / "case3.npz")
    feeds = {k[4:]: case[k] for k in case.files if k.startswith("in__")}
    results = run(written, feeds)
    originals = run(MODELS / name / "model.onnx", feeds)
    assert results.keys() == originals.keys()
    for key, original in originals.items():
        np.testing.assert_allclose(results[key], original, rtol=0, atol=1e-6)
        np.testing.assert_allclose(results[key], case[f"out__{key}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EXPORTS)
def test_weights_are_references_to_the_bytes_in_the_file(name: str) -> None:
    path = MODELS / name / "model.onnx"
    graph, model = load(path), onnx.load(path)
    for tensor in model.graph.initializer:
        ref = graph.initializers[tensor.name]
        assert stored(ref) == numpy_helper.to_array(tensor).tobytes()
        assert isinstance(ref.source, Path) == (ref.nbytes > 1024)
    constants = [n for n in model.graph.node if n.op_type == "Constant"]
    for node in constants:
        ref = graph.initializers[node.output[0]]
        np.testing.assert_array_equal(logical(ref), numpy_helper.to_array(node.attribute[0].t))
    assert len(graph.nodes) == len(model.graph.node) - len(constants)
    assert [v.name for v in graph.inputs] == [v.name for v in model.graph.input]
    assert graph.inputs[0] == Value("input_ids", "int64", (1, graph.inputs[0].shape[1]))


def test_embedded_weights_are_not_read(tmp_path: Path) -> None:
    path = saved(adding(ramp(8_000_000)), tmp_path / "large.onnx")
    read(path)
    tracemalloc.start()
    graph = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert graph.initializers["w"].nbytes == 32_000_000
    assert peak < 1_000_000


def test_the_bytes_of_a_model_are_referred_to_and_not_copied() -> None:
    data = adding(ramp()).SerializeToString()
    ref = load_bytes(data).initializers["w"]
    assert ref.source is data
    assert stored(ref) == np.arange(600, dtype=np.float32).tobytes()


# --- Tensors and attributes


@pytest.mark.parametrize("count", [0, 1, 7, 2049])
@pytest.mark.parametrize("number", NUMERIC_TYPES, ids=DTYPES.get)
def test_every_element_type_raw_and_in_typed_fields(number: int, count: int) -> None:
    values = np.random.default_rng(count).integers(0, 2, count).astype(np.float32)
    typed = helper.make_tensor("typed", number, [count], values.tolist())
    expected = numpy_helper.to_array(typed)
    raw = numpy_helper.from_array(expected, "raw")
    outputs = [value("typed", number, [count]), value("raw", number, [count])]
    graph = load_bytes(make([], [], outputs, [typed, raw]).SerializeToString())
    for name in ("typed", "raw"):
        ref = graph.initializers[name]
        assert (ref.dtype, ref.shape, ref.encoding) == (DTYPES[number], (count,), "raw")
        assert stored(ref) == raw.raw_data
    again = to_model_proto(graph, logical).graph.initializer
    for tensor in again:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected)
        assert tensor.data_type == number


@pytest.mark.parametrize(
    ("attribute", "dtype", "expected"),
    [
        ({"value_float": 1.5}, "float32", np.float32(1.5)),
        ({"value_floats": [1.5, 2.0]}, "float32", [1.5, 2.0]),
        ({"value_int": -7}, "int64", -7),
        ({"value_ints": [1, 2**40]}, "int64", [1, 2**40]),
        ({"value": numpy_helper.from_array(np.array([[True]]))}, "bool", [[True]]),
    ],
)
def test_constants_become_initializers(attribute: Any, dtype: str, expected: Any) -> None:
    node = helper.make_node("Constant", [], ["c"], **attribute)
    graph = load_bytes(make([node], [], [value("c", 1, None)]).SerializeToString())
    assert graph.nodes == ()
    assert graph.initializers["c"].dtype == dtype
    array = logical(graph.initializers["c"])
    np.testing.assert_array_equal(array, expected)
    assert array.shape == np.shape(expected)


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [({"value_string": "é"}, "é"), ({"value_strings": ["a", ""]}, ["a", ""])],
)
def test_string_constants_stay_nodes_and_are_written_again(attribute: Any, expected: Any) -> None:
    node = helper.make_node("Constant", [], ["c"], **attribute)
    graph = load_bytes(make([node], [], [value("c", 8, None)]).SerializeToString())
    assert not graph.initializers
    assert graph.nodes[0].attributes["value"].tolist() == expected
    assert np.array(run(to_model_proto(graph, logical), {})["c"]).tolist() == expected


def test_attributes_keep_their_types_also_when_empty() -> None:
    nodes = [
        helper.make_node("LeakyRelu", ["x"], ["a"], alpha=2.0, name="leaky"),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0]),
        helper.make_node("Einsum", ["b"], ["c"], equation="i->i"),
        helper.make_node("Custom", ["c", ""], ["y"], domain="test", texts=["p", "q"], ratio=[0.5]),
    ]
    nodes[1].attribute.append(helper.make_attribute("empty", [], attr_type=7))
    opsets = [helper.make_opsetid("ai.onnx", 21), helper.make_opsetid("test", 1)]
    model = make(nodes, [value("x")], [value("y")], opset_imports=opsets)
    graph = load_bytes(model.SerializeToString())
    assert graph.opset == {"": 21, "test": 1}
    assert [dict(n.attributes) for n in graph.nodes] == [
        {"alpha": 2.0}, {"perm": (0,), "empty": ()}, {"equation": "i->i"},
        {"texts": ("p", "q"), "ratio": (0.5,)},
    ]  # fmt: skip
    assert graph.nodes[3].inputs == ("c", "")
    assert list(to_model_proto(graph, logical).graph.node) == nodes


def test_bodies_are_graphs_that_see_outer_names_and_hold_their_own_weights(tmp_path: Path) -> None:
    def branch(name: str, sign: str) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], [f"{name}_c"], value=ramp(600))
        node = helper.make_node(sign, ["x", f"{name}_c"], [f"{name}_y"])
        return helper.make_graph([constant, node], name, [], [value(f"{name}_y", shape=None)])

    choose = helper.make_node(
        "If", ["p"], ["y"], then_branch=branch("t", "Add"), else_branch=branch("e", "Sub")
    )
    model = make([choose], [value("x"), value("p", TensorProto.BOOL, [])], [value("y")])
    graph = load(saved(model, tmp_path / "if.onnx"))
    body = graph.nodes[0].attributes["then_branch"]
    assert isinstance(body, Graph)
    assert isinstance(body.initializers["t_c"].source, Path)
    write(graph, tmp_path / "again.onnx", read=logical, external=True)
    x = np.ones(600, np.float32)
    for p, expected in ((True, 1 + np.arange(600)), (False, 1 - np.arange(600))):
        result = run(tmp_path / "again.onnx", {"x": x, "p": np.array(p)})["y"]
        np.testing.assert_array_equal(result, expected)


def test_sequence_types_are_read_and_written() -> None:
    node = helper.make_node("SequenceConstruct", ["x"], ["y"])
    output = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    graph = load_bytes(make([node], [value("x")], [output]).SerializeToString())
    assert graph.outputs == (Value("y", "seq(float32)", None),)
    result = run(to_model_proto(graph, logical), {"x": np.ones(3, np.float32)})["y"]
    np.testing.assert_array_equal(result, [np.ones(3)])


def test_an_empty_list_is_written_with_the_type_of_the_schema() -> None:
    node = Node("ConstantOfShape", ("x",), ("y",), {})
    opset = {"": 21, "ai.onnx.ml": 3}
    empty = Node("LabelEncoder", ("y",), ("z",), {"keys_floats": ()}, domain="ai.onnx.ml")
    graph = Graph((node, empty), (Value("x", "int64", (1,)),), (Value("z", "", None),), {}, opset)
    written = to_model_proto(graph, logical).graph.node[1].attribute[0]
    assert written.type == onnx.AttributeProto.FLOATS


def test_functions_are_inlined_with_their_large_constants(tmp_path: Path) -> None:
    body = [
        helper.make_node("Constant", [], ["c"], value=ramp()),
        helper.make_node("Add", ["a", "c"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Shift", ["a"], ["b"], body, opsets[:1])
    calls = [
        helper.make_node("Shift", ["x"], ["h"], domain="local"),
        helper.make_node("Shift", ["h"], ["y"], domain="local"),
    ]
    model = make(calls, [value("x")], [value("y")], functions=[function], opset_imports=opsets)
    graph = load(saved(model, tmp_path / "f.onnx"))
    assert [n.op_type for n in graph.nodes] == ["Add", "Add"]
    assert all(isinstance(r.source, Path) for r in graph.initializers.values())
    x = np.ones(600, np.float32)
    result = run(to_model_proto(graph, logical), {"x": x})["y"]
    np.testing.assert_array_equal(result, 1 + 2 * np.arange(600))


def test_initializers_that_are_inputs_too_are_no_inputs() -> None:
    model = adding(ramp(), ir_version=3)
    model.graph.input.append(value("w", shape=[600]))
    graph = load_bytes(model.SerializeToString())
    assert [v.name for v in graph.inputs] == ["x"]
    assert "w" in graph.initializers


def test_metadata_survives_a_round_trip() -> None:
    graph = load_bytes(adding(ramp()).SerializeToString())
    metadata = {"architecture": "llama", "context_length": 2048, "eos_token_ids": [2, 7]}
    model = to_model_proto(graph.with_(metadata=metadata), logical)
    assert load_bytes(model.SerializeToString()).metadata == metadata


# --- Writing


def test_transposed_weights_are_written_in_their_logical_layout() -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    ref = WeightRef("w", (3, 2), "float32", data, nbytes=24, transposed=True)
    node = Node("MatMul", ("x", "w"), ("y",))
    inputs, outputs = Value("x", "float32", ("n", 3)), Value("y", "float32", ("n", 2))
    graph = Graph((node,), (inputs,), (outputs,), {"w": ref}, {"": 21})
    x = np.eye(3, dtype=np.float32)
    result = run(to_model_proto(graph, logical), {"x": x})["y"]
    np.testing.assert_array_equal(result, np.arange(6).reshape(2, 3).T)


def weighing(ref: WeightRef) -> Graph:
    return Graph((), (), (Value("w", ref.dtype, ref.shape),), {"w": ref}, {"": 21})


def test_more_than_protobuf_holds_must_be_external() -> None:
    graph = weighing(WeightRef("w", (2**30,), "float32", b"", encoding="q4_0"))
    assert "external=True" in refusal(lambda: to_model_proto(graph, logical), UsageError)


@pytest.mark.parametrize("external", [False, True])
def test_a_failed_write_leaves_the_old_files_alone(external: bool, tmp_path: Path) -> None:
    graph = weighing(WeightRef("w", (600,), "float32", bytes(2400), nbytes=2400))
    write(graph, tmp_path / "m.onnx", read=logical, external=external)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    wrong = lambda ref: np.zeros(3, np.float32)  # noqa: E731
    message = refusal(lambda: write(graph, tmp_path / "m.onnx", read=wrong, external=external))
    assert "'w' was read as float32 (3,)" in message
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
