"""Rounding matrices to integers with a scale for each block: what weights are quantised by.

Dims: a matrix is N rows of K elements, cut into blocks of `block` along K, the last of which may be
shorter: B blocks a row. An element is scale (q - zero point), q in `low` .. `high`; symmetric ones
have `low` below 0 and no zero point, asymmetric ones `low` 0. A range of K is a segment.

The scale of a block is the one of several candidates whose squared error is least, each element's
error weighted by its importance; a candidate is refined by least squares over the integers that it
gives, as llama.cpp's make_qx_quants does. The first candidate covers the block's range.
Feedback is that of GPTQ (Frantar et al. 2022, arXiv 2210.17323): the error of an element is taken
out of those behind it in its row, by the upper Cholesky factor of the inverse Hessian.
"""

from dataclasses import dataclass

import numpy as np

from ..registry import op
from .buffers import contiguous
from .jit import arg, jit, kernel, share
from .mapping import launch
from .vector import (
    add, fma, load_f32, maximum, minimum, mul, peek_f16, peek_f32, poke_f16, poke_f32, splat, sub,
    sum_lanes,
)  # fmt: skip
from .vector import zero as zeros

TRIED = 19  # candidates beside the first
SEGMENT = 128
SMALLEST_SEARCHED = 1e-30  # a scale below it has no inverse worth multiplying by
ROUNDER = 1.5 * 2.0**23  # added to a float32 and taken away again, it rounds to nearest


@jit
def at(p, i):
    """Element i of float32 (n,) as float64."""
    return np.float64(peek_f32(p + 4 * i))


@jit
def nearest(x, scale, zero, low, high):
    """The integer, as a float, that stands for x."""
    return min(float(high), max(float(low), np.rint(x / scale) + zero))


@jit
def stored_scale(scale, half, p):
    """A scale as it is stored, in float16 or float32; one that would be zero becomes 1."""
    if half:
        poke_f16(p, scale)
        found = np.float64(peek_f16(p))
    else:
        poke_f32(p, scale)
        found = at(p, 0)
    return 1.0 if found == 0.0 else found


@jit
def moments(w, importance, n, scale, zero, low, high):
    """Of the integers q, less the zero point, that `scale` gives n elements x (n,): the sums of
    q x and of q q, by importance (n,). In float32, and a tie may be rounded otherwise."""
    inverse, one = splat(1.0 / scale), splat(1.0)
    least, most, rounder = splat(low - zero), splat(high - zero), splat(ROUNDER)
    above, below = zeros(), zeros()
    whole = n // 16 * 16
    for i in range(0, whole, 16):
        x = load_f32(w + 4 * i)
        q = sub(add(mul(x, inverse), rounder), rounder)
        q = minimum(most, maximum(least, q))
        each = mul(q, load_f32(importance + 4 * i) if importance else one)
        above, below = fma(each, x, above), fma(each, q, below)
    first, second = np.float64(sum_lanes(above)), np.float64(sum_lanes(below))
    for i in range(whole, n):
        x = at(w, i)
        q = nearest(x, scale, zero, low, high) - zero
        each = q * (at(importance, i) if importance else 1.0)
        first += each * x
        second += each * q
    return first, second


@jit
def range_of(w, n):
    """Least, largest, and the one of larger magnitude, of n elements (n,) and 0."""
    least, most = 0.0, 0.0
    for i in range(n):
        x = at(w, i)
        least, most = min(least, x), max(most, x)
    return least, most, (least if -least > most else most)


