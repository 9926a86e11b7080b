"""Attention of one token over a cache, at the speed of reading the cache.

Dims: H query heads, KV key/value heads, G = H / KV queries share one, S keys, D size of queries and
keys, E size of values, padded to 32. The cache is laid out as in cache.py.

All key/value heads' blocks of 32 keys, head after head, are cut into one contiguous range a
thread, which may begin and end within a head: so all threads read the same amount, however many
heads there are and however long the context is. A thread leaves a partial result for each head of
its range: results (G, E), `sums` (G, 16), `best` (G). The thread that is done last combines them,
always in the same order.

A cache that is on disk comes in slices: of each thread's range a piece, from where the last one
ended. The pieces' lengths are multiples of KEYS, so that the results are the same to the last bit.

Source: Dao et al., "Flash-Decoding" (2023), for cutting along the keys.
"""

import numpy as np

from .attention_softmax import NONE, add_mask, begin, combine, finish, hide, soften, weigh
from .attention_tile import (
    FEW_ROWS, KEYS, few_rows, score_byte, score_half, sum_byte, sum_half,
)  # fmt: skip
from .cache import (
    AT, CAPACITY, K, K_SCALES, KV_HEADS, QUANTISED, SIZE, V, V_SCALES, VALUE_SIZE, store_position,
)  # fmt: skip
from .jit import arg, arg_float, jit, kernel
from .vector import (
    atomic_add, atomic_store, load_f32, mul, peek_f32, poke_f32, store_f32,
)  # fmt: skip

# Arguments of the kernel, in order: those of cache_append, then these. Strides are in bytes.
Q, Q_HEAD, Y, MASK, MASK_HEAD, GROUP, NUMBERS, DONE, PARTIAL, SCRATCH, EACH, PIECES, LAST = range(
    17, 30
)
# PIECES is 0, or a table of a piece for each thread or none, whose results are put together when
# they are the LAST. Its columns: the same, with K, V and scales where position 0 of head 0 would
# be; then the piece, whether it is the first of its head, and where its partial result is.
HEAD, START, STOP, FRESH, RESULT, PIECE_COLUMNS = range(30, 36)


def partial_bytes(group, padded):
    """Bytes of one head's partial result."""
    return 4 * group * (padded + 17) + 64


def scratch_bytes(heads, group, size, padded):
    """Bytes a thread needs: a partial result for each head, packed queries, scores of a block."""
    return heads * partial_bytes(group, padded) + 4 * group * size + 4 * FEW_ROWS * KEYS


@jit
def pack_queries(args, head, out):
    """A key/value head's queries (G, D), times the scale -> (D, R) for each tile's rows of G."""
    group, size = arg(args, GROUP), arg(args, SIZE)
    scale = np.float32(arg_float(arg(args, NUMBERS), 0))
    first = 0
    while first < group:
        rows = few_rows(group - first)
        for i in range(rows):
            where = arg(args, Q) + arg(args, Q_HEAD) * (head * group + first + i)
            for d in range(size):
                to = out + 4 * (first * size + rows * d + i)
                poke_f32(to, peek_f32(where + 4 * d) * scale)
        first += rows


@jit
def times(row, scales, count):
    """A row (count,) times scales (count,), in place, to the end of its last vector."""
    for j in range(0, count, 16):
        store_f32(row + 4 * j, mul(load_f32(row + 4 * j), load_f32(scales + 4 * j)))


@jit
def block(args, head, first, rows, start, count, queries, scores, partial):
    """Keys start .. start + count for the queries first .. first + rows of a key/value head."""
    group, size, capacity = arg(args, GROUP), arg(args, SIZE), arg(args, CAPACITY)
    quantised, width = arg(args, QUANTISED), 1 if arg(args, QUANTISED) else 2
    padded = (arg(args, VALUE_SIZE) + 31) // 32 * 32
    sums, best = partial + 4 * group * padded, partial + 4 * group * (padded + 16)
    keys = arg(args, K) + width * size * (capacity * head + start)
    values = arg(args, V) + width * (capacity * padded * head + 32 * start)
    at = 4 * (capacity * head + start)
    cap = np.float32(arg_float(arg(args, NUMBERS), 1))
    for j in range(0, count, 32):
        left, right = queries + 4 * size * first, keys + width * size * j
        if quantised:
            score_byte(rows, left, right, scores + 4 * j, size)
        else:
            score_half(rows, left, right, scores + 4 * j, size)
    for i in range(rows):
        line, row = scores + 4 * KEYS * i, first + i
        if quantised:
            times(line, arg(args, K_SCALES) + at, count)
        if cap > 0:
            soften(line, 128, count, cap)
        if arg(args, MASK):
            mask = arg(args, MASK) + arg(args, MASK_HEAD) * (head * group + row) + 4 * start
            add_mask(line, 128, count, mask)
        hide(line, 128, count, count)
        result = partial + 4 * padded * row
        weigh(line, 128, count, best + 4 * row, sums + 64 * row, result, 128, padded)
        if quantised:
            times(line, arg(args, V_SCALES) + at, count)
    for e in range(0, padded, 32):
        right, result = values + width * capacity * e, partial + 4 * (padded * first + e)
        if quantised:
            sum_byte(rows, scores, right, result, 4 * padded, count)
        else:
            sum_half(rows, scores, right, result, 4 * padded, count)


