"""QuantizeLinear and DequantizeLinear: integers (or float8) with a scale and a zero point.

Dims: x (...); scale and zero point are () for the whole tensor, (C,) along an axis of size C, or
of x's shape with the axis divided into blocks.
"""

import numpy as np

from ..errors import UnsupportedError
from ..registry import op
from .bytes_of_floats import dequantized, evaluate, quantized, quantized_by_range
from .cast import convert
from .dtypes import numpy_dtype
from .matmul import matmul


def spread(values, x, axis, block_size):
    """A scale or zero point in a shape that broadcasts to x's."""
    if values.size == 1 and values.ndim <= 1:
        return values.reshape(())
    if values.ndim == 1:
        return values.reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    repeated = np.repeat(values, block_size, axis)
    return repeated.take(np.arange(x.shape[axis]), axis)


def _bounds(dtype):
    if dtype.kind in "iu":
        return np.iinfo(dtype)
    import ml_dtypes

    return ml_dtypes.iinfo(dtype)


def lower_dequantize(x, x_scale, x_zero_point=None, *, axis=1, block_size=0, output_dtype=0):
    """Bytes with one scale and zero point."""
    return dequantized(x, x_scale, x_zero_point) if output_dtype in (0, 1) else None


@op("DequantizeLinear", since=10, uses=("dequantize_u8",), lower=lower_dequantize)
def dequantize_linear(x, x_scale, x_zero_point=None, *, axis=1, block_size=0, output_dtype=0):
    """x (...), scale, zero point -> (...): (x - zero point) scale, in the scale's type."""
    rows = lower_dequantize(x, x_scale, x_zero_point, output_dtype=output_dtype)
    if rows is not None:
        return evaluate(rows)
    y = x.astype(np.float32)
    if x_zero_point is not None:
        y -= spread(x_zero_point, x, axis, block_size).astype(np.float32)
    y *= spread(x_scale, x, axis, block_size).astype(np.float32)
    return y.astype(numpy_dtype(output_dtype) if output_dtype else x_scale.dtype, copy=False)


def lower_quantize(
    x, y_scale, y_zero_point=None, *, axis=1, block_size=0, output_dtype=0, precision=0, saturate=1
):
    """Floats to bytes with one scale and zero point."""
    return quantized(x, y_scale, y_zero_point) if precision in (0, 1) else None


@op("QuantizeLinear", since=10, uses=("quantize_u8",), lower=lower_quantize)
def quantize_linear(
    x, y_scale, y_zero_point=None, *, axis=1, block_size=0, output_dtype=0, precision=0, saturate=1
):
    """x (...), scale, zero point -> (...): x / scale, rounded to even, + zero point, in range."""
    rows = lower_quantize(x, y_scale, y_zero_point, precision=precision)
    if rows is not None:
        return evaluate(rows)
    dtype = numpy_dtype(output_dtype) if output_dtype else np.dtype(np.uint8)
    dtype = dtype if y_zero_point is None else y_zero_point.dtype
    wide = numpy_dtype(precision) if precision else np.dtype(np.float32)
    y = np.divide(x.astype(wide, copy=False), spread(y_scale, x, axis, block_size).astype(wide))
    if dtype.name.startswith("float"):
        return convert(np.asarray(y), dtype, saturate)
    y = np.asarray(y if y.dtype.itemsize >= 4 else y.astype(np.float32))
    np.rint(y, out=y)
    if y_zero_point is not None:  # sums that float32 does not hold are out of range
        y += spread(y_zero_point, x, axis, block_size).astype(y.dtype)
    bounds = _bounds(dtype)
    return np.clip(y, int(bounds.min), int(bounds.max), out=y).astype(_whole(dtype)).astype(dtype)


def _whole(dtype):
    """A type of NumPy's own that is converted to from floats: ml_dtypes' integers are not."""
    return dtype if dtype.kind in "iu" else np.int8


@op("DynamicQuantizeLinear", since=11, uses=("range_u8", "quantize_u8"), lower=quantized_by_range)
def dynamic_quantize_linear(x):
    """x (...) float32 -> uint8 (...), its scale () and its zero point () by its range with 0.

    Where there is no range the scale is 1, as onnxruntime's.
    """
    return evaluate(quantized_by_range(np.ascontiguousarray(x, np.float32).reshape(x.shape)))


def _nibbles(packed):
    """(N, bytes) uint8 -> (N, 2 bytes), the lower half of a byte first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@op("MatMulNBits", domain="com.microsoft")
def matmul_nbits(
    a, b, scales, zero_points=None, g_idx=None, bias=None, *, K, N, block_size,  # noqa: N803
    bits=4, accuracy_level=0,
):  # fmt: skip
    """a (..., K), b (N, B, block bits / 8), scales (N B), zero points (N, B bits / 8) uint8 or
    (N, B) of the scales' type, bias (N,) -> (..., N). Constants are read otherwise (passes)."""
    if g_idx is not None or bits not in (4, 8):
        raise UnsupportedError(f"MatMulNBits with g_idx or with bits={bits} is not supported")
    scales = scales.reshape(N, -1, 1).astype(np.float32)
    q = b.reshape(N, -1)
    q = (_nibbles(q) if bits == 4 else q).reshape(N, scales.shape[1], block_size)
    zero = np.float32(1 << (bits - 1))
    if zero_points is not None:
        zero = zero_points.reshape(N, -1)
        zero = _nibbles(zero) if bits == 4 and zero.dtype == np.uint8 else zero
        zero = zero[:, : scales.shape[1], None].astype(np.float32)
    w = ((q.astype(np.float32) - zero) * scales).reshape(N, -1)[:, :K]
    y = matmul(a, w.T)
    return y if bias is None else y + bias
