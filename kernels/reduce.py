"""Reductions, and cumulative sums and products.

Dims: the reduced axes are gathered into N rows of C elements.
"""

import numpy as np

from ..registry import op
from .buffers import contiguous
from .dtypes import numeric
from .functions import FIRST, SQUARE, apply
from .jit import arg, jit, kernel, share
from .mapping import LARGE, launch
from .vector import add, load_f32, load_f32_n, poke_f32, sum_lanes, zero

BLOCK = 4096  # elements summed in float32 before they are added to a float64


@jit
def sum_row(function, x, n):
    """The sum of the function of (n,) float32 at x, as float64."""
    total = 0.0
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        full = start + (stop - start) // 64 * 64
        a, b, c, d = zero(), zero(), zero(), zero()
        for i in range(start, full, 64):
            a = add(a, apply(function, load_f32(x + 4 * i), a))
            b = add(b, apply(function, load_f32(x + 4 * i + 64), b))
            c = add(c, apply(function, load_f32(x + 4 * i + 128), c))
            d = add(d, apply(function, load_f32(x + 4 * i + 192), d))
        for i in range(full, stop, 16):
            a = add(a, apply(function, load_f32_n(x + 4 * i, stop - i), a))
        total += sum_lanes(add(add(a, b), add(c, d)))
    return total


@jit
def sum_rows(function, args, thread, threads):
    """args: x (N, C), out (N,), N, C."""
    n = arg(args, 3)
    start, stop = share(arg(args, 2), 1, thread, threads)
    for row in range(start, stop):
        poke_f32(arg(args, 1) + 4 * row, sum_row(function, arg(args, 0) + 4 * n * row, n))


@kernel
def sum_f32(args, thread, threads):
    """The sum of each row: (N, C) float32 -> (N,)."""
    sum_rows(FIRST, args, thread, threads)


@kernel
def sum_square_f32(args, thread, threads):
    """The sum of the squares of each row: (N, C) float32 -> (N,)."""
    sum_rows(SQUARE, args, thread, threads)


def _summed(kernel, function):
    """The reduction with that kernel: function(x) is what is summed up."""

    def run(x, axes, keepdims):
        if x.dtype != np.float32 or x.size < LARGE or axes == ():
            return np.sum(function(x), axis=axes, keepdims=keepdims, dtype=x.dtype)
        axes = [a % x.ndim for a in (range(x.ndim) if axes is None else axes)]
        kept = [a for a in range(x.ndim) if a not in axes]
        shape = [1 if a in axes else x.shape[a] for a in range(x.ndim)]
        rows = contiguous(x.transpose(kept + axes))
        out = np.empty([x.shape[a] for a in kept], np.float32)
        launch(kernel, rows.ctypes.data, out.ctypes.data, out.size, x.size // max(1, out.size))
        return out.reshape(shape) if keepdims else out

    return run


total = _summed(sum_f32, lambda x: x)
total_squares = _summed(sum_square_f32, np.square)


def _mean(x, axes, keepdims):
    sums = total(x, axes, keepdims)
    count = x.size // sums.size if sums.size else 1
    return sums / np.asarray(count, x.dtype) if x.dtype.kind == "f" else sums // count


def _log_sum_exp(x, axes, keepdims):
    largest = np.max(x, axis=axes, keepdims=True, initial=-np.inf)
    largest = np.where(np.isfinite(largest), largest, 0).astype(x.dtype)
    sums = np.sum(np.exp(x - largest), axis=axes, keepdims=True)
    result = np.log(sums) + largest
    return result if keepdims else result.reshape(np.sum(x, axis=axes).shape)


def _bounds(dtype):
    """The least and the greatest value of a type."""
    if dtype.kind == "b":
        return False, True
    return (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)


REDUCTIONS = (  # name, the opset where `axes` became an input, what it calls, its function
    ("ReduceSum", 13, "sum_f32", total),
    ("ReduceMean", 18, "sum_f32", _mean),
    ("ReduceSumSquare", 18, "sum_square_f32", total_squares),
    ("ReduceL2", 18, "sum_square_f32", lambda x, a, k: np.sqrt(total_squares(x, a, k))),
    ("ReduceL1", 18, "sum_f32", lambda x, a, k: total(np.abs(x), a, k)),
    ("ReduceLogSum", 18, "sum_f32", lambda x, a, k: np.log(total(x, a, k))),
    ("ReduceLogSumExp", 18, None, _log_sum_exp),
    ("ReduceProd", 18, None, lambda x, a, k: np.prod(x, axis=a, keepdims=k, dtype=x.dtype)),
    ("ReduceMax", 18, None,
     lambda x, a, k: np.max(x, axis=a, keepdims=k, initial=_bounds(x.dtype)[0])),
    ("ReduceMin", 18, None,
     lambda x, a, k: np.min(x, axis=a, keepdims=k, initial=_bounds(x.dtype)[1])),
)  # fmt: skip


def _by_input(function):
    @numeric
    def run(x, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        """x (...), axes (A,) -> (...) with those axes of size 1, or without them."""
        chosen = () if axes is None else tuple(map(int, axes.flat))
        chosen = chosen or (() if noop_with_empty_axes else None)
        return np.asarray(function(x, chosen, bool(keepdims))).astype(x.dtype, copy=False)

    return run


def _by_attribute(function):
    @numeric
    def run(x, *, axes=None, keepdims=1):
        """x (...) -> (...) with those axes of size 1, or without them."""
        chosen = tuple(axes) if axes else None
        return np.asarray(function(x, chosen, bool(keepdims))).astype(x.dtype, copy=False)

    return run


for _name, _since, _kernel, _function in REDUCTIONS:
    _uses = (_kernel,) if _kernel else ()
    op(_name, since=1, uses=_uses)(_by_attribute(_function))
    op(_name, since=_since, uses=_uses)(_by_input(_function))


def _extreme(function):
    def run(x, *, axis=0, keepdims=1, select_last_index=0):
        """x (..., C, ...) -> (...) int64: the index along `axis`, the first or last of equals."""
        if select_last_index:
            index = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis, keepdims=True)
        else:
            index = function(x, axis=axis, keepdims=True)
        return np.asarray(index if keepdims else np.squeeze(index, axis), np.int64)

    return run


for _name, _function in (("ArgMax", np.argmax), ("ArgMin", np.argmin)):
    op(_name, since=1)(_extreme(_function))


def _cumulative(function, neutral):
    @numeric
    def run(x, axis, *, exclusive=0, reverse=0):
        """x (...), axis () -> (...): of all elements up to each, itself excluded on demand."""
        axis = int(axis.flat[0])
        y = np.flip(x, axis) if reverse else x
        if exclusive:
            y = np.moveaxis(y, axis, 0)
            y = np.concatenate([np.full_like(y[:1], neutral), y[:-1]])
            y = np.moveaxis(y, 0, axis)
        y = function(y, axis=axis, dtype=x.dtype)
        return np.flip(y, axis) if reverse else y

    return run


op("CumSum", since=11)(_cumulative(np.cumsum, 0))
op("CumProd", since=26)(_cumulative(np.cumprod, 1))
