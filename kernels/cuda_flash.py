"""Attention of many new tokens over a cache, on a GPU, by its tensor cores.

Dims: T tokens, H query heads, KV heads of keys and values, G = H / KV, D head size (a multiple of
16), P positions of the cache, of which this pass's own are written already. A block of WARPS warps
has 16 queries of one head a warp, and walks over the keys in tiles of TILE.

Scores and weights stay in registers: what a warp has of a product (16, 8) is laid out as the first
factor of the next one wants it. Sources: Dao, "FlashAttention-2" (2023); PTX ISA, "Matrix fragments
for mma.m16n8k16".
"""

from functools import cache

from .cuda_attention import LOG2E, LOWEST, capped
from .cuda_gemm import copy_rows, multiply_twice, make_copy_rows, copy_now, nothing
from .cuda_kernel import CudaKernel, device
from .cuda_prims import (
    cuda, exp2, float32, int32, int64, load_f32, load_i64, pack_halves, shared_memory, shuffle_xor,
    store_f32, store_shared_f16,
)  # fmt: skip
from .cuda_tensor_prims import (
    commit_copies, load_matrices, load_turned_matrices, multiply_16, wait_all_copies,
)  # fmt: skip


@device
def of_quad(value):
    """The largest of the four lanes that share a row."""
    value = max(value, shuffle_xor(value, 1))
    return max(value, shuffle_xor(value, 2))


@device
def sum_of_quad(value):
    """The sum of the four lanes that share a row."""
    value += shuffle_xor(value, 1)
    return value + shuffle_xor(value, 2)


@device
def load_queries(shared, q, row0, tokens, q_heads, head, factor, queries, size, thread, threads):
    """Rows of q, times a factor, as halves in shared memory; zeros for what is outside."""
    pitch = 2 * size + 16
    for i in range(thread, queries * size, threads):
        row, column, value = i // size, i % size, float32(0)
        if row0 + row < tokens:
            at = q + 4 * (int64((row0 + row) * q_heads + head) * size + column)
            value = load_f32(at) * factor
        store_shared_f16(shared + row * pitch + 2 * column, value)


def make_products(multiply):
    """The device functions of a tile's two products."""

    @device
    def both(a, b, total, o):
        """Add the products of (16, 16) with two (16, 8) to 8 sums from `o` on."""
        s = multiply(
            a[0], a[1], a[2], a[3], b[0], b[1],
            total[o], total[o + 1], total[o + 2], total[o + 3],
        )  # fmt: skip
        t = multiply(
            a[0], a[1], a[2], a[3], b[2], b[3],
            total[o + 4], total[o + 5], total[o + 6], total[o + 7],
        )  # fmt: skip
        for i in range(4):
            total[o + i], total[o + 4 + i] = s[i], t[i]

    @device
    def scores_of(queries, keys, score, deep, across, pitch):
        """Queries of a warp times the keys of a tile."""
        for i in range(8 * across):
            score[i] = float32(0)
        for d in range(deep):
            a = load_matrices(queries + 32 * d)
            for j in range(across):
                both(a, load_matrices(keys + 16 * j * pitch + 32 * d), score, 8 * j)

    @device
    def add_values(score, values, total, wide, across, pitch):
        """Weights of a tile times its values."""
        for k in range(across):
            o = 8 * k
            a = (
                pack_halves(score[o], score[o + 1]), pack_halves(score[o + 2], score[o + 3]),
                pack_halves(score[o + 4], score[o + 5]), pack_halves(score[o + 6], score[o + 7]),
            )  # fmt: skip
            for j in range(wide):
                both(a, load_turned_matrices(values + 16 * k * pitch + 32 * j), total, 8 * j)

    return scores_of, add_values


@device
def weigh(score, total, largest, weights, half, position, column, window, softcap, across, wide):
    """Scores of one of a lane's two rows -> weights, and what was summed so far in their unit."""
    most = largest[half]
    for j in range(2 * across):
        for i in range(2):
            key, o = column + 8 * j + i, 4 * j + 2 * half + i
            value = score[o]
            if softcap > float32(0):
                value = capped(value, softcap) * float32(LOG2E)
            near = window == 0 or key > position - window
            value = value if key <= position and near else float32(LOWEST)
            score[o] = value
            most = max(most, value)
    most = of_quad(most)
    old, summed = exp2(largest[half] - most), float32(0)
    for j in range(2 * across):
        for i in range(2):
            o = 4 * j + 2 * half + i
            value = float32(0) if score[o] == float32(LOWEST) else exp2(score[o] - most)
            score[o] = value
            summed += value
    largest[half], weights[half] = most, weights[half] * old + summed
    for j in range(2 * wide):
        total[4 * j + 2 * half] *= old
        total[4 * j + 2 * half + 1] *= old


