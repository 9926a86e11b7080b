"""Rotary position embedding, embedding tables and appending to a cache, on a GPU.

Dims: T tokens, H heads, D head size, R rotated elements of each head (R <= D); V rows of a table of
K elements; P positions of a cache. Source: see rope.py.
"""

from .cuda_kernel import cuda_kernel, device
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


@device
def turned(source, cos, sin, pair, half, interleaved):
    """Two elements of a head, and which they are: pair `pair`, turned, or two that stay."""
    first = 2 * pair if interleaved or pair >= half else pair
    second = 2 * pair + 1 if interleaved or pair >= half else pair + half
    u, v = load_f32(source + 4 * first), load_f32(source + 4 * second)
    if pair < half:
        c, s = load_f32(cos + 4 * pair), load_f32(sin + 4 * pair)
        return first, second, u * c - v * s, u * s + v * c
    return first, second, u, v


@cuda_kernel("aaaaaaaaaiiiiiii", threads=THREADS)
def rotate_append(
    q, k, v, cos, sin, y, keys, values, past, tokens, heads, kv, size, rotated, interleaved,
    positions,
):  # fmt: skip
    """q (T, H, D) -> y, rotated as by `rotate`; k, rotated, and v (T, KV, D) float32 -> the rows
    from *past (int64) on of keys and values (KV, P, D) float16. A thread has two elements."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    pairs, half, every = size // 2, rotated // 2, heads + 2 * kv
    if i < tokens * every * pairs:
        row, pair = i // pairs, i % pairs
        token, head = row // every, row % every
        angles = 4 * int64(token) * half
        position = load_i64(past) + token
        if head < heads:
            at = 4 * (int64(token) * heads + head) * size
            first, second, a, b = turned(
                q + at, cos + angles, sin + angles, pair, half, interleaved
            )
            store_f32(y + at + 4 * first, a)
            store_f32(y + at + 4 * second, b)
        elif position < positions:
            is_key = head < heads + kv
            head -= heads if is_key else heads + kv
            source = (k if is_key else v) + 4 * (int64(token) * kv + head) * size
            turning = half if is_key else 0
            first, second, a, b = turned(
                source, cos + angles, sin + angles, pair, turning, interleaved
            )
            to = (keys if is_key else values) + 2 * (int64(head) * positions + position) * size
            store_f16(to + 2 * first, a)
            store_f16(to + 2 * second, b)


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
