"""Matrix times matrix in bfloat16: Y = X W, sums in float32.

Dims: M rows of X, N columns of W, K common. X (M, K) and Y (M, N) are float32. Row order: W is
stored (N, K); column order: W is stored (K, N).

As gemm.py, with the tiles of tile_bf16.py: X is packed once into (M panels, K / 32, 16, 32), each
thread turns 32 columns of W at a time into pairs along K, (k / 2, 32, 2), and multiplies all panels
of X with them.

`gemm_bf16` rounds both factors to 8 bits: an error of at most 2 ** -8 of each. `gemm_split` writes
each as a sum of two bfloat16, W = A + B and X = C + D, and adds up A C + A D + B C: what is left
out is below 2 ** -15 of the product.
"""

from ..registry import register_kernel
from . import gemm as exact
from .encoding import element, unpack
from .gemm import BLOCK, begin_products
from .jit import Kernel, arg, inline, jit, kernel, share
from .quant import BFLOAT16, FLOAT16, FLOAT32
from .tile_bf16 import (
    AMX, BLOCK_BYTES, COLUMNS, PANEL, SUPPORTED, rest_bf16, store_bf16, store_bf16_pairs, tile8,
    tiles_begin, tiles_end, tiles_one, tiles_two,
)  # fmt: skip
from .vector import (
    load_f32, load_f32_n, poke_f32, store_f32_n, transpose16, zero,
)  # fmt: skip

EDGE_BYTES = 128  # a row's last elements, filled up with zeros
STAGE_BYTES = 2 * BLOCK * PANEL  # 16 rows of W, rounded
PAIR_BYTES = 2 * BLOCK * COLUMNS


