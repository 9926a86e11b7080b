"""The next token, chosen on a GPU from its logits: onnxstream_nb/sampling.py's meaning and order.

Dims: V logits (at most MOST) of one position, in C chunks of CHUNK (cuda_survey.py); N
candidates among them.

Top-k, top-p and min-p each keep the first ones in the order of falling logits, of equal ones the
lowest ids; so what is kept is known by one logit, as an ordered integer (`key`), and the last place
of those that equal it. Both are found by four passes over the digits of the keys, which sum up the
weights of the candidates with each digit. Weights are whole numbers of 2 ** -38: sums are exact, in
whatever order threads come. Counting is the same with a weight of 1 for each.

With top-k few candidates remain: of chunks whose largest logit is below the k-th largest such, none
is looked at. What differs from the CPU is rounding: float32 instead of float64, and weights below
2 ** -38 of the largest count as nothing.
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    cuda, exp2, float32, int32, int64, load_f32, load_i32, load_i64, shared_i32, shared_memory,
    store_f32, store_i32, store_i64, store_shared_i32,
)  # fmt: skip
from .cuda_select_prims import (
    add_shared_i32, order_of_f32, shared_i64, shuffle_xor_i64, store_shared_i64,
)  # fmt: skip
from .cuda_survey import CHUNK, HIGH, LOG2E, LOW, LOWEST, SURVEYED, WORD, between, largest_of

THREADS = 512
SHARE_BITS = 31
ONE = 2.0**38  # the weight of the largest logit
MOST = 1 << 18  # logits at most
LIMB = 13  # bits: sums of MOST numbers of so many fit an int32
ALL = 1 << 32  # above every key
BINS = 256
SUMS = 3 * 4 * BINS  # where shared memory has a long integer for each warp
FOUND = SUMS + 8 * 32
LEFT = FOUND + 8
SHARED = LEFT + 8


@device
def scan(value):
    """int64 of each thread -> the sum of those of the threads before, the sum of all."""
    base, thread = shared_memory() + SUMS, int32(cuda.threadIdx.x)
    before, total = int64(0), value
    for i in range(5):
        other = shuffle_xor_i64(total, int32(1 << i))
        if thread & (1 << i):
            before += other
        total += other
    cuda.syncthreads()  # whoever still reads what was there before
    if thread % 32 == 0:
        store_shared_i64(base + 8 * (thread // 32), total)
    cuda.syncthreads()
    total = int64(0)
    for warp in range(int32(cuda.blockDim.x) // 32):
        its = shared_i64(base + 8 * warp)
        if warp < thread // 32:
            before += its
        total += its
    return before, total


@device
def weight(value, top, factor):
    """2 ** (factor (value - top)) in units of 1 / ONE; of what is no number 0."""
    return int64(exp2(max(float32(LOWEST), value - top) * factor) * float32(ONE))


@device
def kept(key, i, bound, last):
    """Whether what is bounded by a key, and the last place of those that equal it, has this one."""
    return key > bound or (key == bound and i <= last)


@device
def held(base, digit):
    """The sum of the weights with a digit."""
    low = int64(shared_i32(base + 4 * digit))
    middle = int64(shared_i32(base + 4 * (BINS + digit)))
    return low + (middle << LIMB) + (int64(shared_i32(base + 4 * (2 * BINS + digit))) << 2 * LIMB)


@device
def pick(base, wanted):
    """By one warp: the digit at which the weights, from the largest digit on, reach `wanted`, and
    how much of it they take there."""
    lane = int32(cuda.threadIdx.x)
    first = BINS - 1 - 8 * lane
    mine, before = int64(0), int64(0)
    for j in range(8):
        mine += held(base, first - j)
    total = mine
    for i in range(5):
        other = shuffle_xor_i64(total, int32(1 << i))
        if lane & (1 << i):
            before += other
        total += other
    left = wanted - before
    if left > 0 and left <= mine:
        for j in range(8):
            here = held(base, first - j)
            if left > 0 and left <= here:
                store_shared_i64(base + FOUND, int64(first - j))
                store_shared_i64(base + LEFT, left)
            left -= here


@device
def descend(values, n, top, factor, bound, last, wanted):
    """The key at which the weights of candidates that are kept, the largest keys first, reach
    `wanted`, and how much of it those of this key are to add."""
    base, thread = shared_memory(), int32(cuda.threadIdx.x)
    count, prefix, left = int32(cuda.blockDim.x), int64(0), wanted
    for level in range(4):
        shift = 24 - 8 * level
        cuda.syncthreads()
        for i in range(thread, 3 * BINS, count):
            store_shared_i32(base + 4 * i, int32(0))
        cuda.syncthreads()
        for i in range(thread, n, count):
            value = load_f32(values + 4 * i)
            key = int64(order_of_f32(value))
            if key >> (shift + 8) == prefix and kept(key, i, bound, last):
                amount = weight(value, top, factor)
                at = base + 4 * int32((key >> shift) & (BINS - 1))
                for limb in range(3):
                    digits = int32((amount >> (LIMB * limb)) & ((1 << LIMB) - 1))
                    if digits != 0:
                        add_shared_i32(at + 4 * BINS * limb, digits)
        cuda.syncthreads()
        if thread < 32:
            pick(base, left)
        cuda.syncthreads()
        prefix, left = (prefix << 8) | shared_i64(base + FOUND), shared_i64(base + LEFT)
    return prefix, left


@device
def amount_of(values, i, top, factor, least, bound, last, low, high):
    """The weight of a candidate: 0 where it is not kept, below `least` of the largest logit, or its
    key outside of low .. high."""
    value = load_f32(values + 4 * i)
    key = int64(order_of_f32(value))
    wanted = kept(key, i, bound, last) and low <= key and key <= high and value - top >= least
    return weight(value, top, factor) if wanted else int64(0)


@device
def part_of(whole, share):
    """`share`, in units of 2 ** -31, of a number below 2 ** 57, rounded down."""
    mask = (1 << SHARE_BITS) - 1
    return (whole >> SHARE_BITS) * share + (((whole & mask) * share) >> SHARE_BITS)


@device
def find(values, n, top, factor, least, bound, last, low, high, share, point):
    """The first place up to which the weights sum to more than `point`; where `share` is not
    negative, than that share of all of them."""
    base, thread = shared_memory(), int32(cuda.threadIdx.x)
    each = (n + int32(cuda.blockDim.x) - 1) // int32(cuda.blockDim.x)
    begin = min(thread * each, n)
    end, mine = min(begin + each, n), int64(0)
    for i in range(begin, end):
        mine += amount_of(values, i, top, factor, least, bound, last, low, high)
    before, whole = scan(mine)
    reached = part_of(whole, share) if share >= 0 else point
    if thread == 0:
        store_shared_i64(base + FOUND, int64(0))
    cuda.syncthreads()
    left = reached - before
    if left >= 0 and left < mine:
        for i in range(begin, end):
            amount = amount_of(values, i, top, factor, least, bound, last, low, high)
            if left >= 0 and left < amount:
                store_shared_i64(base + FOUND, int64(i))
            left -= amount
    cuda.syncthreads()
    return int32(shared_i64(base + FOUND))


@device
def bounded(values, n, top, factor, bound, last, wanted):
    """The bound, a key and the last place of those that equal it, of as few candidates as reach
    `wanted`, among those within such a bound."""
    key, left = descend(values, n, top, factor, bound, last, wanted)
    place = find(
        values, n, top, factor, float32(LOWEST), bound, last, key, key, int64(-1), left - 1
    )  # fmt: skip
    return key, place


@device
def candidates(logits, maxima, values, ids, v, floor):
    """Those logits whose key is at least `floor`, in the order of their ids, and the ids; how
    many."""
    thread, count, n = int32(cuda.threadIdx.x), int32(cuda.blockDim.x), int64(0)
    chunks = (v + CHUNK - 1) // CHUNK
    for first in range(0, chunks, count):
        begin = (first + thread) * CHUNK
        end = min(begin + CHUNK, v)
        mine = int64(0)
        if begin < v and int64(order_of_f32(load_f32(maxima + 4 * (first + thread)))) >= floor:
            for i in range(begin, end):
                mine += 1 if int64(order_of_f32(load_f32(logits + 4 * i))) >= floor else 0
        before, more = scan(mine)
        if mine > 0:
            to = n + before
            for i in range(begin, end):
                value = load_f32(logits + 4 * i)
                if int64(order_of_f32(value)) >= floor:
                    store_f32(values + 4 * to, value)
                    store_i32(ids + 4 * to, int32(i))
                    to += 1
        n += more
    cuda.syncthreads()
    return int32(n)


@cuda_kernel("aaaaaaiilff", threads=THREADS, shared=SHARED)
def draw(logits, maxima, parts, room, uniform, token, v, top_k, top_p, least, cooled):
    """logits (V,) with what `survey` found, *uniform int64 -> *token int64, by one block.

    `room` is 8 V bytes. top_p and *uniform are shares, in units of 2 ** -31; `least` is the
    logarithm of min_p, `cooled` 1 over the temperature. A launch that is replayed draws with what
    *uniform then is. Where the largest logit is not finite, the token is that one's."""
    largest = WORD - (largest_of(parts, (v + SURVEYED - 1) // SURVEYED) & WORD)
    top = load_f32(logits + 4 * largest)
    if not between(top, LOW, HIGH):
        if cuda.threadIdx.x == 0:
            store_i64(token, largest)
        return
    chunks, values, n = (v + CHUNK - 1) // CHUNK, logits, v
    ids, bound, last = int64(0), int64(-1), int32(0)
    if top_k > 0 and top_k < chunks:
        wanted = int64(top_k) * int64(ONE)
        floor, _ = descend(maxima, chunks, top, float32(0), bound, last, wanted)
        values, ids = room, room + 4 * v
        n = candidates(logits, maxima, values, ids, v, floor)
    if top_k > 0 and top_k < n:
        wanted = int64(top_k) * int64(ONE)
        bound, last = bounded(values, n, top, float32(0), bound, last, wanted)
    if top_p < 1 << SHARE_BITS:
        mine = int64(0)
        for i in range(int32(cuda.threadIdx.x), n, int32(cuda.blockDim.x)):
            mine += amount_of(values, i, top, float32(LOG2E), float32(LOWEST), bound, last, 0, ALL)
        _, whole = scan(mine)
        wanted = max(part_of(whole, top_p), int64(1))
        bound, last = bounded(values, n, top, float32(LOG2E), bound, last, wanted)
    place = find(
        values, n, top, cooled * float32(LOG2E), least, bound, last, 0, ALL, load_i64(uniform),
        int64(0),
    )  # fmt: skip
    if cuda.threadIdx.x == 0:
        store_i64(token, int64(load_i32(ids + 4 * place)) if ids != 0 else int64(place))
