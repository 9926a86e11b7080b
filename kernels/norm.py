"""Normalisation over the last axes: RMSNormalization and LayerNormalization.

Dims: M rows of N elements, normalised each; scale and bias (N,).
"""

import math

import numpy as np

from ..registry import op
from .buffers import contiguous, empty
from .jit import arg, arg_float, float_bits, jit, kernel, share
from .lowered import Rows, plain
from .vector import (
    add, fma, load_f32, load_f32_n, mul, peek_f32, splat, store_f32_n, sub, sum_lanes, zero,
)  # fmt: skip


@jit
def mean_square(x, n, mean):
    """The mean over (N,) of (x - mean) ** 2, float32."""
    centre = splat(mean)
    a, b = zero(), zero()
    whole = n // 32 * 32
    for j in range(0, whole, 32):
        low, high = sub(load_f32(x + 4 * j), centre), sub(load_f32(x + 4 * j + 64), centre)
        a, b = fma(low, low, a), fma(high, high, b)
    total = sum_lanes(add(a, b))
    for j in range(whole, n):
        d = peek_f32(x + 4 * j) - mean
        total += d * d
    return total / np.float32(n)


@jit
def mean(x, n):
    """The mean over (N,), float32."""
    total, whole = zero(), n // 16 * 16
    for j in range(0, whole, 16):
        total = add(total, load_f32(x + 4 * j))
    result = sum_lanes(total)
    for j in range(whole, n):
        result += peek_f32(x + 4 * j)
    return result / np.float32(n)


@kernel
def rms_norm(args, thread, threads):
    """x (M, N), scale (N,) -> (M, N): x / sqrt(mean(x ** 2) + eps) * scale.

    args: x, scale, out, M, N, eps.
    """
    x, scale, out, m, n = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4)
    start, stop = share(m, 1, thread, threads)
    for i in range(start, stop):
        row, to = x + 4 * n * i, out + 4 * n * i
        spread = mean_square(row, n, np.float32(0)) + np.float32(arg_float(args, 5))
        factor = splat(np.float32(1) / np.float32(math.sqrt(spread)))
        for j in range(0, n, 16):
            value = mul(load_f32_n(row + 4 * j, n - j), factor)
            store_f32_n(to + 4 * j, mul(value, load_f32_n(scale + 4 * j, n - j)), n - j)


@kernel
def layer_norm(args, thread, threads):
    """x (M, N), scale (N,), bias (N,) or 0 -> (M, N): (x - mean) / sqrt(variance + eps) * scale.

    args: x, scale, bias, out, M, N, eps.
    """
    x, scale, bias, out = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    m, n = arg(args, 4), arg(args, 5)
    start, stop = share(m, 1, thread, threads)
    for i in range(start, stop):
        row, to = x + 4 * n * i, out + 4 * n * i
        centre = mean(row, n)
        spread = mean_square(row, n, centre) + np.float32(arg_float(args, 6))
        factor, middle = splat(np.float32(1) / np.float32(math.sqrt(spread))), splat(centre)
        for j in range(0, n, 16):
            value = mul(sub(load_f32_n(row + 4 * j, n - j), middle), factor)
            offset = load_f32_n(bias + 4 * j, n - j) if bias else zero()
            store_f32_n(to + 4 * j, fma(value, load_f32_n(scale + 4 * j, n - j), offset), n - j)


def _rows(x, axis, *parameters):
    """x as contiguous float32 (M, N) over the axes from `axis` on, the parameters as (N,)."""
    lead, shape = x.shape[: axis % x.ndim], x.shape[axis % x.ndim :]
    rows = contiguous(x, np.float32).reshape(math.prod(lead), math.prod(shape))
    wide = [None if p is None else np.broadcast_to(p, shape).reshape(-1) for p in parameters]
    return rows, *[None if p is None else np.ascontiguousarray(p, np.float32) for p in wide]


def lower_rms(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """x (M, N) or (..., N), scale (N,), contiguous float32."""
    if not plain(x, scale) or axis not in (-1, x.ndim - 1) or scale.shape != x.shape[-1:]:
        return None
    out, n = empty(x.shape), x.shape[-1]
    m = x.size // n if n else 0
    call = (rms_norm, x.ctypes.data, scale.ctypes.data, out.ctypes.data, m, n, float_bits(epsilon))
    return Rows((out,), [call], serial=m == 1, keep=(x, scale))


@op("RMSNormalization", since=23, uses=("rms_norm",), lower=lower_rms)
def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """x (..., N), scale (N,) -> same shape, computed in float32."""
    rows, weight = _rows(x, axis, scale)
    out = lower_rms(rows, weight, epsilon=epsilon).run()
    return out.reshape(x.shape).astype(scale.dtype, copy=False)


def lower_layer(x, scale, b=None, *, axis=-1, epsilon=1e-5, stash_type=1, n_outputs=1):
    """x (M, N) or (..., N), scale (N,), b (N,) or None, contiguous float32."""
    if n_outputs > 1 or not plain(x, scale) or axis not in (-1, x.ndim - 1):
        return None
    n = x.shape[-1]
    if scale.shape != (n,) or (b is not None and not (plain(b) and b.shape == (n,))):
        return None
    out = empty(x.shape)
    m, bias = x.size // n if n else 0, 0 if b is None else b.ctypes.data
    call = (layer_norm, x.ctypes.data, scale.ctypes.data, bias, out.ctypes.data, m, n,
            float_bits(epsilon))  # fmt: skip
    return Rows((out,), [call], serial=m == 1, keep=(x, scale, b))


@op("LayerNormalization", since=17, uses=("layer_norm",), lower=lower_layer)
def layer_normalization(x, scale, b=None, *, axis=-1, epsilon=1e-5, stash_type=1, n_outputs=1):
    """x (..., N), scale (N,), b (N,) -> same shape; Mean and InvStdDev (..., 1) when asked for."""
    rows, weight, bias = _rows(x, axis, scale, b)
    out = lower_layer(rows, weight, bias, epsilon=epsilon).run()
    y = out.reshape(x.shape).astype(x.dtype, copy=False)
    if n_outputs == 1:
        return y
    lead = (*x.shape[: axis % x.ndim], *[1] * (x.ndim - axis % x.ndim))
    centre = rows.mean(axis=1, dtype=np.float32)
    spread = np.float32(1) / np.sqrt(rows.var(axis=1, dtype=np.float32) + np.float32(epsilon))
    return y, centre.reshape(lead), spread.reshape(lead)