@device
def store_row(y, total, summed, half, wide):
    """One of a lane's two rows, divided by the sum of its weights."""
    for j in range(2 * wide):
        store_f32(y + 32 * j, total[4 * j + 2 * half] / summed)
        store_f32(y + 32 * j + 4, total[4 * j + 2 * half + 1] / summed)


@cache
def prefill_attention(size, warps=4, tile=64, since=(8, 0)):
    """The kernel for heads of `size` (D) elements, of so many warps and keys at a time."""
    newer = since >= (8, 0)
    copy_tile = copy_rows if newer else make_copy_rows(copy_now)
    commit, wait = (commit_copies, wait_all_copies) if newer else (nothing, nothing)
    scores_of, add_values = make_products(multiply_16 if newer else multiply_twice)
    queries, threads, chunks, pitch = 16 * warps, 32 * warps, size // 8, 2 * size + 16
    across, wide = tile // 16, size // 16
    scores, sums = 8 * across, 8 * wide
    keys_at, values_at = queries * pitch, (queries + tile) * pitch

    def attend(q, keys, values, past, y, tokens, q_heads, group, positions, window, scale, softcap):
        """q (T, H, D) float32, keys and values (KV, P, D) float16, *past int64 -> y (T, H, D)
        float32; each token sees those before it, of a `window` (0: no bound) the newest."""
        thread, head = int32(cuda.threadIdx.x), int32(cuda.blockIdx.y)
        lane, warp, row0 = thread % 32, thread // 32, int32(cuda.blockIdx.x) * queries
        shared, before = shared_memory(), int32(load_i64(past))
        length, cache = before + tokens, 2 * int64(head // group) * positions * size
        factor = scale if softcap > float32(0) else scale * float32(LOG2E)
        load_queries(shared, q, row0, tokens, q_heads, head, factor, queries, size, thread, threads)
        total, score = cuda.local.array(sums, float32), cuda.local.array(scores, float32)
        largest, weights = cuda.local.array(2, float32), cuda.local.array(2, float32)
        for i in range(sums):
            total[i] = float32(0)
        for i in range(2):
            largest[i], weights[i] = float32(LOWEST), float32(0)
        first = before + row0 + 16 * warp + lane // 4  # the position of this lane's upper row
        start = max(before + row0 + 1 - window, 0) // tile * tile if window > 0 else 0
        query_lane = shared + (16 * warp + lane % 16) * pitch + 16 * (lane // 16)
        key_lane = shared + keys_at + (lane % 8 + 8 * (lane // 16)) * pitch + 16 * (lane // 8 % 2)
        value_lane = shared + values_at + lane % 16 * pitch + 16 * (lane // 16)
        for key0 in range(start, min(length, before + row0 + queries), tile):
            cuda.syncthreads()
            to, source = shared + keys_at, keys + cache
            copy_tile(to, source, key0, length, 0, size, tile, chunks, pitch, thread, threads)
            to, source = shared + values_at, values + cache
            copy_tile(to, source, key0, length, 0, size, tile, chunks, pitch, thread, threads)
            commit()
            wait()
            cuda.syncthreads()
            scores_of(query_lane, key_lane, score, wide, across, pitch)
            column = key0 + 2 * (lane % 4)
            for half in range(2):
                weigh(
                    score, total, largest, weights, half, first + 8 * half, column, window,
                    softcap, across, wide,
                )  # fmt: skip
            add_values(score, value_lane, total, wide, across, pitch)
        for half in range(2):
            summed = sum_of_quad(weights[half])
            row = row0 + 16 * warp + lane // 4 + 8 * half
            if row < tokens:
                to = y + 4 * (int64(row * q_heads + head) * size + 2 * (lane % 4))
                store_row(to, total, summed, half, wide)

    return CudaKernel(
        f"prefill_attention_{size}_{warps}_{tile}_{since[0]}{since[1]}", attend, "aaaaaiiiiiff",
        threads=threads, resident=1, shared=(queries + 2 * tile) * pitch, since=since,
    )  # fmt: skip
