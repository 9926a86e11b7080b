"""Matrix times matrix: Y = X W, for every encoding and both storage orders.

Dims: M rows of X, N columns of W, K common. X (M, K) and Y (M, N) are float32. Row order: W is
stored (N, K); column order: W is stored (K, N). R = TILE_ROWS.

Blocked after Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008):
X is packed once into (K blocks, M panels, k, R); each thread decodes panels of 32 columns of W to
float32, (k, 32), and runs the register tile over all M panels while they are in its cache.
"""

from .decode import decode_row
from .encoding import element, unpack
from .jit import arg, jit, kernel, share
from .quant import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, UINT8
from .tile import TILE_COLUMNS, TILE_ROWS, tile_many
from .vector import (
    load_f32, load_f32_n, peek_f32, poke_f32, store_f32, store_f32_n, transpose16, zero,
)  # fmt: skip

BLOCK = 256  # of K: a panel of W, 32 KB, stays in the first cache, and no block encoding is cut
PANEL_BYTES = 4 * BLOCK * TILE_COLUMNS


def scratch_bytes(m):
    """Bytes of working memory a thread needs for M rows: decoded rows, a panel, its products."""
    panels = (m + TILE_ROWS - 1) // TILE_ROWS
    return 2 * PANEL_BYTES + 4 * TILE_COLUMNS * TILE_ROWS * panels


@kernel
def gemm_pack(args, thread, threads):
    """X (M, K), rows `stride` bytes apart -> packed (K blocks, M panels, k, R), zero padded.

    args: X, stride, packed, M, K.
    """
    x, stride, packed, m, k = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4)
    panels = (m + TILE_ROWS - 1) // TILE_ROWS
    start, stop = share(panels, 1, thread, threads)
    for panel in range(start, stop):
        for k0 in range(0, k, BLOCK):
            length = min(BLOCK, k - k0)
            out = packed + 4 * TILE_ROWS * (k0 * panels + panel * length)
            first = panel * TILE_ROWS
            done = 0
            if first + 16 <= m:
                # Each store of 16 lanes spills into what the next ones overwrite; the last 16
                # elements are stored singly, so that nothing spills into another's panel.
                done = max(0, (length - 16) // 16 * 16)
                for j in range(0, done, 16):
                    source = x + stride * first + 4 * (k0 + j)
                    transpose16(source, stride, out + 4 * TILE_ROWS * j, 4 * TILE_ROWS)
            for i in range(TILE_ROWS):
                source = x + stride * (first + i) + 4 * k0
                for j in range(done, length):
                    value = peek_f32(source + 4 * j) if first + i < m else 0.0
                    poke_f32(out + 4 * (TILE_ROWS * j + i), value)


@jit
def panel_from_rows(token, weights, stride, n, n0, k0, k1, decoded, panel):
    """Columns n0 .. n0 + 32 of W stored (N, K), elements k0 .. k1 -> panel (k1 - k0, 32)."""
    for i in range(TILE_COLUMNS):
        out = decoded + 4 * BLOCK * i
        if n0 + i < n:
            decode_row(token, weights + stride * (n0 + i), out, k0, k1)
        else:
            for j in range(0, BLOCK, 16):
                store_f32(out + 4 * j, zero())
    for k in range(0, k1 - k0, 16):  # the last rows may be beyond k1: the panel has room
        for half in range(2):
            source = decoded + 4 * BLOCK * 16 * half + 4 * k
            transpose16(source, 4 * BLOCK, panel + 128 * k + 64 * half, 128)


@jit
def panel_from_columns(token, weights, stride, n, n0, k0, k1, panel):
    """Columns n0 .. n0 + 32 of W stored (K, N), rows k0 .. k1 -> panel (k1 - k0, 32)."""
    whole = n0 + TILE_COLUMNS <= n
    for k in range(k0, k1):
        out, row = panel + 128 * (k - k0), weights + stride * k
        if whole:
            low, high = unpack(token, row, n0 >> 5)
            store_f32(out, low)
            store_f32(out + 64, high)
        else:
            store_f32(out, zero())
            store_f32(out + 64, zero())
            for j in range(n0, n):
                poke_f32(out + 4 * (j - n0), element(token, row, j))


@jit
def begin_products(products, rows, onto, y, stride, m, n, n0):
    """Products (rows, 32): zeros, or `onto` columns n0 .. n0 + 32 of what Y (M, N) holds."""
    for i in range(0, 128 * rows, 64):
        store_f32(products + i, zero())
    if onto:
        for i in range(m):
            source, out = y + stride * i + 4 * n0, products + 128 * i
            store_f32(out, load_f32_n(source, n - n0))
            store_f32(out + 64, load_f32_n(source + 64, n - n0 - 16))


@jit
def store_products(products, y, stride, m, n, n0):
    """(M, 32) products -> columns n0 .. n0 + 32 of Y (M, N)."""
    for i in range(m):
        source, out = products + 128 * i, y + stride * i + 4 * n0
        if n0 + TILE_COLUMNS <= n:
            store_f32(out, load_f32(source))
            store_f32(out + 64, load_f32(source + 64))
        else:
            store_f32_n(out, load_f32(source), n - n0)
            store_f32_n(out + 64, load_f32(source + 64), n - n0 - 16)


@jit
def gemm(token, by_rows, args, thread, threads):
    """args: W, bytes a row, packed X, Y, bytes a row of Y, M, N, K, whether to add to Y, scratch,
    its bytes a thread."""
    weights, stride, packed, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    y_stride, m, n, k, onto = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    decoded = arg(args, 9) + arg(args, 10) * thread
    panel, products = decoded + PANEL_BYTES, decoded + 2 * PANEL_BYTES
    panels = (m + TILE_ROWS - 1) // TILE_ROWS
    start, stop = share(n, TILE_COLUMNS, thread, threads)
    for n0 in range(start, stop, TILE_COLUMNS):
        begin_products(products, TILE_ROWS * panels, onto, y, y_stride, m, n, n0)
        for k0 in range(0, k, BLOCK):
            k1 = min(k, k0 + BLOCK)
            if by_rows:
                panel_from_rows(token, weights, stride, n, n0, k0, k1, decoded, panel)
            else:
                panel_from_columns(token, weights, stride, n, n0, k0, k1, panel)
            for i in range(panels):
                left = packed + 4 * TILE_ROWS * (k0 * panels + i * (k1 - k0))
                tile_many(left, panel, 128, products + 128 * TILE_ROWS * i, 128, k1 - k0)
        store_products(products, y, y_stride, m, n, n0)


@kernel
def gemm_rows_float32(args, thread, threads):
    """float32 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, True, args, thread, threads)


@kernel
def gemm_rows_float16(args, thread, threads):
    """float16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, True, args, thread, threads)


