"""The largest of the logits on a GPU, and what choosing among them needs (cuda_sampling.py).

Dims: V logits of one position, in C chunks of CHUNK.
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_norm import block_sum
from .cuda_prims import (
    cuda, exp2, float32, int32, int64, load_f32, load_i64, shared_memory, store_f32, store_i32,
    store_i64, warp_max, warp_sum,
)  # fmt: skip
from .cuda_select_prims import log2, order_of_f32, shared_i64, shuffle_xor_i64, store_shared_i64

CHUNK = 32  # logits of which the largest is kept: a warp's
SURVEY_THREADS, EACH = 256, 4
SURVEYED = SURVEY_THREADS * EACH  # logits of a block of `survey`
PART = 16  # bytes that it leaves: its largest with its id, and the sum of e ** (x - largest)
FALSE = -1e30  # in such a sum for each logit that is not finite: it is not positive then
LOW, ZERO, HIGH = 0x007FFFFF, 1 << 31, 0xFF800000  # -infinity, 0 and infinity by order_of_f32
NONE = 0x7FC00000  # the bits of a float32 that is no number
LOWEST = -1e30
LOG2E = 1.4426950408889634
WORD = (1 << 32) - 1
SIGN = 1 << 31
LEAST = -(1 << 63)  # below everything that is packed


@device
def packed(value, i):
    """A logit and its id as one number: the larger logit is the larger, of equal ones the lower
    id."""
    return ((int64(order_of_f32(value)) - SIGN) << 32) | (WORD - int64(i))


@device
def between(value, low, high):
    """Whether a number lies between two, both in terms of order_of_f32: "fast" arithmetic may take
    it for granted that all numbers are finite, that of integers may not."""
    key = int64(order_of_f32(value))
    return key > low and key < high


@device
def warp_largest(value):
    """The largest of all lanes' numbers (int64), in every lane."""
    for i in range(5):
        value = max(value, shuffle_xor_i64(value, int32(1 << i)))
    return value


@cuda_kernel("aaai", threads=SURVEY_THREADS, shared=8 * (SURVEY_THREADS // 32))
def survey(logits, maxima, parts, v):
    """logits (V,) float32 -> maxima (C,) float32; of each SURVEYED logits a part: the largest as
    `packed` (int64), and the logit (float32), and the sum of e ** (x - it) (float32), which is not
    positive where a logit is not finite."""
    thread, block = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x)
    values = cuda.local.array(EACH, float32)
    mine, base = int64(LEAST), shared_memory()
    for j in range(EACH):
        i = block * SURVEYED + j * SURVEY_THREADS + thread
        values[j] = load_f32(logits + 4 * i) if i < v else float32(LOWEST)
        if i < v:
            mine = max(mine, packed(values[j], i))
        largest = warp_max(values[j])
        if thread % CHUNK == 0 and i < v:
            store_f32(maxima + 4 * (i // CHUNK), largest)
    mine = warp_largest(mine)
    if thread % 32 == 0:
        store_shared_i64(base + 8 * (thread // 32), mine)
    cuda.syncthreads()
    for warp in range(SURVEY_THREADS // 32):
        mine = max(mine, shared_i64(base + 8 * warp))
    cuda.syncthreads()
    top, summed = load_f32(logits + 4 * (WORD - (mine & WORD))), float32(0)
    for j in range(EACH):
        if block * SURVEYED + j * SURVEY_THREADS + thread < v:
            share = exp2((values[j] - top) * float32(LOG2E))
            summed += share if between(values[j], LOW, HIGH) else float32(FALSE)
    summed = block_sum(summed)
    if thread == 0:
        at = parts + PART * block
        store_i64(at, mine)
        store_f32(at + 8, top)
        store_f32(at + 12, summed)


@device
def largest_of(parts, count):
    """The largest of all parts, as `packed`; a warp has to come."""
    thread = int32(cuda.threadIdx.x) % 32
    mine = load_i64(parts)
    for i in range(thread, count, 32):
        mine = max(mine, load_i64(parts + PART * i))
    return warp_largest(mine)


@cuda_kernel("aai", threads=32)
def take_largest(parts, token, count):
    """parts (count, PART) bytes of `survey` -> token (1,) int64, the id of the largest logit, of
    equal ones the lowest."""
    mine = largest_of(parts, count)
    if cuda.threadIdx.x == 0:
        store_i64(token, WORD - (mine & WORD))


@cuda_kernel("aaaai", threads=32)
def log_probability(logits, parts, token, result, count):
    """logits (V,), their parts, *token int64 -> the natural logarithm of its probability (float32);
    no number where a logit is not finite."""
    thread, odd = int32(cuda.threadIdx.x), float32(0)
    top, summed = load_f32(logits + 4 * (WORD - (largest_of(parts, count) & WORD))), float32(0)
    for i in range(thread, count, 32):
        at = parts + PART * i
        part = load_f32(at + 12)
        odd = odd if between(part, ZERO, HIGH) else float32(1)
        summed += part * exp2((load_f32(at + 8) - top) * float32(LOG2E))
    summed, odd = warp_sum(summed), warp_max(odd)
    if thread == 0:
        if odd == float32(0):
            value = load_f32(logits + 4 * load_i64(token))
            store_f32(result, value - top - log2(summed) / float32(LOG2E))
        else:
            store_i32(result, int32(NONE))
