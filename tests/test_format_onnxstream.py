"""formats/onnxstream.py against onnxruntime, PyTorch's reference logits and written-out rules."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weight_bytes import logical

from onnxstream_nb.errors import ModelError, OnnxstreamError, UnsupportedError
from onnxstream_nb.formats import load
from onnxstream_nb.formats.onnx import to_model_proto
from onnxstream_nb.formats.onnxstream import escape, unescape
from onnxstream_nb.graph import Graph, Value

LLAMA = Path(__file__).parent / "fixtures" / "models" / "onnxstream_llama_small"


def run(graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Any]:
    model = to_model_proto(graph, logical)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model folder: its lines, and its weights by file name."""

    def write(*lines: str, **weights: Any) -> Path:
        (tmp_path / "model.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
        for name, array in weights.items():
            (tmp_path / f"{name}.bin").write_bytes(np.asarray(array).tobytes())
        return tmp_path

    return write


def refusal(path: Path, kind: type[OnnxstreamError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load(path)
    return str(caught.value)


# --- A language model


def llama_feeds(ids: list[int], past: list[Any]) -> dict[str, Any]:
    before = past[0].shape[2]
    return {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, before + len(ids)), np.int64),
        "position_ids": np.arange(before, before + len(ids))[None],
        **{f"pkv{i}": p for i, p in enumerate(past)},
    }


@pytest.mark.parametrize("chunks", [[6], [1, 1, 1, 1, 1, 1], [2, 4]])
def test_llama_reaches_its_reference_logits(chunks: list[int]) -> None:
    graph, ids = load(LLAMA), [1, 5, 9, 200, 33, 7]
    past = [np.zeros((1, 2, 0, 16), np.float32)] * 4
    logits = []
    for size in chunks:
        results = run(graph, llama_feeds(ids[:size], past))
        ids, past = ids[size:], [results[f"opkv{i}"] for i in range(4)]
        logits.append(results["logits"][0])
    reference = np.fromfile(LLAMA / "reference_logits.f32", np.float32).reshape(6, 1000)
    np.testing.assert_allclose(np.concatenate(logits), reference, rtol=0, atol=1e-5)


def test_llama_inputs_and_outputs_are_told_from_the_text() -> None:
    graph = load(LLAMA)
    kv = tuple(Value(f"pkv{i}", "float32", (1, 2, "past", 16)) for i in range(4))
    assert sorted(graph.inputs, key=lambda v: v.name) == [
        Value("attention_mask", "int64", (1, "total")),
        Value("input_ids", "int64", (1, "sequence")),
        *kv,
        Value("position_ids", "int64", (1, "sequence")),
    ]
    assert graph.outputs == (
        Value("logits", "float32", (1, "sequence", 1000)),
        *(Value(f"opkv{i}", "float32", (1, 2, "total", 16)) for i in range(4)),
    )
    assert graph.opset == {"": 14}
    assert graph.metadata == {"vocab_size": 1000}
    embedding = graph.initializers["model.model.embed_tokens.weight"]
    assert embedding.source == LLAMA / "model_2E_model_2E_embed_5F_tokens_2E_weight.bin"
    assert (embedding.shape, embedding.nbytes) == ((1000, 64), 256000)


# --- Names


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_names_survive_escaping(name: str) -> None:
    escaped = escape(name)
    assert set(escaped) <= set(string.ascii_letters + string.digits + "_")
    assert unescape(escaped) == name


def test_escaping_is_onnxstreams() -> None:
    assert escape("/model.0/a_b:é") == "_2F_model_2E_0_2F_a_5F_b_3A__E9_"
    assert unescape("plain_name_") == "plain_name_"


@pytest.mark.parametrize("bad", ["_110000_", "_D800_", "_FFFFFFFFFFFFFFFFFFFF_"])
def test_codes_that_are_no_characters(bad: str, folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError):
        unescape(bad)
    assert "not a name" in refusal(folder(f"n:Relu*input:x(2)*output:{bad}(2)"))


# --- Weights


@pytest.mark.parametrize(
    ("kind", "array", "expected"),
    [
        ("float32:3", np.array([1, 2.5, -3], "<f4"), [1, 2.5, -3]),
        ("float16:3", np.array([1, 2.5, -3], "<f2"), [1, 2.5, -3]),
        ("uint8[0.5,2]:3", np.array([0, 2, 255], "u1"), [-1, 0, 126.5]),
        ("uint8[0,0]:1", np.array([1], "u1"), [0]),
        ("float32:", np.array(7, "<f4"), 7),
        ("float16:1,3", np.array([[1, 2, 3]], "<f2"), [[1, 2, 3]]),
    ],
)
def test_weights_of_every_type(
    kind: str, array: Any, expected: Any, folder: Callable[..., Path]
) -> None:
    graph = load(folder(f"n:Add*input:x(1,3);w.bin({kind})*output:y(1,3)", w=array))
    ref = graph.initializers["w"]
    assert ref.dtype == "float32"
    assert ref.encoding == {"float32": "raw"}.get(str(array.dtype), str(array.dtype))
    result = run(graph, {"x": np.zeros((1, 3), np.float32)})["y"]
    np.testing.assert_array_equal(result, np.broadcast_to(expected, result.shape))


def test_int64_weights_and_shared_ones(folder: Callable[..., Path]) -> None:
    lines = (
        "a:Unsqueeze*input:x(2);_5F_w.bin(int64:1)*output:h(1,2)",
        "b:Squeeze*input:h(1,2);_5F_w.bin(int64:1)*output:y(2)",
    )
    graph = load(folder(*lines, _5F_w=np.array([0])))
    assert list(graph.initializers) == ["_w"]
    assert graph.initializers["_w"].dtype == "int64"
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], x)


