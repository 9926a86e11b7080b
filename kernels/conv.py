"""Convolutions, of floats and of integers: matrix products over the windows of the input.

Dims: x (N, C, *S), w (M, C/G, *K), b (M,), y (N, M, *O); G groups of channels, P positions of O.
"""

import math

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .buffers import empty
from .linear_quantization import quantize_linear
from .matmul import USES, Matrix, packing_bytes, product
from .windows import windows

PIECE = 1 << 22  # elements of the input's windows that are copied at a time
EXACT = 256  # so many products of integers from -255 to 255 have a sum that float32 holds


def float_product(rows, weight):
    """rows (P, K), weight (K, N) float32 -> (P, N) float32."""
    return product(rows, Matrix(weight))


def integer_product(rows, weight):
    """rows (M, K), weight (K, N) of integers from -255 to 255, as float32 -> (M, N) int32, exact
    (and modulo 2**32, as the standard's): bfloat16 and float32 hold them, float32 the sums."""
    k = rows.shape[1]
    out = np.zeros((len(rows), weight.shape[1]), np.int32)
    for start in range(0, k, EXACT):
        part = np.ascontiguousarray(rows[:, start : start + EXACT])
        out += product(part, Matrix(weight[start : start + EXACT])).astype(np.int32)
    return out