@jit
def candidate(i, least, most, extreme, low, high):
    """Scale and zero point number i for a block of that range; 0 covers it."""
    if low < 0:
        if i == 0:
            return abs(extreme) / high, 0.0
        return extreme / (low - 0.1 * (i - 1 - TRIED // 2)), 0.0
    shrunk = 1.0 if i == 0 else 1.04 - 0.02 * i
    scale = shrunk * (most - least) / high
    return scale, (np.rint(-shrunk * least / scale) if scale > 0.0 else 0.0)


@jit
def fit(w, importance, n, tried, low, high, half, p):
    """The scale, as stored, and the zero point of a block (n,); p is where the scale will lie."""
    least, most, extreme = range_of(w, n)
    if most == least:
        return 1.0, 0.0
    scale, zero = candidate(0, least, most, extreme, low, high)
    best, best_zero, gain = stored_scale(scale, half, p), zero, -1.0
    if tried == 0 or scale < SMALLEST_SEARCHED:
        return best, best_zero
    for i in range(tried + 1):
        scale, zero = candidate(i, least, most, extreme, low, high)
        above, below = moments(w, importance, n, scale, zero, low, high)
        if i == 0:
            gain = best * (2.0 * above - best * below)
        if below > 0.0:
            found = stored_scale(above / below, half, p)
            better = found * (2.0 * above - found * below)  # how much less than all of x x is left
            if better > gain:
                best, best_zero, gain = found, zero, better
    return best, best_zero


@kernel
def round_blocks(args, thread, threads):
    """(N, K) float32 -> their integers in place, scales (N, B), zero points (N, B).

    args: matrix, importance (K,) or 0, scales, zero points, N, K, block, low, high, candidates
    beside the first, whether scales are float16.
    """
    matrix, importance, scales, zeros = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n, k, block, low, high = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    tried, half = arg(args, 9), arg(args, 10)
    start, stop = share(n, 1, thread, threads)
    blocks = (k + block - 1) // block
    for row in range(start, stop):
        for b in range(blocks):
            first = b * block
            count = min(block, k - first)
            w, place = matrix + 4 * (row * k + first), 4 * (row * blocks + b)
            weights = importance + 4 * first if importance else 0
            scale, zero = fit(w, weights, count, tried, low, high, half, scales + place)
            poke_f32(scales + place, scale)
            poke_f32(zeros + place, zero)
            for i in range(count):
                poke_f32(w + 4 * i, nearest(at(w, i), scale, zero, low, high))


@jit
def take_error(w, factor, error, count):
    """Take error times the factor's row (count,) out of the elements (count,) behind."""
    for j in range(count):
        poke_f32(w + 4 * j, peek_f32(w + 4 * j) - error * peek_f32(factor + 4 * j))


@kernel
def round_segment(args, thread, threads):
    """Columns `first` .. `stop` of (N, K) float32 -> their integers (N, K), what is left of them
    (N, stop - first) divided by the factor's diagonal, scales (N, B), zero points (N, B).

    args: matrix, importance (K,) or 0, scales, zero points, N, K, block, low, high, candidates
    beside the first, whether scales are float16, integers, left, factor (K, K), first, stop,
    whether the scales are to be fitted here.
    """
    matrix, importance, scales, zeros = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n, k, block, low, high = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    tried, half, integers, left = arg(args, 9), arg(args, 10), arg(args, 11), arg(args, 12)
    factor, first, stop, fitted = arg(args, 13), arg(args, 14), arg(args, 15), arg(args, 16)
    begin, end = share(n, 1, thread, threads)
    blocks = (k + block - 1) // block
    for row in range(begin, end):
        w = matrix + 4 * row * k
        for i in range(first, stop):
            place = 4 * (row * blocks + i // block)
            if fitted and i % block == 0:
                weights = importance + 4 * i if importance else 0
                count = min(block, k - i)
                scale, zero = fit(w + 4 * i, weights, count, tried, low, high, half, scales + place)
                poke_f32(scales + place, scale)
                poke_f32(zeros + place, zero)
            scale, zero = at(scales + place, 0), at(zeros + place, 0)
            q = nearest(at(w, i), scale, zero, low, high)
            poke_f32(integers + 4 * (row * k + i), q)
            diagonal = factor + 4 * (i * k + i)
            error = (at(w, i) - scale * (q - zero)) / at(diagonal, 0)
            poke_f32(left + 4 * (row * (stop - first) + i - first), error)
            take_error(w + 4 * i, diagonal, np.float32(error), stop - i)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Integers (N, K) int8 or uint8, scales (N, B) float32 that are exact as they are to be stored
    (infinite where float16 has none), zero points (N, B) uint8 or None."""

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def of(cls, integers, scales, zeros, low):
        """The results of a kernel in their types."""
        kind = np.int8 if low < 0 else np.uint8
        return cls(integers.astype(kind), scales, None if low < 0 else zeros.astype(np.uint8))


def address_of(array):
    """Where an array (n,) lies, 0 for None."""
    return 0 if array is None else array.ctypes.data


@op("RoundToBlocks", domain="onnxstream_nb", uses=("round_blocks",))
def round_to_blocks(matrix, importance, block, low, high, search, half):
    """(N, K) float32 -> Rounded; `importance` (K,) float32 or None, `search` for the scales of
    least error, `half`: in float16."""
    matrix = np.array(matrix, np.float32, order="C")
    n, k = matrix.shape
    shape = (n, -(-k // block))
    scales, zeros = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    if importance is not None:
        importance = contiguous(importance.astype(np.float32))
    launch(
        round_blocks, matrix.ctypes.data, address_of(importance), scales.ctypes.data,
        zeros.ctypes.data, n, k, block, low, high, TRIED if search else 0, int(half),
    )  # fmt: skip
    return Rounded.of(matrix, scales, zeros, low)


@op("RoundWithFeedback", domain="onnxstream_nb", uses=("round_blocks", "round_segment"))
def round_with_feedback(matrix, factor, importance, block, low, high, search, half):
    """(N, K) float32 and the upper factor (K, K) float32 of the inverse Hessian -> Rounded.

    Blocks longer than a segment have their scales fitted before any feedback.
    """
    fitted = block <= 2 * SEGMENT
    if fitted:
        n, k = matrix.shape
        shape = (n, -(-k // block))
        scales, zeros = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    else:
        first = round_to_blocks(matrix, importance, block, low, high, search, half)
        scales = first.scales
        zeros = np.zeros_like(scales) if first.zeros is None else first.zeros.astype(np.float32)
    matrix = np.array(matrix, np.float32, order="C")
    factor, integers = contiguous(factor.astype(np.float32)), np.empty_like(matrix)
    if importance is not None:
        importance = contiguous(importance.astype(np.float32))
    n, k = matrix.shape
    size = max(1, SEGMENT // block) * block if fitted else SEGMENT
    for start in range(0, k, size):
        stop = min(start + size, k)
        left = np.empty((n, stop - start), np.float32)
        launch(
            round_segment, matrix.ctypes.data, address_of(importance), scales.ctypes.data,
            zeros.ctypes.data, n, k, block, low, high, TRIED if search else 0, int(half),
            integers.ctypes.data, left.ctypes.data, factor.ctypes.data, start, stop, int(fitted),
        )  # fmt: skip
        matrix[:, stop:] -= left @ factor[start:stop, stop:]
    return Rounded.of(integers, scales, zeros, low)