@jit
def is_hidden(args, head, start, count):
    """Whether a mask hides the keys start .. start + count from all queries (G, D) of a head."""
    if not arg(args, MASK):
        return False
    rows = arg(args, GROUP) if arg(args, MASK_HEAD) else 1
    for i in range(rows):
        mask = arg(args, MASK) + arg(args, MASK_HEAD) * (head * arg(args, GROUP) + i) + 4 * start
        for j in range(count):
            if peek_f32(mask + 4 * j) != NONE:
                return False
    return True


@jit
def segment(args, head, start, stop, scratch, partial, fresh):
    """Keys start .. stop of one key/value head -> its partial result, which may be there for the
    keys before unless `fresh`."""
    group, size = arg(args, GROUP), arg(args, SIZE)
    padded = (arg(args, VALUE_SIZE) + 31) // 32 * 32
    sums, best = partial + 4 * group * padded, partial + 4 * group * (padded + 16)
    pack_queries(args, head, scratch)
    for i in range(group if fresh else 0):
        begin(best + 4 * i, sums + 64 * i, partial + 4 * padded * i, 128, padded)
    scores = scratch + 4 * group * size
    for at in range(start, stop, KEYS):
        count, first = min(KEYS, stop - at), 0
        if is_hidden(args, head, at, count):
            continue
        while first < group:
            rows = few_rows(group - first)
            block(args, head, first, rows, at, count, scratch, scores, partial)
            first += rows


@jit
def merge(args, blocks, threads):
    """The partial results of all threads -> Y (H, E)."""
    group, size = arg(args, GROUP), arg(args, VALUE_SIZE)
    padded, total = (size + 31) // 32 * 32, arg(args, KV_HEADS) * blocks
    sums, best = 4 * group * padded, 4 * group * (padded + 16)
    whole = arg(args, SCRATCH)
    for thread in range(threads):
        start, stop = total * thread // threads, total * (thread + 1) // threads
        part = arg(args, SCRATCH) + arg(args, EACH) * thread
        for head in range(start // blocks, (stop + blocks - 1) // blocks if start < stop else 0):
            if start <= head * blocks:
                whole = part
            else:
                for i in range(group):
                    combine(whole + best + 4 * i, whole + sums + 64 * i, whole + 4 * padded * i,
                            part + best + 4 * i, part + sums + 64 * i, part + 4 * padded * i,
                            padded)  # fmt: skip
            if stop >= (head + 1) * blocks:
                for i in range(group):
                    out = arg(args, Y) + 4 * size * (head * group + i)
                    finish(whole + sums + 64 * i, whole + 4 * padded * i, 128, size, out)
            part += arg(args, PARTIAL)


@jit
def whole_range(args, blocks, thread, threads):
    """All of a thread's range, in a cache to which the new key and value are written first."""
    count, heads = arg(args, AT) + 1, arg(args, KV_HEADS)
    total = heads * blocks
    start, stop = total * thread // threads, total * (thread + 1) // threads
    partial = arg(args, SCRATCH) + arg(args, EACH) * thread
    scratch = partial + arg(args, PARTIAL) * heads
    while start < stop:
        head = start // blocks
        end = min(stop, (head + 1) * blocks)
        if end == (head + 1) * blocks:
            store_position(args, head, 0, count - 1)
        first = 32 * (start - head * blocks)
        last = min(count, 32 * (end - head * blocks))
        segment(args, head, first, last, scratch, partial, True)
        partial += arg(args, PARTIAL)
        start = end


@jit
def piece(row, thread):
    """A piece of a thread's range, of one head, in memory of its own."""
    if arg(row, START) < arg(row, STOP):
        scratch = arg(row, SCRATCH) + arg(row, EACH) * thread
        scratch += arg(row, PARTIAL) * arg(row, KV_HEADS)
        segment(row, arg(row, HEAD), arg(row, START), arg(row, STOP), scratch, arg(row, RESULT),
                arg(row, FRESH) != 0)  # fmt: skip


@kernel
def attention_decode(args, thread, threads):
    """Q (H, D) over K (KV, S, D), V (KV, S, E) -> Y (H, E); the last key and value are new.

    args: as listed above; what they have new goes into the cache first, as position S - 1, unless
    they have PIECES.
    """
    blocks = (arg(args, AT) + 32) // 32
    if arg(args, PIECES):
        piece(arg(args, PIECES) + 8 * PIECE_COLUMNS * thread, thread)
        if not arg(args, LAST):
            return
    else:
        whole_range(args, blocks, thread, threads)
    if atomic_add(arg(args, DONE), 1) == threads - 1:
        atomic_store(arg(args, DONE), 0)
        merge(args, blocks, threads)
