"""Matrix times vector over block encodings in integer arithmetic, where the host has it.

Dims: N outputs, K inputs, in groups of 32; W is stored (N, K) by rows; x (K,) and y (N,) float32.

A group of weights is scale q + offset with unsigned q, a group of activations a record of 15-bit
integers (bytes32.py): their product is scale times an integer sum, plus offset times the sum of
the activations. The relative error against float32 activations is below 1e-4.
"""

from numba.extending import overload

from ..registry import register_kernel
from .bytes32 import (
    LIMIT, RECORD, SCALE, SUM, SUM_FIRST, SUM_LAST, SUPPORTED, add8, dot32, first, load_bytes,
    load_split, nibbles, pair_add, pair_mul, pair_of_float, pair_of_floats, pair_of_half,
    pair_of_halves, pair_of_integers, pair_zero, quantize16, scale_add, scale_add_halves, second,
    sum8, unsigned, with_bit, with_two_bits, zero8,
)  # fmt: skip
from .encoding import Token
from .gemv import (
    gemv_rows_q4_0_generic, gemv_rows_q4_1_generic, gemv_rows_q4_k_generic,
    gemv_rows_q5_k_generic, gemv_rows_q6_k_generic, gemv_rows_q8_0_generic,
)  # fmt: skip
from .jit import arg, inline, jit, kernel, share
from .quant import k_scale
from .simd import JIT
from .vector import (
    absolute, add, load_f32, max_lanes, maximum, mul, peek_f32, peek_i8, poke_f32, prefetch,
    sum_lanes, zero,
)  # fmt: skip

AHEAD = 2048  # bytes: rows lie one behind the other, so this may be the next one's


@jit
def quantize(x, k, records):
    """x (K,) float32 -> (K / 32,) records."""
    for g in range(k >> 5):
        p, out = x + 128 * g, records + RECORD * g
        largest = max_lanes(maximum(absolute(load_f32(p)), absolute(load_f32(p + 64))))
        # What is not finite must reach the result: 0 x is then NaN, and with it the scale.
        marks = add(mul(load_f32(p), zero()), mul(load_f32(p + 64), zero()))
        scale = largest / LIMIT + sum_lanes(marks)
        inverse = LIMIT / largest if largest > 0 else 0.0
        first = quantize16(p, inverse, out) * scale
        last = quantize16(p + 64, inverse, out + 16) * scale
        poke_f32(out + SCALE, scale)
        poke_f32(out + SUM_FIRST, first)
        poke_f32(out + SUM_LAST, last)
        poke_f32(out + SUM, first + last)


@inline
def add_q8_0(row, g, x, total, offset):
    """Group g of a row times the record at x: the running total (8,) and offset, a pair."""
    p = row + 34 * g
    factors = pair_mul(pair_of_half(p), pair_of_floats(x + SCALE))
    total = scale_add(dot32(unsigned(load_bytes(p + 2)), x), factors, total)
    return total, pair_add(offset, factors)


@inline
def add_q4_0(row, g, x, total, offset):
    p = row + 18 * g
    factors = pair_mul(pair_of_half(p), pair_of_floats(x + SCALE))
    return scale_add(dot32(load_split(p + 2), x), factors, total), pair_add(offset, factors)


@inline
def add_q4_1(row, g, x, total, offset):
    p = row + 20 * g
    factors = pair_mul(pair_of_halves(p), pair_of_floats(x + SCALE))
    return scale_add(dot32(load_split(p + 4), x), factors, total), pair_add(offset, factors)


@inline
def k_factors(p, i, x):
    """Scale and offset of group i of the q4_k or q5_k block at p, times the record's own."""
    s, m = k_scale(p + 4, i)
    return pair_mul(pair_mul(pair_of_halves(p), pair_of_integers(s, m)), pair_of_floats(x + SCALE))


@inline
def add_q4_k(row, g, x, total, offset):
    p, i = row + 144 * (g >> 3), g & 7
    q = nibbles(load_bytes(p + 16 + 32 * (i >> 1)), 4 * (i & 1))
    factors = k_factors(p, i, x)
    return scale_add(dot32(q, x), factors, total), pair_add(offset, factors)


@inline
def add_q5_k(row, g, x, total, offset):
    p, i = row + 176 * (g >> 3), g & 7
    q = nibbles(load_bytes(p + 48 + 32 * (i >> 1)), 4 * (i & 1))
    q = with_bit(q, load_bytes(p + 16), i)
    factors = k_factors(p, i, x)
    return scale_add(dot32(q, x), factors, total), pair_add(offset, factors)


@inline
def add_q6_k(row, g, x, total, offset):
    p, half, i = row + 210 * (g >> 3), (g & 7) >> 2, g & 3
    q = nibbles(load_bytes(p + 64 * half + 32 * (i & 1)), 4 * (i >> 1))
    q = with_two_bits(q, load_bytes(p + 128 + 32 * half), 2 * i)
    at = p + 192 + 8 * half + 2 * i
    scales = pair_mul(pair_of_half(p + 208), pair_of_integers(peek_i8(at), peek_i8(at + 1)))
    factor = peek_f32(x + SCALE)
    total = scale_add_halves(dot32(q, x), pair_mul(scales, pair_of_float(factor)), total)
    return total, pair_add(offset, pair_mul(scales, pair_of_floats(x + SUM_FIRST)))


@inline
def end_q8_0(offset):
    """What the running offset adds to the row's result."""
    return -128 * second(offset)


