"""Attention of few new tokens over a cache, on a GPU: split over the keys, then put together.

Dims: T tokens, H query heads, KV heads of keys and values, G = H / KV, D head size, P positions of
the cache, S splits. Keys and values are (KV, P, D) float16, D a multiple of 8.

A block has one head of keys and values, one token, some of the G queries of that head and a share
of the positions; each of its subwarps of D / 8 lanes takes a key at a time, so that every lane
loads 16 bytes of it. Where the past ends is read from memory: a captured graph stays valid as it
grows.
Sources: Dao, "FlashAttention-2" (2023); Dao et al., "Flash-Decoding" (2023).
"""

from functools import cache

from .cuda_kernel import CudaKernel, cuda_kernel, device
from .cuda_prims import (
    cuda, exp2, float32, halves, int32, int64, load_128, load_f32, load_i64, shared_f32,
    shared_memory, shuffle_xor, store_f32, store_shared_f32,
)  # fmt: skip

LOG2E = 1.4426950408889634
WARPS = 4
LOWEST = -1e30  # below every score, and e ** (LOWEST - LOWEST) is no NaN
MOST_QUERIES = 4  # of a block: their sums are kept in registers


@device
def eight(p):
    """(8,) float16 at an address that is a multiple of 16, as four pairs of float32."""
    words = load_128(p)
    a, b, c, d = halves(words[0]), halves(words[1]), halves(words[2]), halves(words[3])
    return a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]


def lanes_of(size):
    """How many lanes have a key: a power of two, of which those beyond D / 8 idle."""
    lanes = 1
    while 8 * lanes < size:
        lanes *= 2
    return lanes


def partial_bytes(tokens, heads, size, splits):
    """What the partial results take: for each a largest score, a sum of weights and D values."""
    return 4 * tokens * heads * splits * (size + 2)


def queries_of_block(group):
    """How many of the G queries of a head of keys a block has: it divides them."""
    return max(q for q in range(1, MOST_QUERIES + 1) if group % q == 0)


def make_across(lanes):
    """The device function that sums over subwarps of so many lanes."""
    steps = tuple(1 << i for i in range(5) if 1 << i < lanes)

    @device
    def across(value):
        for step in steps:
            value += shuffle_xor(value, step)
        return value

    return across


@device
def capped(score, softcap):
    """softcap tanh(score / softcap), by exponentials: the instruction for it has 11 bits."""
    x = min(max(score / softcap, float32(-20)), float32(20))
    return softcap * (float32(1) - float32(2) / (exp2(x * float32(2 * LOG2E)) + float32(1)))


@device
def take(query, k, v, inside, g, across, largest, weights, total, softcap):
    """One key and its value: into the sums of query `g`, in the unit of its largest score."""
    score = float32(0)
    for i in range(8):
        score += query[8 * g + i] * k[i]
    score = across(score)
    if softcap > float32(0):
        score = capped(score, softcap)
    score = score * float32(LOG2E) if inside else float32(LOWEST)
    most = max(largest[g], score)
    old, new = exp2(largest[g] - most), exp2(score - most)
    new = new if inside else float32(0)
    largest[g], weights[g] = most, weights[g] * old + new
    for i in range(8):
        total[8 * g + i] = total[8 * g + i] * old + new * v[i]


@device
def gather(shared, to, row, subwarps, thread):
    """What all subwarps have put into shared memory, rows of a largest score, a sum and values, as
    one such row in global memory."""
    most = float32(LOWEST)
    for other in range(subwarps):
        most = max(most, shared_f32(shared + 4 * row * other))
    for i in range(thread, row, 32 * WARPS):
        value = float32(0)
        for other in range(subwarps):
            its = shared + 4 * row * other
            value += exp2(shared_f32(its) - most) * shared_f32(its + 4 * i)
        store_f32(to + 4 * i, most if i == 0 else value)


@cache
def decode_attention(size, group):
    """The kernel for heads of `size` (D) elements and blocks of `group` queries."""
    lanes, wide = lanes_of(size), size // 8
    subwarps, row, sums = 32 // lanes * WARPS, size + 2, 8 * group
    across = make_across(lanes)

    def attend(
        q, keys, values, past, out, q_heads, queries, positions, splits, window, scale, softcap
    ):
        """q (T, H, D) float32, keys and values (KV, P, D) float16, *past int64 -> out (T, H, S,
        2 + D) float32: of each split the largest score in powers of two, the sum of the weights,
        and the values times them. `queries` is G. A window of 0 is none, a softcap of 0 too."""
        split, token = int32(cuda.blockIdx.x), int32(cuda.blockIdx.y)
        first_head, thread = int32(cuda.blockIdx.z) * group, int32(cuda.threadIdx.x)
        subwarp, lane = thread // lanes, thread % lanes
        length = int32(load_i64(past)) + token + 1
        start = max(length - window, 0) if window > 0 else 0
        share = (length - start + splits - 1) // splits
        begin, end = start + split * share, min(start + (split + 1) * share, length)
        query, total = cuda.local.array(sums, float32), cuda.local.array(sums, float32)
        largest, weights = cuda.local.array(group, float32), cuda.local.array(group, float32)
        for g in range(group):
            largest[g], weights[g] = float32(LOWEST), float32(0)
            at = q + 4 * (int64(token * q_heads + first_head + g) * size + 8 * lane)
            for i in range(8):
                query[8 * g + i] = load_f32(at + 4 * i) * scale if lane < wide else float32(0)
                total[8 * g + i] = float32(0)
        head = int64(first_head // queries) * positions * size
        base = 2 * (head + 8 * min(lane, wide - 1))
        # Every subwarp takes as many turns, or lanes would miss each other.
        turns = (max(end - begin, 0) + subwarps - 1) // subwarps
        for turn in range(turns):
            key = begin + turn * subwarps + subwarp
            at = base + 2 * int64(min(key, end - 1)) * size
            k, v = eight(keys + at), eight(values + at)
            for g in range(group):
                take(query, k, v, key < end, g, across, largest, weights, total, softcap)
        shared = shared_memory()
        mine = shared + 4 * row * subwarp
        for g in range(group):
            cuda.syncthreads()
            if lane == 0:
                store_shared_f32(mine, largest[g])
                store_shared_f32(mine + 4, weights[g])
            if lane < wide:
                for i in range(8):
                    store_shared_f32(mine + 4 * (2 + 8 * lane + i), total[8 * g + i])
            cuda.syncthreads()
            to = out + 4 * (int64(token * q_heads + first_head + g) * splits + split) * row
            gather(shared, to, row, subwarps, thread)

    return CudaKernel(
        f"decode_attention_{size}_{group}", attend, "aaaaaiiiiiff", threads=32 * WARPS,
        resident=3, shared=4 * row * subwarps,
    )  # fmt: skip


@cuda_kernel("aaii", threads=128)
def combine_splits(parts, y, splits, size):
    """parts (T H, S, 2 + D) float32 of decode_attention -> y (T H, D): a block has one row."""
    row = size + 2
    base = parts + 4 * int64(cuda.blockIdx.x) * splits * row
    most = float32(LOWEST)
    for split in range(splits):
        most = max(most, load_f32(base + 4 * split * row))
    for i in range(int32(cuda.threadIdx.x), size, 128):
        weights, value = float32(0), float32(0)
        for split in range(splits):
            at = base + 4 * split * row
            factor = exp2(load_f32(at) - most)
            weights += factor * load_f32(at + 4)
            value += factor * load_f32(at + 4 * (2 + i))
        store_f32(y + 4 * (int64(cuda.blockIdx.x) * size + i), value / weights)
