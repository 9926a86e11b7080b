"""One step of attention's running softmax, over a block of keys: bias, weights, rescaled results.

Dims: S keys of a block, at most KEYS; E the size of a result. A row's scores are (KEYS,) float32;
what is kept of it is `best`, its largest score so far, `sums` (16,), whose sum is that of its
weights, and `result` (E,), the weighted values; E is padded to a multiple of 32. Scores and results
lie in groups of 32, `apart` bytes from one to the next: 128 where a row is contiguous.

Source: Dao et al., "FlashAttention" (2022).
"""

import numpy as np
from llvmlite import ir
from numba import types

from .jit import inline, jit
from .simd import I32, VI32, f32x16, primitive
from .vector import (
    add, div, exp, fma, load_f32, load_f32_n, maximum, mul, peek_f32, poke_f32, splat, store_f32,
    store_f32_n, sub, sum_lanes, zero,
)  # fmt: skip

NONE = np.float32(-np.inf)


@primitive(types.float32, f32x16, twin=lambda x: np.float32(np.max(x)))
def largest(b, x):
    """The largest lane; of a NaN and a number either, which is quicker than max_lanes."""
    for step in (8, 4, 2, 1):
        other = ir.Constant(VI32, [i ^ step for i in range(16)])
        y = b.shuffle_vector(x, x, other)
        x = b.select(b.fcmp_ordered(">", x, y), x, y)
    return b.extract_element(x, ir.Constant(I32, 0))


@inline
def at(row, i, apart):
    """Where element i of a row is."""
    return row + 4 * (i & 31) + (i >> 5) * apart


@jit
def soften(scores, apart, count, cap):
    """Soft cap: cap tanh(score / cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    one, two, factor = splat(np.float32(1)), splat(np.float32(2)), splat(np.float32(2) / cap)
    for j in range(0, count, 16):
        power = exp(mul(load_f32(at(scores, j, apart)), factor))
        store_f32(at(scores, j, apart), mul(sub(one, div(two, add(power, one))), splat(cap)))


@jit
def add_mask(scores, apart, count, mask):
    """Add a mask (count,) to scores."""
    for j in range(0, count, 16):
        row = load_f32(at(scores, j, apart))
        store_f32(at(scores, j, apart), add(row, load_f32_n(mask + 4 * j, count - j)))


@jit
def hide(scores, apart, allowed, count):
    """Scores from `allowed` on, to the end of the vector that holds the last of `count`: none."""
    j = allowed // 16 * 16
    if j < allowed:
        kept = load_f32(at(scores, j, apart))
        store_f32(at(scores, j, apart), splat(NONE))
        store_f32_n(at(scores, j, apart), kept, allowed - j)
        j += 16
    while j < count:
        store_f32(at(scores, j, apart), splat(NONE))
        j += 16


@jit
def begin(best, sums, result, apart, width):
    """A row that has seen no key."""
    poke_f32(best, NONE)
    store_f32(sums, zero())
    for e in range(0, width, 16):
        store_f32(at(result, e, apart), zero())


@jit
def weigh(scores, apart, count, best, sums, result, result_apart, width):
    """Scores of a block become weights, in place; the row is rescaled to its new maximum."""
    top, also, j = splat(NONE), splat(NONE), 0
    while j + 16 < count:  # two chains, for what takes time is waiting for the one before
        top = maximum(top, load_f32(at(scores, j, apart)))
        also = maximum(also, load_f32(at(scores, j, apart) + 64))
        j += 32
    if j < count:
        top = maximum(top, load_f32(at(scores, j, apart)))
    old = peek_f32(best)
    new = max(old, largest(maximum(top, also)))
    if new == NONE:
        for j in range(0, count, 16):
            store_f32(at(scores, j, apart), zero())
        return
    if new != old:
        rescale(exp(splat(old - new)), sums, result, result_apart, width)
        poke_f32(best, new)
    shift, total = splat(new), load_f32(sums)
    for j in range(0, count, 16):
        value = exp(sub(load_f32(at(scores, j, apart)), shift))
        total = add(total, value)
        store_f32(at(scores, j, apart), value)
    store_f32(sums, total)


@jit
def rescale(factor, sums, result, apart, width):
    """A row's sums and result times a vector (16,) of equal factors."""
    store_f32(sums, mul(load_f32(sums), factor))
    for e in range(0, width, 16):
        store_f32(at(result, e, apart), mul(load_f32(at(result, e, apart)), factor))


@jit
def combine(best, sums, result, other_best, other_sums, other_result, width):
    """A row over some keys takes in the same row over other keys; both results contiguous."""
    old, other = peek_f32(best), peek_f32(other_best)
    new = max(old, other)
    if other == NONE:
        return
    rescale(exp(splat(old - new)), sums, result, 128, width)
    poke_f32(best, new)
    factor = exp(splat(other - new))
    store_f32(sums, fma(load_f32(other_sums), factor, load_f32(sums)))
    for e in range(0, width, 16):
        value = fma(load_f32(other_result + 4 * e), factor, load_f32(result + 4 * e))
        store_f32(result + 4 * e, value)


@jit
def finish(sums, result, apart, size, out):
    """A row's result (size,) over the sum of its weights; zeros when it saw no key."""
    whole = sum_lanes(load_f32(sums))
    divisor = splat(np.float32(1) if whole == 0 else whole)
    for e in range(0, size, 16):
        store_f32_n(out + 4 * e, div(load_f32(at(result, e, apart)), divisor), size - e)