def convolve(x, w, where, group, multiply, dtype):
    """x (N, C, *S), w (M, C/G, *K), both float32, padded with 0 -> (N, M, *O) of dtype."""
    n, (m, each) = len(x), w.shape[:2]
    if x.shape[1] != each * group or m % group:
        raise ShapeError(f"w {w.shape} in {group} groups does not fit x {x.shape}")
    out = empty((n, m, *where.out), dtype)
    if not out.size:
        return out
    view = where.view(x, 0)
    if each == 1:
        return _depthwise(view, w, out)
    rank, size = len(where.out), w[0].size
    rows = max(1, PIECE // max(1, size * math.prod(where.out[1:])))
    order = (*range(1, rank + 1), 0, *range(rank + 1, 2 * rank + 1))
    for g in range(group):
        weight = w[g * (m // group) : (g + 1) * (m // group)].reshape(m // group, size).T
        channels = view[:, g * each : (g + 1) * each]
        for i, first in np.ndindex(n, -(-where.out[0] // rows) if rank else 1):
            at = slice(first * rows, (first + 1) * rows) if rank else ...
            piece = channels[i][:, at].transpose(order)
            y = multiply(np.ascontiguousarray(piece).reshape(-1, size), weight)
            target = out[i, g * (m // group) : (g + 1) * (m // group)]
            target[:, at] = y.T.reshape(target[:, at].shape)
    return out


def _depthwise(view, w, out):
    """Each channel by itself: the products of all windows, one place of the kernel at a time."""
    n, c, rank = view.shape[0], view.shape[1], w.ndim - 2
    m, positions = len(w) // c, out.shape[2:]
    sums = np.zeros((n, c, m, *positions), np.float32 if out.dtype == np.float32 else np.float64)
    for place in np.ndindex(w.shape[2:]):
        factor = w[(slice(None), 0, *place)].reshape(1, c, m, *(1,) * rank)
        sums += view[(..., *place)][:, :, None] * factor
    out[:] = sums.reshape(out.shape)
    return out


def _per_channel(values, rank, axis=1):
    """(M,) or () -> a shape that broadcasts along an axis of a tensor of that rank."""
    values = np.asarray(values)
    return values.reshape([-1 if a == axis else 1 for a in range(rank)])


def windows_bytes(x, w, b=None, *others):
    """What a convolution takes beside its result: the padded input, and a piece of its windows."""
    size = math.prod(w[1:])
    return (
        8 * math.prod(x) + 4 * PIECE + packing_bytes((max(1, PIECE // max(1, size)), size), w[:2])
    )


def _integer_bytes(x, w, *others):
    return windows_bytes(x, w)


def _integer_conv_bytes(x, x_scale, x_zero, w, *others):
    return windows_bytes(x, w)


@op("Conv", since=1, uses=USES, working=windows_bytes)
def conv(
    x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None,
    strides=None,
):  # fmt: skip
    """x (N, C, *S), w (M, C/G, *K), b (M,) -> (N, M, *O); fp16 is accumulated in fp32."""
    where = windows(x.shape[2:], w.shape[2:], strides, pads, dilations, auto_pad)
    x32, w32 = x.astype(np.float32, copy=False), w.astype(np.float32, copy=False)
    y = convolve(x32, w32, where, group, float_product, np.float32)
    if b is not None:
        y += _per_channel(b, x.ndim).astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)


@op("ConvInteger", since=10, uses=USES, working=_integer_bytes)
def conv_integer(
    x, w, x_zero_point=None, w_zero_point=None, *, auto_pad="NOTSET", dilations=None, group=1,
    kernel_shape=None, pads=None, strides=None,
):  # fmt: skip
    """x (N, C, *S), w (M, C/G, *K), 8 bits, zero points () and () or (M,) -> (N, M, *O) int32."""
    where = windows(x.shape[2:], w.shape[2:], strides, pads, dilations, auto_pad)
    x = without_zero(x, x_zero_point)
    zero = None if w_zero_point is None else _per_channel(w_zero_point, w.ndim, 0)
    return convolve(x, without_zero(w, zero), where, group, integer_product, np.int32)


@op("QLinearConv", since=10, uses=USES, working=_integer_conv_bytes)
def qlinear_conv(
    x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point, b=None, *,
    auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None, strides=None,
):  # fmt: skip
    """x (N, C, *S), w (M, C/G, *K), 8 bits, b (M,) int32 -> (N, M, *O) of y_zero_point's type."""
    y = conv_integer(
        x, w, x_zero_point, w_zero_point, auto_pad=auto_pad, dilations=dilations, group=group,
        kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    if b is not None:
        y += _per_channel(b, x.ndim)
    scale = _per_channel(np.asarray(w_scale, np.float64), x.ndim) * float(x_scale.item())
    return quantize_linear(y * scale, y_scale, y_zero_point, precision=11)


def without_zero(values, zero):
    """8-bit integers minus their zero point (None: 0), as float32: from -255 to 255."""
    values = values.astype(np.float32)
    return values if zero is None else values - np.asarray(zero).astype(np.float32)


def _columns(zero):
    """A zero point or scale of b: (), (1,), (N,) or (..., 1, N) as it is."""
    return zero if zero is None or zero.ndim != 1 else zero[None, :]


def _rows(zero):
    """A zero point or scale of a: (), (1,), (M,) or (..., M, 1)."""
    if zero is None or zero.ndim != 1:
        return zero
    return zero.reshape(()) if zero.size == 1 else zero[:, None]


@op("MatMulInteger", since=10, uses=USES, working=lambda a, b, *zeros: 5 * packing_bytes(a, b))
def matmul_integer(a, b, a_zero_point=None, b_zero_point=None):
    """a (..., M, K), b (..., K, N), 8 bits, zero points (), (M,) and (), (N,) -> int32."""
    a = a[None] if a.ndim == 1 else a
    vector = b.ndim == 1
    left = without_zero(a, _rows(a_zero_point))
    right = without_zero(b[:, None] if vector else b, _columns(b_zero_point))
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    if right.ndim == 2:
        rows = left.reshape(math.prod(left.shape[:-1]), left.shape[-1])
        y = integer_product(rows, right).reshape(*left.shape[:-1], right.shape[-1])
        return y[..., 0] if vector else y
    left = np.broadcast_to(left, (*lead, *left.shape[-2:]))
    right = np.broadcast_to(right, (*lead, *right.shape[-2:]))
    out = np.empty((*lead, left.shape[-2], right.shape[-1]), np.int32)
    for i in np.ndindex(lead):
        out[i] = integer_product(left[i], right[i])
    return out


@op("QLinearMatMul", since=10, uses=USES)
def qlinear_matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point):
    """a (..., M, K), b (..., K, N), 8 bits, with scales and zero points -> (..., M, N)."""
    y = matmul_integer(a, b, a_zero_point, b_zero_point).astype(np.float64)
    y = y * _rows(a_scale).astype(np.float64) * _columns(b_scale).astype(np.float64)
    return quantize_linear(y, _rows(y_scale), _rows(y_zero_point), precision=11)
