"""Operators that move and pick data, in all their versions, and weights as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest

from onnxstream_nb import registry
from onnxstream_nb.errors import ShapeError, UnsupportedError
from onnxstream_nb.graph import ENCODINGS, WeightRef
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.session import Session
from onnxstream_nb.weights import DiskProvider, Weight, encoded_bytes

Array = np.ndarray[Any, Any]


def call(op_type: str, *inputs: Any, opset: int = 23, domain: str = "", **attributes: Any) -> Any:
    operator = registry.lookup(op_type, domain, opset)
    assert operator is not None
    return operator.function(*inputs, **attributes)


def values(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- every version against onnxruntime ---------------------------------------------------------

I = np.int64  # noqa: E741
X = values(3, 4, 5)
HALF = X.astype(np.float16)

CASES: tuple[tuple[str, int, tuple[Any, ...], dict[str, Any], int], ...] = (
    # operator, opset, inputs, attributes, number of outputs
    ("ArgMax", 11, (X,), {"axis": 1}, 1),
    ("ArgMin", 12, (np.array([[1, 0, 0, 2]], np.int32),), {"axis": 1, "select_last_index": 1}, 1),
    ("Clip", 6, (X,), {"min": -0.5, "max": 0.25}, 1),
    ("Clip", 13, (X, None, np.array(0.5, np.float32)), {}, 1),
    ("Compress", 11, (X, np.array([True, False, True])), {"axis": 1}, 1),
    ("Concat", 4, (X, X[:, :1]), {"axis": 1}, 1),
    ("CumSum", 14, (X, np.array(1, I)), {"exclusive": 1, "reverse": 1}, 1),
    ("DepthToSpace", 13, (values(1, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}, 1),
    ("Dropout", 7, (X,), {"ratio": 0.3}, 1),
    ("Dropout", 13, (X,), {}, 2),
    ("Einsum", 12, (X, X), {"equation": "bij, bkj -> bik"}, 1),
    ("Expand", 13, (X[:, :1], np.array([2, 1, 4, 1], I)), {}, 1),
    ("EyeLike", 9, (X[0],), {"k": -1, "dtype": 7}, 1),
    ("Flatten", 13, (X,), {"axis": -1}, 1),
    ("Flatten", 9, (X[:0],), {"axis": 2}, 1),
    ("Gather", 13, (X, np.array([[-1, 0], [2, -4]], I)), {"axis": 1}, 1),
    ("Gather", 13, (X, np.array(-5, np.int32)), {"axis": -1}, 1),
    ("GatherElements", 13, (X, np.array([[[0, -1]], [[3, 1]]], I)), {"axis": 1}, 1),
    ("GatherND", 12, (X, np.array([[1], [-1], [0]], I)), {"batch_dims": 1}, 1),
    ("LogSoftmax", 11, (X,), {}, 1),
    ("Mod", 13, (X, np.array([[0.3]], np.float32)), {"fmod": 1}, 1),
    ("NonZero", 13, (np.array([[1, 0], [2, 3]], I),), {}, 1),
    ("OneHot", 11, (np.array([1, -1, 7], I), np.array(4, I), np.array([2, 5], I)), {"axis": 0}, 1),
    ("Pad", 10, (X,), {"pads": (0, 1, -1, 0, 0, 2), "value": 1.5}, 1),
    ("Pad", 13, (X, np.array([0, 2, 1, 1, 0, 2], I)), {"mode": "reflect"}, 1),
    ("Pad", 18, (X, np.array([1, 1], I), None, np.array([-1], I)), {"mode": "edge"}, 1),
    ("Range", 11, tuple(np.array(v, np.float32) for v in (5, -1, -1.5)), {}, 1),
    ("ReduceLogSum", 13, (abs(X),), {"axes": (1, 2), "keepdims": 0}, 1),
    ("ReduceMean", 13, (X,), {"axes": (-1,)}, 1),
    ("ReduceMean", 18, (HALF, np.array([0], I)), {}, 1),
    ("ReduceProd", 11, (X,), {}, 1),
    ("ReduceSum", 13, (X, np.array([], I)), {"noop_with_empty_axes": 1}, 1),
    ("Reshape", 13, (X, np.array([0, -1, 2], I)), {}, 1),
    ("Reshape", 14, (X[:0], np.array([4, 0], I)), {"allowzero": 1}, 1),
    ("ReverseSequence", 10, (X, np.array([1, 2, 3, 0], I)), {}, 1),
    ("ScatterElements", 18, (X, np.array([[[0]], [[0]]], I), X[:2, :1, :1]),
     {"reduction": "max"}, 1),
    ("ScatterND", 16, (X, np.array([[0], [0]], I), X[:2]), {"reduction": "add"}, 1),
    ("Shape", 15, (X,), {"start": -2, "end": 9}, 1),
    ("Slice", 9, (X,), {"starts": (1, -3), "ends": (9, -1), "axes": (0, 2)}, 1),
    ("Softmax", 12, (X,), {"axis": 0}, 1),
    ("SpaceToDepth", 13, (values(1, 2, 4, 6),), {"blocksize": 2}, 1),
    ("Split", 11, (X,), {"axis": 1, "split": (1, 3)}, 2),
    ("Split", 13, (X, np.array([2, 0, 3], I)), {"axis": -1}, 3),
    ("Split", 13, (X,), {"axis": 1}, 2),
    ("Split", 18, (X,), {"axis": 2, "num_outputs": 3}, 3),
    ("Squeeze", 11, (X[:, :1],), {"axes": (-2,)}, 1),
    ("Squeeze", 13, (X[:1, :, :1],), {}, 1),
    ("Sum", 8, (X, X[0], X[:, :1]), {}, 1),
    ("Tile", 13, (X, np.array([1, 2, 3], I)), {}, 1),
    ("TopK", 9, (X,), {"k": 2, "axis": 1}, 2),
    ("TopK", 11, (X, np.array([3], I)), {"largest": 0}, 2),
    ("Transpose", 13, (X,), {}, 1),
    ("Trilu", 14, (X, np.array(-1, I)), {"upper": 0}, 1),
    ("Unsqueeze", 11, (X,), {"axes": (0, -1)}, 1),
    ("Unsqueeze", 13, (X, np.array([-2, 0], I)), {}, 1),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_versions_against_onnxruntime(case: tuple[Any, ...]) -> None:
    import onnxruntime
    from onnx import helper

    op_type, opset, inputs, attributes, count = case
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    outputs = [f"y{i}" for i in range(count)]
    feeds = {n: x for n, x in zip(names, inputs, strict=True) if n}
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in feeds.items()
    ]
    node = helper.make_node(op_type, names, outputs, **attributes)
    graph = helper.make_graph(
        [node], "g", infos, [helper.make_empty_tensor_value_info(o) for o in outputs]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    want = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    with Session(model, threads=1) as session:
        got = session.run(feeds)
    for name, expected in zip(outputs, want, strict=True):
        assert got[name].dtype == expected.dtype and got[name].shape == expected.shape
        np.testing.assert_allclose(
            got[name], expected, 1e-5 if op_type != "ReduceMean" else 1e-3, 1e-6
        )


@pytest.mark.parametrize("step", (1, 2, -1, -3))
def test_slice_takes_what_the_standard_says(step: int) -> None:
    x = np.arange(5)
    bounds = (-(2**63), -7, -5, -2, -1, 0, 2, 4, 5, 9, 2**63 - 1)
    for start in bounds:
        for end in bounds:
            got = call("Slice", x, *(np.array([v], I) for v in (start, end, 0, step)))
            assert got.tolist() == naive.slice_indices(5, start, end, step), (start, end)


@pytest.mark.parametrize("largest", (0, 1))
def test_top_k_prefers_the_first_of_equals(largest: int) -> None:
    x = np.random.default_rng(1).integers(0, 6, (3, 50)).astype(np.float32)
    got, indices = call("TopK", x, np.array([7], I), largest=largest)
    for row, g, i in zip(x.tolist(), got.tolist(), indices.tolist(), strict=True):
        assert (g, i) == naive.top_k(row, 7, bool(largest))


def test_misfits_are_errors_that_name_shapes_and_sizes() -> None:
    x = np.zeros((3, 4))
    for pattern, run in (
        (r"\(3, 4\) cannot become \(5, -1\)", lambda: call("Reshape", x, np.array([5, -1]))),
        (r"\(3, 4\), \(2, 5\) do not fit", lambda: call("Concat", x, np.zeros((2, 5)), axis=0)),
        (r"\(3, 4\) does not broadcast to \(2, 4\)", lambda: call("Expand", x, np.array([2, 4]))),
        (r"sizes \(1, 1\) .* 4 of axis 1",
         lambda: call("Split", x, np.array([1, 1]), axis=1, n_outputs=2)),
        (r"index 3 .* axis 0 of size 3", lambda: call("Gather", x, np.array([0, 3]))),
        (r"index -5 .* axis 1 of size 4", lambda: call("GatherND", x, np.array([[0, -5]]))),
        (r"k is 5, .* 4 elements", lambda: call("TopK", x, np.array([5]))),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=pattern):
            run()
    with pytest.raises(UnsupportedError, match="training_mode"):
        call("Dropout", x, None, np.array(True), n_outputs=1)


# -- quantised tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ("int4", "uint4", "int8", "uint16"))
def test_blocked_quantisation_there_and_back(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    info = ml_dtypes.iinfo(kind)
    x, block = values(6, 10), 4
    steps = int(info.max) - int(info.min)
    scale = np.full((6, 3), 8 / steps, np.float32) * (1 + np.arange(3, dtype=np.float32))
    zero = np.full((6, 3), (int(info.max) + int(info.min)) // 2).astype(kind)
    q = call("QuantizeLinear", x, scale, zero, axis=1, block_size=block)
    assert q.dtype == kind
    y = call("DequantizeLinear", q, scale, zero, axis=1, block_size=block)
    spread = np.repeat(scale, block, 1)[:, :10]
    for got, integer, s, exact in zip(y.flat, q.flat, spread.flat, x.flat, strict=True):
        assert got == np.float32(int(integer) - int(zero[0, 0])) * s
        assert abs(got - exact) <= s / 2 * 1.0001


def test_dequantisation_by_axis_and_type() -> None:
    q = np.arange(6, dtype=np.int8).reshape(2, 3)
    got = call(
        "DequantizeLinear", q, np.array([1, 0.5, 2], np.float16), np.array([1, 0, 0], np.int8)
    )
    assert got.dtype == np.float16 and got.tolist() == [[-1, 0.5, 4], [2, 2, 10]]


# -- weights -----------------------------------------------------------------------------------


def stored(encoding: str, shape: tuple[int, int], seed: int = 0) -> tuple[Weight, Array]:
    """A random weight of that encoding, and its values by the gguf package or by NumPy."""
    random = np.random.default_rng(seed)
    ref = WeightRef("w", shape, "float32", b"", encoding=encoding, scale=0.5, zero_point=3)
    data = random.integers(0, 256, encoded_bytes(ref), np.uint8)
    if ENCODINGS[encoding].block > 1:
        blocks = data.reshape(-1, ENCODINGS[encoding].nbytes)
        where = {"q6_k": [208], "q4_k": [0, 2], "q5_k": [0, 2], "q4_1": [0, 2]}.get(encoding, [0])
        for at in where:
            scales = random.standard_normal(len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    elif encoding != "uint8":
        data = np.ascontiguousarray(bits_of(values(*shape, seed=seed), encoding))
    ref = replace(ref, source=data.tobytes(), nbytes=data.nbytes)
    return DiskProvider().get(ref), decoded(data, encoding, shape)


def bits_of(x: Array, encoding: str) -> Array:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, encoding, encoding))
    return x.astype(kind).reshape(-1).view(np.uint8)


def decoded(data: Array, encoding: str, shape: tuple[int, int]) -> Array:
    import gguf
    import ml_dtypes

    if encoding == "uint8":
        return ((data.astype(np.float32) - 3) * np.float32(0.5)).reshape(shape)
    if ENCODINGS[encoding].block == 1:
        kind = np.dtype(getattr(ml_dtypes, encoding, encoding))
        return data.view(kind).astype(np.float32).reshape(shape)
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    result: Array = gguf.quants.dequantize(data, kind).reshape(shape)
    return result


@pytest.fixture(params=(1, 2, 5), ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    set_threads(request.param)
    yield
    set_threads(1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decoding_and_lookup_of_each_encoding(encoding: str, threads: None) -> None:
    """Exactly the gguf package's values: whole, transposed, and by rows."""
    shape = (7, 512 if ENCODINGS[encoding].block > 1 else 45)
    weight, want = stored(encoding, shape)
    whole = call("Decode", weight, domain="onnxstream_nb", opset=1)
    assert whole.dtype == np.float32 and np.array_equal(whole, want)
    turned = call("Decode", weight.T, domain="onnxstream_nb", opset=1)
    assert turned.shape == shape[::-1] and np.array_equal(turned, want.T)
    for indices in (np.array([[3, -1], [0, -7]], I), np.array(2, np.int32), np.zeros((0,), I)):
        got = call("Gather", weight, indices)
        assert got.shape == (*indices.shape, shape[1]) and np.array_equal(got, want[indices])
    assert np.array_equal(call("Gather", weight, np.array([4]), axis=1), want[:, [4]])
    assert np.array_equal(call("Gather", weight.T, np.array([4])), want.T[[4]])