CONV = (
    "c:Conv*input:x(1,3,5,5);w_nchw.bin(float32:4,3,2,2);b.bin(float32:4)*output:y(1,4,4,4)"
    "*dilations:1,1;group:1;kernel_shape:2,2;pads:0,0,0,0;strides:1,1"
)


@pytest.mark.parametrize("kept", ["nchw", "nhwc", "both"])
def test_convolution_weights_in_either_layout(kept: str, folder: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 2, 2), np.float32)
    files = {"w_nchw": weight, "w_nhwc": weight.transpose(0, 2, 3, 1).copy()}
    graph = load(
        folder(CONV, b=np.zeros(4, np.float32), **{k: v for k, v in files.items()
                                                   if kept in (k[2:], "both")})
    )  # fmt: skip
    assert [n.op_type for n in graph.nodes] == ["Transpose"] * (kept == "nhwc") + ["Conv"]
    x = rng.standard_normal((1, 3, 5, 5), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (2, 2), axis=(1, 2))
    expected = np.einsum("cyxkl,ockl->oyx", windows, weight)[None]
    np.testing.assert_allclose(run(graph, {"x": x})["y"], expected, atol=1e-5)


@pytest.mark.parametrize(("kept", "axes"), [("nchw", (0, 1, 2)), ("nhwc", (0, 2, 1))])
def test_one_dimensional_convolutions_lose_the_trailing_one(
    kept: str, axes: tuple[int, ...], folder: Callable[..., Path]
) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    line = "c:Conv*input:x(1,2,3);w_nchw.bin(float32:2,2,3,1)*output:y(1,2,1)*kernel_shape:3"
    graph = load(folder(line, **{f"w_{kept}": weight.transpose(axes).copy()}))
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    expected = np.einsum("ncl,ocl->no", x, weight)[..., None]
    np.testing.assert_array_equal(run(graph, {"x": x})["y"], expected)


@pytest.mark.parametrize(
    ("kind", "array"),
    [("float32", np.array([-1, 3], "<f4")), ("float16", np.array([-1, 3], "<f2"))],
)
def test_integers_that_the_converter_stored_as_floats(
    kind: str, array: Any, folder: Callable[..., Path]
) -> None:
    lines = (
        "s:Shape*input:x(0,0)*output:h(2)",
        f"m:Mul*input:h(2);w.bin({kind}:2)*output:y(2)",
    )
    graph = load(folder(*lines, w=array))
    result = run(graph, {"x": np.zeros((5, 7), np.float32)})["y"]
    assert result.tolist() == [-5, 21]
    folder(*lines, w=array + array.dtype.type(0.5))
    assert "'w' multiplies integers by fractions" in refusal(folder(*lines))


