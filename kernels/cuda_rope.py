"""Rotary position embedding, embedding tables and appending to a cache, on a GPU.

Dims: T tokens, H heads, D head size, R rotated elements of each head (R <= D); V rows of a table of
K elements; P positions of a cache. Source: see rope.py.
"""

from .cuda_kernel import cuda_kernel
from .cuda_prims import (
    cuda, float32, int32, int64, load_f16, load_f32, load_i8, load_i64, load_u32, store_f16,
    store_f32,
)  # fmt: skip

THREADS = 256
BLOCK = 32  # elements of a row that share a scale


@cuda_kernel("aaaaiiiii", threads=THREADS)
def rotate(x, y, cos, sin, tokens, heads, size, rotated, interleaved):
    """x (T, H, D), cos and sin (T, R / 2) float32 -> y (T, H, D); pairs are (i, i + R / 2), or
    neighbours when `interleaved`. A thread has a pair, or two elements that are only copied."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    pairs, half = size // 2, rotated // 2
    if i < tokens * heads * pairs:
        head, pair = i // pairs, i % pairs
        base = 4 * int64(head) * size
        if pair < half:
            first = 2 * pair if interleaved else pair
            second = 2 * pair + 1 if interleaved else pair + half
            angle = 4 * (int64(head // heads) * half + pair)
            c, s = load_f32(cos + angle), load_f32(sin + angle)
            u, v = load_f32(x + base + 4 * first), load_f32(x + base + 4 * second)
            store_f32(y + base + 4 * first, u * c - v * s)
            store_f32(y + base + 4 * second, u * s + v * c)
        else:
            store_f32(y + base + 8 * pair, load_f32(x + base + 8 * pair))
            store_f32(y + base + 8 * pair + 4, load_f32(x + base + 8 * pair + 4))


@cuda_kernel("aaaiiii", threads=THREADS)
def append(x, cache, past, tokens, heads, size, positions):
    """x (T, H, D) float32 -> the rows from *past on of a cache (H, P, D) float16; `past` is the
    address of an int64."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < tokens * heads * size:
        token, rest = i // (heads * size), i % (heads * size)
        head, element = rest // size, rest % size
        position = load_i64(past) + token
        if position < positions:
            to = (int64(head) * positions + position) * size + element
            store_f16(cache + 2 * to, load_f32(x + 4 * int64(i)))


@cuda_kernel("aaali", threads=THREADS)
def rows_f16(table, ids, y, rows, k):
    """table (V, K) float16, ids (T,) int64 -> y (T, K) float32; ids below 0 count from the end. A
    block's y is the token."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < k:
        token = int64(cuda.blockIdx.y)
        number = load_i64(ids + 8 * token)
        number = number + rows if number < 0 else number
        store_f32(y + 4 * (token * k + i), load_f16(table + 2 * (number * k + i)))


@cuda_kernel("aaali", threads=THREADS)
def rows_f32(table, ids, y, rows, k):
    """table (V, K) float32, ids (T,) int64 -> y (T, K) float32, in the same way."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < k:
        token = int64(cuda.blockIdx.y)
        number = load_i64(ids + 8 * token)
        number = number + rows if number < 0 else number
        store_f32(y + 4 * (token * k + i), load_f32(table + 4 * (number * k + i)))


@cuda_kernel("aaaali", threads=THREADS)
def rows_i8(table, scales, ids, y, rows, k):
    """table (V, K) int8, scales (V, K / 32) float16, ids (T,) int64 -> y (T, K) float32."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < k:
        token = int64(cuda.blockIdx.y)
        number = load_i64(ids + 8 * token)
        number = number + rows if number < 0 else number
        at = number * k + i
        value = float32(load_i8(table + at)) * load_f16(scales + 2 * (at // BLOCK))
        store_f32(y + 4 * (token * k + i), value)


@cuda_kernel("aaaali", threads=THREADS)
def rows_i4(table, scales, ids, y, rows, k):
    """table (V, K) int4 as cuda_gemv.py stores it, scales (V, K / 32), ids (T,) -> y (T, K)."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < k:
        token = int64(cuda.blockIdx.y)
        number = load_i64(ids + 8 * token)
        number = number + rows if number < 0 else number
        at = number * k + i
        word = int64(load_u32(table + 4 * (at // 8)))
        shift = 4 * (at % 8 // 2) + 16 * (at % 2)
        value = float32(((word >> shift) & 15) - 8)
        store_f32(y + 4 * (token * k + i), value * load_f16(scales + 2 * (at // BLOCK)))
