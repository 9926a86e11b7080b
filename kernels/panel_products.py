"""Products with weights in panels, in integer arithmetic: y = W x and Y = X W.

Dims: M rows of X, N outputs, K inputs in groups of 32; W (N, K) in panels of 16 rows (panels.py).

A group of weights is scale q + offset with unsigned q, a group of activations a record of 15-bit
integers (quads.py): their product is scale times an integer sum, plus offset times the sum of the
activations. The relative error against float32 activations is below 1e-4.
"""

import numpy as np

from .affine import AFFINE4, AFFINE8
from .jit import arg, inline, jit, kernel, share
from .panels import (
    Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, add_group, block_groups, bytes_ahead, pack_block,
    step_groups,
)  # fmt: skip
from .quads import (
    LIMIT, MINUS_8, MINUS_32_FIRST, MINUS_32_LAST, MINUS_128, RECORD, SCALE, SUM, ZERO, largest32,
    poke_i32, quantize16,
)  # fmt: skip
from .vector import load_f32, load_f32_n, poke_f32, prefetch, store_f32, store_f32_n, zero

LEAST = np.float32(1e-30)  # a group that is smaller counts as zeros: its scale has no inverse
ROWS = 16  # of W a panel
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


@jit
def panel_product(token, panel, nbytes, x, groups, rows, out):
    """16 weight rows, a panel of `nbytes`, times `rows` rows of records (groups, rows), added to
    out (rows, 16)."""
    each, step = nbytes // groups, step_groups(token)
    for g in range(0, groups, step):
        ahead = panel + each * g + bytes_ahead(token)
        for line in range(0, each * step, 64):
            prefetch(ahead + line)
        add_group(token, panel, g, x + RECORD * rows * g, rows, out)


@inline
def begin(out, y, n, onto):
    """out (16,) = 0, or the up to 16 floats at y that the product is added to."""
    store_f32(out, load_f32_n(y, n) if onto else zero())


@jit
def gemv(token, args, thread, threads):
    """args: panels, bytes a panel, records, y, N, K, scratch, its bytes a thread, whether to add to
    y."""
    panels, step, records, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    n, k, out = arg(args, 4), arg(args, 5), arg(args, 6) + arg(args, 7) * thread
    onto = arg(args, 8)
    start, stop = share(n, ROWS, thread, threads)
    for i in range(start, stop, ROWS):
        begin(out, y + 4 * i, n - i, onto)
        panel_product(token, panels + step * (i // ROWS), step, records, k >> 5, 1, out)
        store_f32_n(y + 4 * i, load_f32(out), n - i)


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