@inline
def end_q4_0(offset):
    return -8 * second(offset)


@inline
def end_q4_1(offset):
    return second(offset)


@inline
def end_k(offset):
    return -second(offset)


@inline
def end_q6_k(offset):
    return -32 * (first(offset) + second(offset))


class Accumulator(Token):
    """A block encoding whose `add` works in integers."""

    def __init__(self, name, add, end):
        self.name, self.add, self.end = name, add, end


def accumulate(token, row, g, x, total, offset):
    """Add group g of the row times the record at x."""
    return token.add(row, g, x, total, offset)


def finish(token, offset):
    """What the offset adds to a row's result."""
    return token.end(offset)


if JIT:

    @overload(accumulate, jit_options={"forceinline": True})
    def _accumulate(token, row, g, x, total, offset):
        function = token.token.add
        return lambda token, row, g, x, total, offset: function(row, g, x, total, offset)

    @overload(finish, jit_options={"forceinline": True})
    def _finish(token, offset):
        function = token.token.end
        return lambda token, offset: function(offset)


@jit
def dot(token, row, records, groups):
    """One row of groups times the records -> float32."""
    t0, t1, t2, t3 = zero8(), zero8(), zero8(), zero8()
    m0, m1, m2, m3 = pair_zero(), pair_zero(), pair_zero(), pair_zero()
    whole = groups // 4 * 4
    for g in range(0, whole, 4):
        x = records + RECORD * g
        prefetch(row + AHEAD + (g << 5))
        prefetch(row + AHEAD + 64 + (g << 5))
        t0, m0 = accumulate(token, row, g, x, t0, m0)
        t1, m1 = accumulate(token, row, g + 1, x + RECORD, t1, m1)
        t2, m2 = accumulate(token, row, g + 2, x + 2 * RECORD, t2, m2)
        t3, m3 = accumulate(token, row, g + 3, x + 3 * RECORD, t3, m3)
    for g in range(whole, groups):
        t0, m0 = accumulate(token, row, g, records + RECORD * g, t0, m0)
    total = sum8(add8(add8(t0, t1), add8(t2, t3)))
    return total + finish(token, pair_add(pair_add(m0, m1), pair_add(m2, m3)))


@jit
def rows(token, args, thread, threads):
    """args: W (N, K), bytes a row, x, y, N, K, scratch, its bytes a thread."""
    weights, stride, x, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    groups, records = arg(args, 5) >> 5, arg(args, 6) + arg(args, 7) * thread
    start, stop = share(arg(args, 4), 4, thread, threads)
    if start == stop:
        return
    quantize(x, arg(args, 5), records)
    for i in range(start, stop):
        poke_f32(y + 4 * i, dot(token, weights + stride * i, records, groups))


Q8_0 = Accumulator("q8_0_integer", add_q8_0, end_q8_0)
Q4_0 = Accumulator("q4_0_integer", add_q4_0, end_q4_0)
Q4_1 = Accumulator("q4_1_integer", add_q4_1, end_q4_1)
Q4_K = Accumulator("q4_k_integer", add_q4_k, end_k)
Q5_K = Accumulator("q5_k_integer", add_q5_k, end_k)
Q6_K = Accumulator("q6_k_integer", add_q6_k, end_q6_k)


@kernel
def gemv_rows_q8_0_vnni(args, thread, threads):
    """q8_0 W (N, K), x (K,) -> y (N,)."""
    rows(Q8_0, args, thread, threads)


@kernel
def gemv_rows_q4_0_vnni(args, thread, threads):
    """q4_0 W (N, K), x (K,) -> y (N,)."""
    rows(Q4_0, args, thread, threads)


@kernel
def gemv_rows_q4_1_vnni(args, thread, threads):
    """q4_1 W (N, K), x (K,) -> y (N,)."""
    rows(Q4_1, args, thread, threads)


@kernel
def gemv_rows_q4_k_vnni(args, thread, threads):
    """q4_k W (N, K), x (K,) -> y (N,)."""
    rows(Q4_K, args, thread, threads)


@kernel
def gemv_rows_q5_k_vnni(args, thread, threads):
    """q5_k W (N, K), x (K,) -> y (N,)."""
    rows(Q5_K, args, thread, threads)


@kernel
def gemv_rows_q6_k_vnni(args, thread, threads):
    """q6_k W (N, K), x (K,) -> y (N,)."""
    rows(Q6_K, args, thread, threads)


# The choice is made once: what the plan and the operators ask for by encoding.
for _name, _fast, _generic in (
    ("gemv_rows_q8_0", gemv_rows_q8_0_vnni, gemv_rows_q8_0_generic),
    ("gemv_rows_q4_0", gemv_rows_q4_0_vnni, gemv_rows_q4_0_generic),
    ("gemv_rows_q4_1", gemv_rows_q4_1_vnni, gemv_rows_q4_1_generic),
    ("gemv_rows_q4_k", gemv_rows_q4_k_vnni, gemv_rows_q4_k_generic),
    ("gemv_rows_q5_k", gemv_rows_q5_k_vnni, gemv_rows_q5_k_generic),
    ("gemv_rows_q6_k", gemv_rows_q6_k_vnni, gemv_rows_q6_k_generic),
):
    register_kernel(_name, _fast if SUPPORTED else _generic)


def scratch_bytes(k):
    """Bytes of working memory a thread needs for K inputs: their records."""
    return RECORD * (k // 32)