@kernel
def gemm_rows_bfloat16(args, thread, threads):
    """bfloat16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, True, args, thread, threads)


@kernel
def gemm_rows_q8_0(args, thread, threads):
    """q8_0 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q8_0, True, args, thread, threads)


@kernel
def gemm_rows_q4_0(args, thread, threads):
    """q4_0 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q4_0, True, args, thread, threads)


@kernel
def gemm_rows_q4_1(args, thread, threads):
    """q4_1 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q4_1, True, args, thread, threads)


@kernel
def gemm_rows_q4_k(args, thread, threads):
    """q4_k W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q4_K, True, args, thread, threads)


@kernel
def gemm_rows_q5_k(args, thread, threads):
    """q5_k W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q5_K, True, args, thread, threads)


@kernel
def gemm_rows_q6_k(args, thread, threads):
    """q6_k W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(Q6_K, True, args, thread, threads)


@kernel
def gemm_columns_float32(args, thread, threads):
    """float32 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, False, args, thread, threads)


@kernel
def gemm_columns_float16(args, thread, threads):
    """float16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, False, args, thread, threads)


@kernel
def gemm_columns_bfloat16(args, thread, threads):
    """bfloat16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, False, args, thread, threads)


@kernel
def gemm_columns_uint8(args, thread, threads):
    """uint8 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(UINT8, False, args, thread, threads)
