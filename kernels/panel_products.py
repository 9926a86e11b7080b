"""Products with weights in panels, in integer arithmetic: y = W x and Y = X W.

Dims: M rows of X, N outputs, K inputs in groups of 32; W (N, K) in panels of 16 rows (panels.py).

A group of weights is scale q + offset with unsigned q, a group of activations a record of 15-bit
integers (quads.py): their product is scale times an integer sum, plus offset times the sum of the
activations. The relative error against float32 activations is below 1e-4.
"""

import numpy as np

from .affine import AFFINE4, AFFINE8, HALVES
from .gemv import ONE_STREAM
from .jit import arg, inline, jit, kernel, share
from .machine_code import overload_inline
from .panels import (
    Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, block_groups, bytes_ahead, pack_block, read_group,
)  # fmt: skip
from .quads import (
    LIMIT, MINUS_8, MINUS_32_FIRST, MINUS_32_LAST, MINUS_128, RECORD, SCALE, SUM, ZERO, dot,
    dot_above, dot_above_first, dot_above_last, dot_first, dot_last, largest32, poke_i32,
    quantize16,
)  # fmt: skip
from .simd import JIT
from .vector import (
    fma, load_f32, load_f32_n, mul, peek_f32, poke_f32, prefetch, splat, store_f32, store_f32_n,
    zero,
)  # fmt: skip

LEAST = np.float32(1e-30)  # a group that is smaller counts as zeros: its scale has no inverse
ROWS = 16  # of W a panel
TOGETHER = 1 if ONE_STREAM else 4  # panels that one vector is multiplied with side by side
BLOCK_BYTES = 400_000  # of records that are multiplied with one panel after the other, in L2


def block_rows(m, k):
    """Rows of X whose records stay in the second cache."""
    return max(1, min(m, BLOCK_BYTES // (RECORD * (k // 32))))


@inline
def put_fields(record, scale, first, last):
    """The fields of a record, of its scale and the sums of its first 16 integers and its last."""
    poke_f32(record + SCALE, scale)
    poke_f32(record + SUM, scale * (first + last))
    poke_i32(record + MINUS_8, -8 * (first + last))
    poke_i32(record + MINUS_128, -128 * (first + last))
    poke_i32(record + MINUS_32_FIRST, -32 * first)
    poke_i32(record + MINUS_32_LAST, -32 * last)
    poke_i32(record + ZERO, 0)


@jit
def quantize(x, k, records, step):
    """x (K,) float32 -> (K / 32,) records, `step` bytes apart."""
    for g in range(k >> 5):
        p, out = x + 128 * g, records + step * g
        largest = largest32(p)  # NaN when something is not finite: that must reach the result
        inverse = LIMIT / largest if largest > LEAST else np.float32(0)
        first, last = quantize16(p, inverse, out), quantize16(p + 64, inverse, out + 16)
        put_fields(out, largest / LIMIT, first, last)


@kernel
def quantize_rows(args, thread, threads):
    """X (M, K), rows `stride` bytes apart -> records (M blocks, K / 32, rows of the block).

    args: X, stride, records, M, K, rows a block. Shares are cut at groups of 32, row after row.
    """
    x, stride, records, m, groups, most = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4) >> 5, arg(args, 5),
    )  # fmt: skip
    at, stop = share(m * groups, 1, thread, threads)
    while at < stop:
        i, g = at // groups, at % groups
        count = min(groups - g, stop - at)
        first = i // most * most
        rows = min(most, m - first)
        out = records + RECORD * (first * groups + rows * g + i - first)
        quantize(x + stride * i + 128 * g, 32 * count, out, RECORD * rows)
        at += count


# -- a group of a panel times a record: so_far (16,) plus its products ---------------------------


def scaled(encoding):
    """scale times the sum of products."""
    start = encoding.start

    def plus(token, group, record, so_far):
        q, scale = group
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        return fma(dot(q, record, record + start), factor, so_far)

    return plus


def offset(encoding):
    """The same plus an offset times the activations' sum."""
    start = encoding.start

    def plus(token, group, record, so_far):
        q, scale, below = group
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        so_far = fma(below, splat(peek_f32(record + SUM)), so_far)
        return fma(dot(q, record, record + start), factor, so_far)

    return plus