# --- Attributes and types


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Softmax*input:x(2)*output:y(2)*axis:-1", {"axis": -1}),
        ("Elu*input:x(2)*output:y(2)*alpha:2", {"alpha": 2.0}),
        ("Elu*input:x(2)*output:y(2)*alpha:1e-05", {"alpha": 1e-05}),
        ("Transpose*input:x(2,1)*output:y(1,2)*perm:1,0", {"perm": (1, 0)}),
        ("ReduceMean*input:x(2)*output:y()*axes:;keepdims:0", {"axes": (), "keepdims": 0}),
        ("Einsum*input:x(2)*output:y(2)*equation:i->i", {"equation": "i->i"}),
        ("Relu*input:x(2)*output:y(2)", {}),
    ],
)
def test_attributes_have_the_types_of_the_schema(
    line: str, expected: Any, folder: Callable[..., Path]
) -> None:
    attributes = load(folder(f"n:{line}")).nodes[0].attributes
    assert attributes == expected
    assert [type(v) for v in attributes.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("1", "int64"), ("-3", "int64"), ("0.0", "float32"), ("-3.4028234663852886e+38", "float32"),
     ("1e+20", "float32"), ("inf", "float32"), ("True", "bool"), ("False", "bool")],
)  # fmt: skip
def test_a_tensor_attribute_has_one_element(
    text: str, dtype: str, folder: Callable[..., Path]
) -> None:
    line = f"n:ConstantOfShape*input:s.bin(int64:1)*output:y(2)*value:{text}"
    graph = load(folder(line, s=np.array([2])))
    array = graph.nodes[0].attributes["value"]
    assert (array.dtype, array.shape) == (dtype, (1,))
    assert graph.outputs[0].dtype == dtype
    assert run(graph, {})["y"].tolist() == [{"True": True, "False": False}.get(text, array[0])] * 2


@pytest.mark.parametrize(
    ("lines", "inputs", "output"),
    [
        (["Relu*input:a(2)*output:y(2)"], {"a": "float32"}, "float32"),
        (["Add*input:a(2);w.bin(int64:2)*output:y(2)"], {"a": "int64"}, "int64"),
        (["Gather*input:w.bin(float32:4);a(2)*output:y(2)"], {"a": "int64"}, "float32"),
        (["Cast*input:a(2)*output:y(2)*to:9"], {"a": "float32"}, "bool"),
        (["Cast*input:some_5F_mask(2)*output:y(2)*to:1"], {"some_mask": "int64"}, "float32"),
        (["Mul*input:a(2);w.bin(float32:2)*output:y(2)"], {"a": "float32"}, "float32"),
        (
            [
                "Reshape*input:onnx_3A__3A_Reshape_5F_0(1,2);w.bin(int64:1)*output:h(2)",
                "Gather*input:x(3);h(2)*output:i(2)",
                "Where*input:b(2);i(2);i(2)*output:y(2)",
            ],
            {"onnx::Reshape_0": "int64", "x": "float32", "b": "bool"},
            "float32",
        ),
    ],
)
def test_element_types_follow_from_use(
    lines: list[str], inputs: Any, output: str, folder: Callable[..., Path]
) -> None:
    size = {"float32:4": 16, "int64:2": 16, "int64:1": 8, "float32:2": 8}
    declared = next((k for k in size if f"({k})" in lines[0]), "float32:4")
    graph = load(folder(*(f"n:{line}" for line in lines), w=np.zeros(size[declared], "u1")))
    assert {v.name: v.dtype for v in graph.inputs} == inputs
    assert graph.outputs[-1].dtype == output


def test_omitted_inputs_odd_names_and_line_ends(folder: Callable[..., Path]) -> None:
    path = folder("")
    (path / "model.txt").write_bytes(
        b"\r\n:Clip*input:x(0,3);;m.bin(float32:)*output:h(0,3)\r\n\r\n"
        b"a:b::Relu*input:h(0,3)*output:y(0,3)\r"
    )
    (path / "m.bin").write_bytes(np.float32(1.5).tobytes())
    graph = load(path / "model.txt")
    assert [(n.name, n.op_type) for n in graph.nodes] == [("", "Clip"), ("a:b:", "Relu")]
    assert graph.nodes[0].inputs == ("x", "", "m")
    assert graph.inputs == (Value("x", "float32", ("x_0", 3)),)
    x = np.array([[-1, 1, 2]], np.float32)
    assert run(graph, {"x": x})["y"].tolist() == [[0, 1, 1.5]]