def packed_bytes(m, k):
    """Bytes of X (M, K) packed."""
    return -(-m // PANEL) * -(-k // 32) * BLOCK_BYTES


def scratch_bytes(m):
    """Bytes of working memory a thread needs: staged rows, pairs, their products with M rows."""
    return EDGE_BYTES + STAGE_BYTES + PAIR_BYTES + 4 * COLUMNS * PANEL * -(-m // PANEL)


@inline
def part_of(x, part):
    """The part of (16,) that is stored as bfloat16 next: all, or what the first rounding left."""
    return rest_bf16(x) if part else x


@jit
def pack(parts, args, thread, threads):
    """args: X, bytes a row, packed, M, K. The second part lies behind the first."""
    x, stride, packed, m, k = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4)
    blocks = (k + 31) >> 5
    start, stop = share((m + PANEL - 1) // PANEL * PANEL, PANEL, thread, threads)
    for i in range(start, stop):
        out = packed + BLOCK_BYTES * blocks * (i // PANEL) + 64 * (i % PANEL)
        row = x + stride * i
        for g in range(blocks):
            low, high = zero(), zero()
            if i < m and 32 * g + 32 <= k:
                low, high = load_f32(row + 128 * g), load_f32(row + 128 * g + 64)
            elif i < m:
                low = load_f32_n(row + 128 * g, k - 32 * g)
                high = load_f32_n(row + 128 * g + 64, k - 32 * g - 16)
            for part in range(parts):
                where = out + BLOCK_BYTES * (g + part * blocks * ((m + PANEL - 1) // PANEL))
                store_bf16(where, part_of(low, part), part_of(high, part))


@kernel
def gemm_bf16_pack(args, thread, threads):
    """X (M, K) -> (M panels, K / 32, 16, 32) bfloat16, zeros beyond X."""
    pack(1, args, thread, threads)


@kernel
def gemm_split_pack(args, thread, threads):
    """X (M, K) -> two parts (2, M panels, K / 32, 16, 32) bfloat16, zeros beyond X."""
    pack(2, args, thread, threads)


@jit
def group(token, row, g, k, edge):
    """Group g of a row of K elements, zeros behind them; `edge` is room for 32 floats."""
    if 32 * g + 32 <= k:
        return unpack(token, row, g)
    for i in range(32):
        poke_f32(edge + 4 * i, element(token, row, 32 * g + i) if 32 * g + i < k else 0.0)
    return load_f32(edge), load_f32(edge + 64)


@jit
def pairs_from_rows(token, part, weights, stride, n, n0, k0, k1, k, edge, pairs):
    """Columns n0 .. n0 + 32 of W stored (N, K), elements k0 .. k1 -> pairs
    ((k1 - k0) / 2, 32, 2).
    """
    stage = edge + EDGE_BYTES
    for half in range(2):
        for i in range(PANEL):
            column, out = n0 + PANEL * half + i, stage + 2 * BLOCK * i
            for g in range(k0 >> 5, k1 >> 5):
                low, high = zero(), zero()
                if column < n:
                    low, high = group(token, weights + stride * column, g, k, edge)
                where = out + 64 * (g - (k0 >> 5))
                store_bf16(where, part_of(low, part), part_of(high, part))
        for g in range((k1 - k0) >> 5):  # 16 words of 16 columns, each a pair
            transpose16(stage + 64 * g, 2 * BLOCK, pairs + 2048 * g + 64 * half, 128)


@jit
def pairs_from_columns(token, part, weights, stride, n, n0, k0, k1, k, edge, pairs):
    """Columns n0 .. n0 + 32 of W stored (K, N), rows k0 .. k1 -> pairs, as above."""
    for i in range(k0, k1, 2):
        a, b, c, d = zero(), zero(), zero(), zero()
        if i < k:
            a, b = group(token, weights + stride * i, n0 >> 5, n, edge)
        if i + 1 < k:
            c, d = group(token, weights + stride * (i + 1), n0 >> 5, n, edge)
        out = pairs + 64 * (i - k0)
        store_bf16_pairs(out, part_of(a, part), part_of(c, part))
        store_bf16_pairs(out + 64, part_of(b, part), part_of(d, part))


@jit
def multiply(x, apart, pairs, out, m, k):
    """Panels of X, `apart` bytes each, times pairs (k / 2, 32, 2): out (M, 32) += products."""
    if AMX:
        for i in range(0, m - PANEL, 2 * PANEL):
            tiles_two(x + apart * (i // PANEL), apart, pairs, out + 128 * i, k)
        if (m - 1) // PANEL % 2 == 0:
            last = (m - 1) // PANEL
            tiles_one(x + apart * last, apart, pairs, out + 128 * PANEL * last, k)
    else:
        for i in range(0, m, 8):
            left = x + apart * (i // PANEL) + 64 * (i % PANEL)
            tile8(left, pairs, out + 128 * i, k)


@jit
def gemm(token, by_rows, parts, args, thread, threads):
    """args: W, bytes a row, packed X, Y, bytes a row of Y, M, N, K, whether to add to Y, scratch,
    its bytes a thread."""
    weights, stride, packed, y = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    y_stride, m, n, k, onto = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    edge = arg(args, 9) + arg(args, 10) * thread
    pairs = edge + EDGE_BYTES + STAGE_BYTES
    out = pairs + PAIR_BYTES
    padded = (k + 31) // 32 * 32
    apart, panels = BLOCK_BYTES * (padded >> 5), (m + PANEL - 1) // PANEL
    start, stop = share(n, COLUMNS, thread, threads)
    if start == stop:
        return
    tiles_begin()
    for n0 in range(start, stop, COLUMNS):
        begin_products(out, PANEL * panels, onto, y, y_stride, m, n, n0)
        for k0 in range(0, padded, BLOCK):
            k1, x = min(padded, k0 + BLOCK), packed + BLOCK_BYTES * (k0 >> 5)
            for part in range(parts):
                if by_rows:
                    pairs_from_rows(token, part, weights, stride, n, n0, k0, k1, k, edge, pairs)
                else:
                    pairs_from_columns(token, part, weights, stride, n, n0, k0, k1, k, edge, pairs)
                for other in range(parts - part):
                    multiply(x + other * apart * panels, apart, pairs, out, m, k1 - k0)
        for i in range(m):
            source, row = out + 128 * i, y + y_stride * i + 4 * n0
            store_f32_n(row, load_f32(source), n - n0)
            store_f32_n(row + 64, load_f32(source + 64), n - n0 - 16)
    tiles_end()


@kernel
def gemm_bf16_rows_float32(args, thread, threads):
    """float32 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, True, 1, args, thread, threads)


@kernel
def gemm_bf16_rows_float16(args, thread, threads):
    """float16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, True, 1, args, thread, threads)


@kernel
def gemm_bf16_rows_bfloat16(args, thread, threads):
    """bfloat16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, True, 1, args, thread, threads)


@kernel
def gemm_bf16_columns_float32(args, thread, threads):
    """float32 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, False, 1, args, thread, threads)


@kernel
def gemm_bf16_columns_float16(args, thread, threads):
    """float16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, False, 1, args, thread, threads)


@kernel
def gemm_bf16_columns_bfloat16(args, thread, threads):
    """bfloat16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, False, 1, args, thread, threads)


@kernel
def gemm_split_rows_float32(args, thread, threads):
    """float32 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, True, 2, args, thread, threads)


@kernel
def gemm_split_rows_float16(args, thread, threads):
    """float16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, True, 2, args, thread, threads)


@kernel
def gemm_split_rows_bfloat16(args, thread, threads):
    """bfloat16 W (N, K), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, True, 2, args, thread, threads)


@kernel
def gemm_split_columns_float32(args, thread, threads):
    """float32 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT32, False, 2, args, thread, threads)


@kernel
def gemm_split_columns_float16(args, thread, threads):
    """float16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(FLOAT16, False, 2, args, thread, threads)


@kernel
def gemm_split_columns_bfloat16(args, thread, threads):
    """bfloat16 W (K, N), packed X (M, K) -> Y (M, N)."""
    gemm(BFLOAT16, False, 2, args, thread, threads)


def _choose(precision, kind, wanted):
    """Register what runs at a precision: `kind` where it is wanted and there is one."""
    for found in [f for f in vars(exact).values() if isinstance(f, Kernel)]:
        product, _, rest = found.name.partition("_")
        if product == "gemm":
            better = globals().get(f"gemm_{kind}_{rest}", found)
            register_kernel(f"gemm_{precision}_{rest}", better if wanted else found)


_choose("fast", "bf16", SUPPORTED)
_choose("exact", "split", AMX)
