"""Fast products of many rows with weights in panels: activations of 8 bits, Y = X W.

Dims: M rows of X, N outputs, K inputs in groups of 32; W (N, K) in panels of 16 rows (panels.py).

As panel_products.py, with a scale for each group of activations, which are integers from -127 to
127: one product of bytes for each weight where 15 bits take two. An activation is off by at most
1 / 254 of the largest of its group. A tile (panel_tiles.py) is ROWS rows of X times PANELS panels.
"""

import numpy as np

from ..registry import register_kernel
from . import panel_products
from .affine import AFFINE4, AFFINE8, HALVES
from .jit import Kernel, arg, inline, jit, kernel, share
from .machine_code import overload_inline
from .panel_products import LEAST, begin, put_fields
from .panel_tiles import (
    BEFORE, LIMIT, PANELS, RECORD, ROW_BYTES, ROWS, by_panel, dots, dots_above, dots_above_first,
    dots_above_last, dots_first, dots_last, fma_tiles, load_tile, mul_tiles, narrow16,
    scales_by_row, store_tile, sums_by_row,
)  # fmt: skip
from .panels import Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, bytes_ahead
from .quads import SUPPORTED, largest32
from .simd import JIT
from .vector import load_f32, prefetch, store_f32, store_f32_n, zero

COLUMNS = 16 * PANELS
BLOCK_BYTES = 400_000  # of records that are multiplied with one panel after the other, in L2
MOST_ROWS = 128  # of a block: their sums stay in the first cache


