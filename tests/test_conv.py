"""Convolutions and pools of floats and of integers, against onnxruntime and onnx's reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import make, run, value

from onnxstream_nb.errors import OnnxstreamError, ShapeError, UnsupportedError
from onnxstream_nb.kernels import conv as conv_kernels
from onnxstream_nb.session import Session

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

Array = np.ndarray[Any, Any]

GEOMETRIES: list[tuple[tuple[int, ...], int, tuple[int, ...], int, dict[str, Any]]] = [
    ((2, 3, 9, 8), 5, (3, 3), 1, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ((1, 6, 11, 7), 4, (3, 2), 2, {"pads": [2, 0, 1, 1], "dilations": [2, 1]}),
    ((1, 6, 8, 8), 12, (3, 3), 6, {"pads": [1, 1, 1, 1]}),
    ((2, 4, 13), 4, (5,), 1, {"auto_pad": "SAME_UPPER", "strides": [3]}),
    ((1, 2, 5, 6, 7), 3, (2, 3, 1), 1, {"strides": [1, 2, 3]}),
    ((2, 8, 5, 5), 16, (1, 1), 1, {}),
]


def initializers(*arrays: Array) -> list[Any]:
    return [numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(arrays)]


def one(op_type: str, inputs: list[str], arrays: list[Array], feeds: Any, **attributes: Any) -> Any:
    """A model of one node: x and what else is fed, and constants w0, w1, ..."""
    dtypes = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in feeds.items()}
    declared = [value(n, dtypes[n], a.shape) for n, a in feeds.items()]
    kind = {"ConvInteger": TensorProto.INT32, "MatMulInteger": TensorProto.INT32}
    node = helper.make_node(op_type, inputs, ["y"], **attributes)
    out = kind.get(op_type, dtypes["x"])
    return make([node], declared, [value("y", out, None)], initializers(*arrays))


def ours(model: Any, feeds: Any) -> Array:
    with Session(model, threads=1) as session:
        result: Array = session.run(feeds)["y"]
    return result


@pytest.mark.parametrize("pieces", [1 << 22, 64])
@pytest.mark.parametrize("shape, m, kernel, group, attributes", GEOMETRIES)
def test_convolutions_are_onnxruntimes(
    shape: Any, m: int, kernel: Any, group: int, attributes: Any, pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(conv_kernels, "PIECE", pieces)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype("f4") for s in (shape, (m, shape[1] // group, *kernel)))
    b = rng.standard_normal(m).astype("f4")
    model = one("Conv", ["x", "w0", "w1"], [w, b], {"x": x}, group=group, **attributes)
    wanted = run(model, {"x": x})["y"]
    np.testing.assert_allclose(ours(model, {"x": x}), wanted, 1e-5, 1e-5)


@pytest.mark.parametrize("shape, m, kernel, group, attributes", GEOMETRIES)
def test_integer_convolutions_are_exact(
    shape: Any, m: int, kernel: Any, group: int, attributes: Any
) -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, shape, np.uint8)
    w = rng.integers(0, 256, (m, shape[1] // group, *kernel), np.uint8)
    zeros = [np.array(137, np.uint8), np.array(120, np.uint8)]
    names = ["x", "w0", "w1", "w2"]
    model = one("ConvInteger", names, [w, *zeros], {"x": x}, group=group, **attributes)
    floats = [a.astype("f4") - z for a, z in zip((x, w), zeros, strict=True)]
    plain = one("Conv", ["x", "w0"], [floats[1]], {"x": floats[0]}, group=group, **attributes)
    wanted = run(plain, {"x": floats[0]})["y"]  # exact: sums stay below 2 ** 24
    np.testing.assert_array_equal(ours(model, {"x": x}), wanted)


@pytest.mark.parametrize("k", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtypes", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")])
def test_sums_of_the_largest_products_are_exact(k: int, dtypes: Any) -> None:
    def extreme(dtype: str, shape: Any, seed: int) -> tuple[Array, Array]:
        bounds = np.iinfo(dtype)
        q = np.full(shape, bounds.max if seed else bounds.min, dtype)
        q[..., ::7] = bounds.min
        return q, np.array(bounds.min if seed else bounds.max, dtype)

    (a, a_zero), (b, b_zero) = extreme(dtypes[0], (3, k), 1), extreme(dtypes[1], (k, 17), 1)
    names = ["x", "w0", "w1", "w2"]
    model = one("MatMulInteger", names, [b, a_zero, b_zero], {"x": a})
    wanted = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)
    assert np.abs(wanted).max() >= 255 * 255 * (k // 2)
    np.testing.assert_array_equal(ours(model, {"x": a}), wanted)


def test_rows_and_columns_have_zero_points_of_their_own() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 256, (2, 4, 6), np.uint8), rng.integers(-128, 128, (6, 5)).astype("i1")
    zeros = [np.array(9, np.uint8), rng.integers(-128, 128, 5).astype("i1")]
    model = one("MatMulInteger", ["x", "w0", "w1", "w2"], [b, *zeros], {"x": a})
    wanted = (a.astype(int) - zeros[0]) @ (b.astype(int) - zeros[1])
    np.testing.assert_array_equal(ours(model, {"x": a}), wanted)


def test_qlinear_operators_are_within_a_step_of_the_reference() -> None:
    rng = np.random.default_rng(3)
    x, w = rng.integers(0, 256, (1, 3, 7, 7), np.uint8), rng.integers(0, 256, (4, 3, 3, 3), "u1")
    scales = [np.float32(0.02), np.uint8(100), w, np.float32(0.01), np.uint8(128)]
    scales += [np.float32(0.11), np.uint8(110), rng.integers(-999, 999, 4).astype(np.int32)]
    arrays = [np.asarray(a) for a in scales]
    model = one("QLinearConv", ["x", *(f"w{i}" for i in range(8))], arrays, {"x": x})
    wanted = ReferenceEvaluator(model).run(None, {"x": x})[0]
    found = ours(model, {"x": x})
    assert found.dtype == np.uint8 and np.ptp(wanted) > 100
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("more", [{}, {"ceil_mode": 1}, {"dilations": [2, 1]}])
def test_pools_are_onnxruntimes(op_type: str, more: Any) -> None:
    x = np.random.default_rng(4).standard_normal((2, 3, 10, 9)).astype("f4")
    where = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1], **more}
    model = one(op_type, ["x"], [], {"x": x}, **where)
    np.testing.assert_allclose(ours(model, {"x": x}), run(model, {"x": x})["y"], 1e-6, 1e-6)


def test_an_integer_pool_keeps_integers() -> None:
    x = np.random.default_rng(5).integers(-128, 128, (1, 2, 6, 6)).astype(np.int8)
    model = one("MaxPool", ["x"], [], {"x": x}, kernel_shape=[2, 2], pads=[1, 1, 0, 0])
    found = ours(model, {"x": x})
    np.testing.assert_array_equal(found, run(model, {"x": x})["y"])
    assert found.dtype == np.int8


def refused(model: Any, x: Array) -> OnnxstreamError:
    with pytest.raises(OnnxstreamError) as caught, Session(model, threads=1) as session:
        session.run({"x": x})
    return caught.value


def test_windows_that_do_not_fit_are_refused() -> None:
    x, w = np.zeros((1, 2, 3, 3), "f4"), np.zeros((4, 3, 3, 3), "f4")
    error = refused(one("Conv", ["x", "w0"], [w], {"x": x}), x)
    assert isinstance(error, ShapeError) and "does not fit x (1, 2, 3, 3)" in str(error)
    large = np.zeros((4, 2, 5, 5), "f4")
    error = refused(one("Conv", ["x", "w0"], [large], {"x": x}), x)
    assert isinstance(error, ShapeError) and "a window of 5 does not fit 3" in str(error)


def test_a_second_output_of_a_pool_is_refused() -> None:
    node = helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])
    x = np.zeros((1, 1, 4, 4), "f4")
    outputs = [value("y", shape=None), value("i", TensorProto.INT64, None)]
    error = refused(make([node], [value("x", shape=x.shape)], outputs), x)
    assert isinstance(error, UnsupportedError) and "Indices" in str(error)