def halves(encoding):
    """Two scales: of the first 16 elements, and of the last."""

    def plus(token, group, record, so_far):
        q, first, last = group
        terms = mul(first, dot_first(q, record, record + MINUS_32_FIRST))
        terms = fma(last, dot_last(q, record, record + MINUS_32_LAST), terms)
        return fma(terms, splat(peek_f32(record + SCALE)), so_far)

    return plus


def above(encoding):
    """Zero points, and perhaps two scales: the panels' heads say it."""

    def plus(token, group, record, so_far):
        q, first, last, zeros, more, flags = group
        scale = splat(peek_f32(record + SCALE))
        if flags & HALVES:
            terms = mul(first, dot_above_first(q, record, zeros))
            terms = fma(last, dot_above_last(q, record, more), terms)
            return fma(terms, scale, so_far)
        return fma(dot_above(q, record, zeros), mul(first, scale), so_far)

    return plus


FORMS = {"scaled": scaled, "offset": offset, "halves": halves, "above": above}


def plus(token, group, record, so_far):
    """so_far (16,) plus a group that `read_group` gave times a record."""
    return FORMS[token.form](token)(token, group, record, so_far)


if JIT:

    @overload_inline(plus)
    def _plus(token, group, record, so_far):
        return FORMS[token.token.form](token.token)


# -- products ------------------------------------------------------------------------------------


@jit
def panel_product(token, panel, nbytes, x, groups, rows, out):
    """16 weight rows, a panel of `nbytes`, times `rows` rows of records (groups, rows), added to
    out (rows, 16)."""
    each, ahead = nbytes // groups, bytes_ahead(token)
    for g in range(groups):
        for line in range(each * g + ahead, each * (g + 1) + ahead, 64):
            prefetch(panel + line)
        group = read_group(token, panel, g)
        for r in range(rows):
            total = out + 64 * r
            record = x + RECORD * (rows * g + r)
            store_f32(total, plus(token, group, record, load_f32(total)))


@jit
def four_panels(token, one, nbytes, x, groups, out):
    """Four panels of `nbytes` each times records (groups,), added to out (4, 16).

    Each is a stream of its own: where the hardware has to begin anew, at every page, three others
    are under way. Behind a panel's end, what is prefetched is the one that is read after it. What
    is read of x serves all of them.
    """
    each, ahead = nbytes // groups, bytes_ahead(token)
    two, three, four = one + nbytes, one + 2 * nbytes, one + 3 * nbytes
    a, b, c, d = load_f32(out), load_f32(out + 64), load_f32(out + 128), load_f32(out + 192)
    for g in range(groups):
        at = each * g + ahead
        if at >= nbytes:
            at += 3 * nbytes
        for line in range(at, at + each, 64):
            prefetch(one + line)
            prefetch(two + line)
            prefetch(three + line)
            prefetch(four + line)
        record = x + RECORD * g
        a = plus(token, read_group(token, one, g), record, a)
        b = plus(token, read_group(token, two, g), record, b)
        c = plus(token, read_group(token, three, g), record, c)
        d = plus(token, read_group(token, four, g), record, d)
    store_f32(out, a)
    store_f32(out + 64, b)
    store_f32(out + 128, c)
    store_f32(out + 192, d)


@inline
def begin(out, y, n, onto):
    """out (16,) = 0, or the up to 16 floats at y that the product is added to."""
    store_f32(out, load_f32_n(y, n) if onto else zero())