def block_rows(k):
    """Rows of X, whole tiles, that are multiplied with two panels at a time."""
    return max(ROWS, min(MOST_ROWS, BLOCK_BYTES // (RECORD * (k // 32)) // ROWS * ROWS))


def record_bytes(m, k):
    """Bytes of the records of X (M, K), and of rows that fill up its last tile."""
    return RECORD * -(-m // ROWS) * ROWS * (k // 32)


def scratch_bytes(most):
    """Bytes of working memory a thread needs: the sums of a block."""
    return ROW_BYTES * most


# -- records -------------------------------------------------------------------------------------


@jit
def quantize(x, k, records, step):
    """x (K,) float32 -> (K / 32,) fast records, `step` bytes apart."""
    for g in range(k >> 5):
        p, out = x + 128 * g, records + step * g
        largest = largest32(p)
        inverse = LIMIT / largest if largest > LEAST else np.float32(0)
        first, last = narrow16(p, inverse, out), narrow16(p + 64, inverse, out + 16)
        put_fields(out + BEFORE, largest / LIMIT, first, last)


@jit
def clear(records, k, step):
    """(K / 32,) records of no row, zeros."""
    for g in range(k >> 5):
        store_f32(records + step * g, zero())  # a vector is as long


@kernel
def quantize_bytes(args, thread, threads):
    """X (M, K), rows `stride` bytes apart -> fast records (M blocks, K / 32, rows of the block),
    those beyond X zeros.

    args: X, stride, records, M, K, rows a block.
    """
    x, stride, records = arg(args, 0), arg(args, 1), arg(args, 2)
    m, k, most = arg(args, 3), arg(args, 4), arg(args, 5)
    whole = (m + ROWS - 1) // ROWS * ROWS
    start, stop = share(whole, ROWS, thread, threads)
    for i in range(start, stop):
        first = i // most * most
        out, rows = records + RECORD * (first * (k >> 5) + i - first), min(most, whole - first)
        if i < m:
            quantize(x + stride * i, k, out, RECORD * rows)
        else:
            clear(out, k, RECORD * rows)


# -- a group of two panels times all rows of a block ----------------------------------------------


def scaled(encoding):
    """scale times the sum of products."""
    read, products = encoding.read, dots[encoding.start]

    def add(token, one, two, g, x, rows, out):
        q, s = read(one, g)
        r, t = read(two, g)
        for i in range(0, rows, ROWS):
            record, total = x + RECORD * i, out + ROW_BYTES * i
            factor = mul_tiles(by_panel(s, t), scales_by_row(record))
            sums = products(q, r, record)
            store_tile(total, fma_tiles(sums, factor, load_tile(total)))

    return add


def offset(encoding):
    """The same plus an offset times the activations' sum."""
    read, products = encoding.read, dots[encoding.start]

    def add(token, one, two, g, x, rows, out):
        q, s, a = read(one, g)
        r, t, b = read(two, g)
        for i in range(0, rows, ROWS):
            record, total = x + RECORD * i, out + ROW_BYTES * i
            factor = mul_tiles(by_panel(s, t), scales_by_row(record))
            sums = products(q, r, record)
            so_far = fma_tiles(by_panel(a, b), sums_by_row(record), load_tile(total))
            store_tile(total, fma_tiles(sums, factor, so_far))

    return add


def halves(encoding):
    """Two scales: of the first 16 elements, and of the last."""
    read = encoding.read

    def add(token, one, two, g, x, rows, out):
        q, s, a = read(one, g)
        r, t, b = read(two, g)
        for i in range(0, rows, ROWS):
            record, total = x + RECORD * i, out + ROW_BYTES * i
            terms = mul_tiles(by_panel(s, t), dots_first(q, r, record))
            terms = fma_tiles(by_panel(a, b), dots_last(q, r, record), terms)
            store_tile(total, fma_tiles(terms, scales_by_row(record), load_tile(total)))

    return add


@jit
def add_above(q, r, s, t, zeros, points, x, rows, out):
    """Zero points of the rows of W: of the one panel, and of the other."""
    for i in range(0, rows, ROWS):
        record, total = x + RECORD * i, out + ROW_BYTES * i
        factor = mul_tiles(by_panel(s, t), scales_by_row(record))
        sums = dots_above(q, r, record, zeros, points)
        store_tile(total, fma_tiles(sums, factor, load_tile(total)))


@jit
def add_above_halves(q, r, s, t, a, b, zeros, points, last_zeros, last_points, x, rows, out):
    """The same with two scales and zero points: a, b and `last_*` are the last elements'."""
    for i in range(0, rows, ROWS):
        record, total = x + RECORD * i, out + ROW_BYTES * i
        terms = mul_tiles(by_panel(s, t), dots_above_first(q, r, record, zeros, points))
        last = dots_above_last(q, r, record, last_zeros, last_points)
        terms = fma_tiles(by_panel(a, b), last, terms)
        store_tile(total, fma_tiles(terms, scales_by_row(record), load_tile(total)))


def above(encoding):
    """Zero points, and perhaps two scales: the panels' heads say it."""
    read = encoding.read

    def add(token, one, two, g, x, rows, out):
        q, s, a, zeros, last_zeros, flags = read(one, g)
        r, t, b, points, last_points, _ = read(two, g)
        if flags & HALVES:
            add_above_halves(q, r, s, t, a, b, zeros, points, last_zeros, last_points, x, rows, out)
        else:
            add_above(q, r, s, t, zeros, points, x, rows, out)

    return add


FORMS = {"scaled": scaled, "offset": offset, "halves": halves, "above": above}


def add_two(token, one, two, g, x, rows, out):
    """Add group g of two panels times `rows` records at x to out (rows, PANELS, 16)."""
    FORMS[token.form](token)(token, one, two, g, x, rows, out)


if JIT:

    @overload_inline(add_two)
    def _add_two(token, one, two, g, x, rows, out):
        return FORMS[token.token.form](token.token)


# -- products ------------------------------------------------------------------------------------


@inline
def begin_rows(out, y, stride, rows, whole, n, onto):
    """out (whole, PANELS, 16) = 0, or the `rows` rows at y that the product is added to."""
    for r in range(whole):
        for p in range(PANELS):
            left = n - 16 * p if r < rows else 0
            begin(out + ROW_BYTES * r + 64 * p, y + stride * r + 64 * p, left, onto)


@jit
def two_panels(token, one, two, nbytes, x, groups, rows, out):
    """Two panels of `nbytes` times records (groups, rows), added to out (rows, PANELS, 16)."""
    each, ahead = nbytes // groups, bytes_ahead(token)
    for g in range(groups):
        for line in range(each * g + ahead, each * (g + 1) + ahead, 64):
            prefetch(one + line)
            prefetch(two + line)
        add_two(token, one, two, g, x + RECORD * rows * g, rows, out)


@jit
def gemm(token, args, thread, threads):
    """args: panels, bytes a panel, records, Y, bytes a row of Y, M, N, K, rows a block, scratch,
    its bytes a thread, whether to add to Y."""
    panels, step, records, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    stride, m, n, groups = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7) >> 5
    most, out, onto = arg(args, 8), arg(args, 9) + arg(args, 10) * thread, arg(args, 11)
    start, stop = share(n, COLUMNS, thread, threads)
    for first in range(0, m, most):
        rows = min(most, m - first)
        whole, x = (rows + ROWS - 1) // ROWS * ROWS, records + RECORD * first * groups
        for i in range(start, stop, COLUMNS):
            one = panels + step * (i // 16)
            two = one + step if i + 16 < n else one  # its products are not stored
            where = y + stride * first + 4 * i
            begin_rows(out, where, stride, rows, whole, n - i, onto)
            two_panels(token, one, two, step, x, groups, whole, out)
            for r in range(rows):
                for p in range(PANELS):
                    sums = load_f32(out + ROW_BYTES * r + 64 * p)
                    store_f32_n(where + stride * r + 64 * p, sums, n - i - 16 * p)


@kernel
def gemm_bytes_panels_q8_0(args, thread, threads):
    """q8_0 W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q8_0, args, thread, threads)


@kernel
def gemm_bytes_panels_q4_0(args, thread, threads):
    """q4_0 W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q4_0, args, thread, threads)


@kernel
def gemm_bytes_panels_q4_1(args, thread, threads):
    """q4_1 W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q4_1, args, thread, threads)


@kernel
def gemm_bytes_panels_q4_k(args, thread, threads):
    """q4_k W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q4_K, args, thread, threads)


@kernel
def gemm_bytes_panels_q5_k(args, thread, threads):
    """q5_k W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q5_K, args, thread, threads)


@kernel
def gemm_bytes_panels_q6_k(args, thread, threads):
    """q6_k W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(Q6_K, args, thread, threads)


@kernel
def gemm_bytes_panels_affine4(args, thread, threads):
    """affine4 W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(AFFINE4, args, thread, threads)


@kernel
def gemm_bytes_panels_affine8(args, thread, threads):
    """affine8 W (N, K) in panels, fast records of X (M, K) -> Y (M, N)."""
    gemm(AFFINE8, args, thread, threads)


def _choose():
    """Register what runs at a precision: at "fast" these, where they pay."""
    for fast in [f for f in globals().values() if isinstance(f, Kernel)]:
        kind, _, rest = fast.name.partition("_panels_")
        if kind == "gemm_bytes":
            exact = getattr(panel_products, f"gemm_panels_{rest}")
            register_kernel(f"gemm_exact_panels_{rest}", exact)
            register_kernel(f"gemm_fast_panels_{rest}", fast if SUPPORTED else exact)


_choose()