# --- Bad input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("n:Relu", "not of the form NAME:TYPE"),
        ("n:Relu*output:y(2)*input:x(2)", "not of the form NAME:TYPE"),
        ("n:Relu*input:x(2)*output:y(2)*a:1*b:2", "not of the form NAME:TYPE"),
        ("n:Relu*input:x*output:y(2)", "'x' is not of the form name(dims)"),
        ("n:Relu*input:(2)*output:y(2)", "'(2)' is not of the form"),
        ("n:Relu*input:x(-1)*output:y(2)", "(-1) are no dimensions"),
        ("n:Relu*input:x(2)*output:", "cannot have the outputs"),
        ("n:Relu*input:x(2)*output:w.bin(float32:2)", "cannot have the outputs"),
        ("n:Relu*input:x(2)*output:y(2);z(2)", "cannot have the outputs"),
        ("n:Relu*input:x(2);z(2)*output:y(2)", "does not take 2 inputs"),
        ("n:Relu*input:*output:y(2)", "does not take 0 inputs"),
        ("n:Softmax*input:x(2)*output:y(2)*axis:one", "attribute 'axis:one' is not INT"),
        ("n:Relu*input:z(2)*output:h(2)", "'h' is computed a second time"),
        ("n:Relu*input:y(2)*output:x(2)", "'x' is used by a line before"),
        ("n:Relu*input:w.bin(float64:2)*output:y(2)", "its type float32, float16, int64 or"),
        ("n:Relu*input:w(float32:2)*output:y(2)", "a weight is file.bin(type:dims)"),
        ("n:Relu*input:w.bin(uint8[x,1]:8)*output:y(2)", "uint8[x,1]"),
        ("n:Relu*input:w.bin(uint8[1,256]:8)*output:y(2)", "out of range"),
        ("n:Relu*input:w.bin(uint8[nan,1]:8)*output:y(2)", "out of range"),
        ("n:Relu*input:w.bin(float32:3)*output:y(3)", "has 8 bytes, but float32 [3] needs 12"),
        ("n:Relu*input:none.bin(float32:2)*output:y(2)", "'none.bin' is missing"),
        ("n:Relu*input:../w.bin(float32:2)*output:y(2)", "outside the model's folder"),
        ("n:Relu*input:/etc/w.bin(float32:2)*output:y(2)", "outside the model's folder"),
        ("n:Add*input:w.bin(float32:2);w.bin(float16:4)*output:y(2)", "declared differently"),
    ],
)
def test_errors_name_the_line(line: str, says: str, folder: Callable[..., Path]) -> None:
    path = folder("first:Relu*input:x(2)*output:h(2)", "", line, w=np.zeros(2, np.float32))
    message = refusal(path)
    assert message.startswith(f"{path / 'model.txt'}:3: ")
    assert says in message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("n:Frobnicate*input:x(2)*output:y(2)", "'Frobnicate' is no ONNX operator of opset 14"),
        ("n:ReduceMean*input:x(2)*output:y(2)*noop:1", "ReduceMean has no attribute 'noop'"),
        ("n:If*input:x()*output:y(2)*then_branch:1", "attribute 'then_branch' is GRAPH"),
    ],
)
def test_what_opset_14_does_not_have(line: str, says: str, folder: Callable[..., Path]) -> None:
    message = refusal(folder(line), UnsupportedError)
    assert "model.txt:1: " in message and says in message


def test_links_out_of_the_folder_are_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder("n:Relu*input:w.bin(float32:2)*output:y(2)", secret=np.zeros(2, np.float32))
    inner = path / "inner"
    inner.mkdir()
    (path / "model.txt").rename(inner / "model.txt")
    (inner / "w.bin").symlink_to("../secret.bin")
    assert "outside the model's folder" in refusal(inner)


def test_files_that_are_no_text(folder: Callable[..., Path]) -> None:
    path = folder("")
    (path / "model.txt").write_bytes(b"\n \n")
    assert "empty" in refusal(path)
    (path / "model.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(path)