def test_plain_weights_are_views() -> None:
    x = values(4, 6)
    for kind in ("float32", "float16", "int64"):
        data = x.astype(kind)
        ref = WeightRef("w", (4, 6), kind, data.tobytes(), nbytes=data.nbytes)
        weight = DiskProvider().get(ref)
        whole = call("Decode", weight, domain="onnxstream_nb", opset=1)
        assert whole.dtype == data.dtype and np.array_equal(whole, data)
        assert np.shares_memory(whole, weight.buffer)
        assert call("Gather", weight, np.array([-1])).tolist() == data[[-1]].tolist()


def test_lookup_beyond_the_table_names_index_and_size() -> None:
    weight, _ = stored("q8_0", (7, 64))
    for index in (7, -8):
        with pytest.raises(ShapeError, match=f"index {index} .* axis 0 of size 7"):
            call("Gather", weight, np.array([0, index]))


def test_one_dimensional_and_empty_weights() -> None:
    weight, want = stored("float16", (1, 19))
    flat = Weight(replace(weight.ref, shape=(19,)), weight.buffer)
    assert call("Decode", flat, domain="onnxstream_nb", opset=1).tolist() == want[0].tolist()
    empty = Weight(
        WeightRef("w", (0, 19), "float32", b"", encoding="float16"), np.zeros(0, np.uint8)
    )
    assert call("Decode", empty, domain="onnxstream_nb", opset=1).shape == (0, 19)
