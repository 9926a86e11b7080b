"""Softmax and its relatives.

Dims: N rows of C elements, the classes; a row sums to one.
"""

import math

import numpy as np

from ..registry import op
from .buffers import contiguous, empty
from .dtypes import numeric
from .jit import arg, jit, kernel, share
from .lowered import Rows, plain
from .mapping import SMALL, evaluate
from .vector import (
    add, exp, load_f32, load_f32_n, max_lanes, maximum, mul, peek_f32, splat, store_f32,
    store_f32_n, sub, sum_lanes, zero,
)  # fmt: skip


@jit
def row_maximum(x, n):
    """The largest of (n,) float32 at x, NaNs aside."""
    largest, full = splat(-np.inf), n // 16 * 16
    for i in range(0, full, 16):
        largest = maximum(load_f32(x + 4 * i), largest)
    for i in range(full, n):
        largest = maximum(splat(peek_f32(x + 4 * i)), largest)
    return max_lanes(largest)


@jit
def exponentials(x, out, n, largest):
    """e ** (x - largest) of (n,) float32 at x, stored at out; their sum."""
    total, full, shift = zero(), n // 16 * 16, splat(largest)
    for i in range(0, full, 16):
        e = exp(sub(load_f32(x + 4 * i), shift))
        store_f32(out + 4 * i, e)
        total = add(total, e)
    if full < n:
        e = exp(sub(load_f32_n(x + 4 * full, n - full), shift))
        store_f32_n(out + 4 * full, e, n - full)
        # Loaded again, the lanes behind the end are zero.
        total = add(total, load_f32_n(out + 4 * full, n - full))
    return sum_lanes(total)


@kernel
def softmax_f32(args, thread, threads):
    """e ** x / sum e ** x in each row: (N, C) float32 -> (N, C). args: x, out, N, C."""
    n = arg(args, 3)
    start, stop = share(arg(args, 2), 1, thread, threads)
    for row in range(start, stop):
        x, out = arg(args, 0) + 4 * n * row, arg(args, 1) + 4 * n * row
        scale = splat(1.0 / exponentials(x, out, n, row_maximum(x, n)))
        for i in range(0, n, 16):
            count = min(16, n - i)
            store_f32_n(out + 4 * i, mul(load_f32_n(out + 4 * i, count), scale), count)


@kernel
def log_softmax_f32(args, thread, threads):
    """x - log sum e ** x in each row: (N, C) float32 -> (N, C). args: x, out, N, C."""
    n = arg(args, 3)
    start, stop = share(arg(args, 2), 1, thread, threads)
    for row in range(start, stop):
        x, out = arg(args, 0) + 4 * n * row, arg(args, 1) + 4 * n * row
        largest = row_maximum(x, n)
        total = math.log(exponentials(x, out, n, largest))
        for i in range(0, n, 16):
            count = min(16, n - i)
            y = sub(sub(load_f32_n(x + 4 * i, count), splat(largest)), splat(total))
            store_f32_n(out + 4 * i, y, count)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True, initial=-np.inf))
    return e / e.sum(axis=-1, keepdims=True)


def _log_softmax(x):
    shifted = x - x.max(axis=-1, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _hardmax(x):
    return np.arange(x.shape[-1]) == np.argmax(x, axis=-1)[..., None]


def row_call(kernel, x):
    """The call that computes x (..., C), contiguous float32 -> the same shape."""
    out, classes = empty(x.shape), x.shape[-1]
    rows = x.size // classes if classes else 0
    call = (kernel, x.ctypes.data, out.ctypes.data, rows, classes)
    return Rows((out,), [call], serial=x.size < SMALL, keep=(x,))


def along_rows(kernel, function):
    """A function of rows: the kernel for float32, the NumPy function otherwise."""

    def run(x):
        if kernel is None or x.dtype != np.float32:
            return function(x).astype(x.dtype, copy=False)
        return evaluate(row_call(kernel, contiguous(x)))

    return run


def _lower(kernel):
    def lower(x, *, axis=-1):
        return row_call(kernel, x) if plain(x) and axis in (-1, x.ndim - 1) else None

    return lower


def _along_axis(rows):
    @numeric
    def run(x, *, axis=-1):
        """x (..., C, ...) -> same shape, each slice along `axis` by itself."""
        if axis in (-1, x.ndim - 1):
            return rows(x)
        return np.moveaxis(rows(np.moveaxis(x, axis, -1)), -1, axis)

    return run


def _flattened(rows):
    @numeric
    def run(x, *, axis=1):
        """x (...) -> (...), all axes from `axis` on taken for one."""
        axis = axis % x.ndim
        return rows(x.reshape(*x.shape[:axis], -1)).reshape(x.shape)

    return run


for _name, _kernel, _function in (
    ("Softmax", softmax_f32, _softmax), ("LogSoftmax", log_softmax_f32, _log_softmax),
    ("Hardmax", None, _hardmax),
):  # fmt: skip
    _uses = (_kernel.name,) if _kernel else ()
    _rows = along_rows(_kernel, _function)
    op(_name, since=13, uses=_uses, lower=_kernel and _lower(_kernel))(_along_axis(_rows))
    op(_name, since=1, uses=_uses)(_flattened(_rows))
