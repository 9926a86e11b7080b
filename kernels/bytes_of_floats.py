"""Activations as bytes with one scale and zero point, and back.

Dims: N elements of any shape (...); scale and zero point are (), or (1,).
"""

import numpy as np
from numba import types

from .buffers import empty
from .jit import arg, jit, kernel, share
from .lowered import Rows, plain
from .mapping import SMALL, launch
from .quads import poke_u8
from .simd import (
    LANES, VI8, VI32, address, f32x16, masked_store, primitive, write_memory,
)  # fmt: skip
from .vector import (
    add, div, load_f32_n, load_u8, max_lanes, maximum, minimum, mul, peek_f32, peek_u8, poke_f32,
    splat, store_f32, sub, zero,
)  # fmt: skip

ROUND = 1.5 * 2.0**23  # a sum with it is rounded to the nearest integer, the even one of two
BEYOND = 1024.0  # further from zero than any zero point reaches back


@primitive(
    types.void, address, f32x16, types.int64,
    twin=lambda p, v, n: write_memory(p, np.float32(v)[: max(0, min(LANES, n))].astype(np.uint8)),
)  # fmt: skip
def store_u8(b, p, v, n):
    """Floats that are whole, from 0 to 255, as n bytes."""
    masked_store(b, b.trunc(b.fptosi(v, VI32), VI8), p, n, "i8")


@kernel
def range_u8(args, thread, threads):
    """The scale and the zero point of x (N,) float32 by its range, in which zero is.

    args: x, N, scale, zero point. One thread does it: every other waits for the result.
    """
    if thread:
        return
    x, n, high, low = arg(args, 0), arg(args, 1), zero(), zero()
    for i in range(0, n, 16):
        v = load_f32_n(x + 4 * i, n - i)
        high, low = maximum(high, v), maximum(low, sub(zero(), v))
    most, least = max_lanes(high), -max_lanes(low)
    scale = np.float32(np.float32(most - least) / np.float32(255))
    if scale == 0:
        scale = np.float32(1)
    poke_f32(arg(args, 2), scale)
    middle = np.rint(np.float32(-least / scale))
    poke_u8(arg(args, 3), int(min(max(middle, np.float32(0)), np.float32(255))))


@jit
def steps(v, scale, middle):
    """16 floats in whole steps above the zero point, from 0 to 255."""
    v = minimum(maximum(div(v, scale), splat(np.float32(-BEYOND))), splat(np.float32(BEYOND)))
    whole = sub(add(v, splat(np.float32(ROUND))), splat(np.float32(ROUND)))
    return minimum(maximum(add(whole, middle), zero()), splat(np.float32(255)))


@kernel
def quantize_u8(args, thread, threads):
    """x (N,) float32 -> uint8 (N,). args: x, N, scale, zero point, out."""
    x, n, out = arg(args, 0), arg(args, 1), arg(args, 4)
    scale = splat(peek_f32(arg(args, 2)))
    middle = splat(np.float32(peek_u8(arg(args, 3))))
    start, stop = share(n, 16, thread, threads)
    for i in range(start, stop, 16):
        store_u8(out + i, steps(load_f32_n(x + 4 * i, stop - i), scale, middle), stop - i)


@kernel
def dequantize_u8(args, thread, threads):
    """x (N,) uint8 -> float32 (N,). args: x, N, scale, zero point, out."""
    x, n, out = arg(args, 0), arg(args, 1), arg(args, 4)
    scale, middle = peek_f32(arg(args, 2)), np.float32(peek_u8(arg(args, 3)))
    start, stop = share(n, 16, thread, threads)
    full = start + (stop - start) // 16 * 16
    for i in range(start, full, 16):
        store_f32(out + 4 * i, mul(sub(load_u8(x + i), splat(middle)), splat(scale)))
    for i in range(full, stop):
        poke_f32(out + 4 * i, (np.float32(peek_u8(x + i)) - middle) * scale)


NONE = np.zeros((), np.uint8)


def _is_one(values, dtype):
    return isinstance(values, np.ndarray) and values.dtype == dtype and values.size == 1


def evaluate(rows):
    """The outputs of rows, computed now; alone when there is one."""
    for call in rows.calls:
        launch(*call, serial=rows.serial)
    return rows.outputs[0] if len(rows.outputs) == 1 else rows.outputs


def quantized_by_range(x):
    """x (...) contiguous float32 -> the rows of bytes (...), their scale () and zero point ()."""
    if not plain(x):
        return None
    out, scale, middle = empty(x.shape, np.uint8), np.empty((), np.float32), np.empty((), np.uint8)
    where = x.ctypes.data, x.size, scale.ctypes.data, middle.ctypes.data
    calls = [(range_u8, *where), (quantize_u8, *where, out.ctypes.data)]
    return Rows((out, scale, middle), calls, serial=x.size < SMALL, keep=(x,))


def quantized(x, scale, middle):
    """x (...) contiguous float32 by a given scale and zero point -> the row of bytes (...)."""
    if not plain(x) or not _is_one(scale, np.float32) or not _is_one(middle, np.uint8):
        return None
    return _row(quantize_u8, x, scale, middle, np.uint8)


def dequantized(x, scale, middle):
    """Bytes (...) -> the row of float32 (...)."""
    middle = NONE if middle is None else middle
    if not _is_one(scale, np.float32) or not _is_one(middle, np.uint8):
        return None
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or not x.flags.c_contiguous:
        return None
    return _row(dequantize_u8, x, scale, middle, np.float32)


def _row(kernel, x, scale, middle, dtype):
    out = empty(x.shape, dtype)
    where = x.ctypes.data, x.size, scale.ctypes.data, middle.ctypes.data, out.ctypes.data
    return Rows((out,), [(kernel, *where)], serial=x.size < SMALL, keep=(x, scale, middle))