@jit
def gemv(token, args, thread, threads):
    """args: panels, bytes a panel, records, y, N, K, scratch, its bytes a thread, whether to add to
    y."""
    panels, step, records, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n, groups, out = arg(args, 4), arg(args, 5) >> 5, arg(args, 6) + arg(args, 7) * thread
    onto = arg(args, 8)
    i, stop = share(n, ROWS, thread, threads)
    while i < stop:
        panel = panels + step * (i // ROWS)
        count = TOGETHER if stop - i > ROWS * (TOGETHER - 1) else 1
        for p in range(count):
            begin(out + 64 * p, y + 4 * i + 64 * p, n - i - ROWS * p, onto)
        if count > 1:
            four_panels(token, panel, step, records, groups, out)
        else:
            panel_product(token, panel, step, records, groups, 1, out)
        for p in range(count):
            store_f32_n(y + 4 * i + 64 * p, load_f32(out + 64 * p), n - i - ROWS * p)
        i += ROWS * count


@jit
def gemm(token, args, thread, threads):
    """args: panels, bytes a panel, records, Y, bytes a row of Y, M, N, K, rows a block, scratch,
    its bytes a thread, whether to add to Y."""
    panels, step, records, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    stride, m, n, k = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    most, out, onto = arg(args, 8), arg(args, 9) + arg(args, 10) * thread, arg(args, 11)
    start, stop = share(n, ROWS, thread, threads)
    for first in range(0, m, most):
        rows, x = min(most, m - first), records + RECORD * first * (k >> 5)
        for i in range(start, stop, ROWS):
            for r in range(rows):
                begin(out + 64 * r, y + stride * (first + r) + 4 * i, n - i, onto)
            panel_product(token, panels + step * (i // ROWS), step, x, k >> 5, rows, out)
            for r in range(rows):
                store_f32_n(y + stride * (first + r) + 4 * i, load_f32(out + 64 * r), n - i)


@jit
def pack(token, args, thread, threads):
    """args: rows, bytes a row, panels, bytes a panel, N, K: (N, K) -> panels, which hold zeros."""
    source, stride, panels, step = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n, k = arg(args, 4), arg(args, 5)
    start, stop = share(n, ROWS, thread, threads)
    for i in range(start, stop, ROWS):
        panel = panels + step * (i // ROWS)
        for b in range(k // (32 * block_groups(token))):
            for lane in range(min(ROWS, stop - i)):
                pack_block(token, source + stride * (i + lane), b, panel, lane)


@kernel
def gemv_panels_q8_0(args, thread, threads):
    """q8_0 W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q8_0, args, thread, threads)


@kernel
def gemv_panels_q4_0(args, thread, threads):
    """q4_0 W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q4_0, args, thread, threads)


@kernel
def gemv_panels_q4_1(args, thread, threads):
    """q4_1 W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q4_1, args, thread, threads)


@kernel
def gemv_panels_q4_k(args, thread, threads):
    """q4_k W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q4_K, args, thread, threads)


@kernel
def gemv_panels_q5_k(args, thread, threads):
    """q5_k W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q5_K, args, thread, threads)


@kernel
def gemv_panels_q6_k(args, thread, threads):
    """q6_k W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(Q6_K, args, thread, threads)


@kernel
def gemv_panels_affine4(args, thread, threads):
    """affine4 W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(AFFINE4, args, thread, threads)


@kernel
def gemv_panels_affine8(args, thread, threads):
    """affine8 W (N, K) in panels, records of x (K,) -> y (N,)."""
    gemv(AFFINE8, args, thread, threads)


@kernel
def gemm_panels_affine4(args, thread, threads):
    """affine4 W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(AFFINE4, args, thread, threads)


@kernel
def gemm_panels_affine8(args, thread, threads):
    """affine8 W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(AFFINE8, args, thread, threads)


@kernel
def gemm_panels_q8_0(args, thread, threads):
    """q8_0 W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q8_0, args, thread, threads)


@kernel
def gemm_panels_q4_0(args, thread, threads):
    """q4_0 W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q4_0, args, thread, threads)


@kernel
def gemm_panels_q4_1(args, thread, threads):
    """q4_1 W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q4_1, args, thread, threads)


@kernel
def gemm_panels_q4_k(args, thread, threads):
    """q4_k W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q4_K, args, thread, threads)


@kernel
def gemm_panels_q5_k(args, thread, threads):
    """q5_k W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q5_K, args, thread, threads)


@kernel
def gemm_panels_q6_k(args, thread, threads):
    """q6_k W (N, K) in panels, records of X (M, K) -> Y (M, N)."""
    gemm(Q6_K, args, thread, threads)


@kernel
def pack_q8_0(args, thread, threads):
    """q8_0 rows (N, K) -> panels."""
    pack(Q8_0, args, thread, threads)


@kernel
def pack_q4_0(args, thread, threads):
    """q4_0 rows (N, K) -> panels."""
    pack(Q4_0, args, thread, threads)


@kernel
def pack_q4_1(args, thread, threads):
    """q4_1 rows (N, K) -> panels."""
    pack(Q4_1, args, thread, threads)


@kernel
def pack_q4_k(args, thread, threads):
    """q4_k rows (N, K) -> panels."""
    pack(Q4_K, args, thread, threads)


@kernel
def pack_q5_k(args, thread, threads):
    """q5_k rows (N, K) -> panels."""
    pack(Q5_K, args, thread, threads)


@kernel
def pack_q6_k(args, thread, threads):
    """q6_k rows (N, K) -> panels."""
    pack(Q6_K, args, thread, threads)
