"""Scaled dot-product attention over a key/value cache, blockwise with a running softmax.

Dims: B batch, H query heads, G queries that share a key/value head (H / KV), T queries, S keys,
D size of queries and keys, E size of values. R rows make a tile: queries t and heads g of one
key/value head, row t G + g. Keys are stored transposed (KV, D, capacity), values (KV, capacity, E),
capacity and E padded to 32; float16 in a cache, float32 otherwise. Scores are float32.

Source: Dao et al., "FlashAttention" (2022), for the running softmax; ONNX Attention-23.
"""

import math

import numpy as np

from .jit import arg, arg_float, jit, kernel, share
from .tile import FEW_ROWS, TILE_ROWS, tile_few, tile_many
from .vector import (
    add, div, exp, load_f16, load_f32, max_lanes, maximum, mul, peek_f32, poke_f16, poke_f32, splat,
    store_f32, store_f32_n, sub, sum_lanes, zero,
)  # fmt: skip

KEYS = 128  # keys a block: scores (R, 128), and a (128, 32) piece of the values, stay in cache
NONE = np.float32(-np.inf)

# Arguments of the kernel, in order. Strides are in bytes.
(Q, Q_BATCH, Q_HEAD, Q_TOKEN, K, K_BATCH, K_HEAD, K_ROW, V, V_BATCH, V_HEAD, V_ROW,
 Y, Y_BATCH, Y_HEAD, Y_TOKEN, MASK, MASK_BATCH, MASK_HEAD, MASK_ROW,
 BATCH, KV_HEADS, GROUP, QUERIES, KEY_COUNT, SIZE, VALUE_SIZE, OPTIONS, SCALES, SCRATCH, EACH,
 ) = range(31)  # fmt: skip
HALF, CAUSAL = 1, 2  # bits of OPTIONS; bits 2.. hold the number of keys before the first query


def scratch_bytes(size, value_size):
    """Bytes a thread needs: packed queries, a key panel, scores, weights, values, result, sums."""
    padded = (value_size + 31) // 32 * 32
    rows = TILE_ROWS
    return 4 * (size * rows + size * 32 + rows * KEYS * 2 + KEYS * 32 + rows * padded + 3 * rows)


@jit
def tile(rows, a, b, ldb, c, ldc, k):
    """C (R, 32) += A (K, R) B (K, 32)."""
    if rows == TILE_ROWS:
        tile_many(a, b, ldb, c, ldc, k)
    else:
        tile_few(a, b, ldb, c, ldc, k)


@jit
def widen(source, stride, out, count):
    """(count, 32) fp16 rows `stride` bytes apart -> (count, 32) float32."""
    for i in range(count):
        store_f32(out + 128 * i, load_f16(source + stride * i))
        store_f32(out + 128 * i + 64, load_f16(source + stride * i + 32))


@jit
def pack_queries(args, batch, head, first, rows, out):
    """Rows first .. first + R of a key/value head's queries, times the scale -> (D, R)."""
    group, size = arg(args, GROUP), arg(args, SIZE)
    total, scale = arg(args, QUERIES) * group, np.float32(arg_float(arg(args, SCALES), 0))
    for i in range(rows):
        row = first + i
        where = arg(args, Q) + arg(args, Q_BATCH) * batch + arg(args, Q_TOKEN) * (row // group)
        where += arg(args, Q_HEAD) * (head * group + row % group)
        for d in range(size):
            value = peek_f32(where + 4 * d) * scale if row < total else np.float32(0)
            poke_f32(out + 4 * (rows * d + i), value)


@jit
def score(args, batch, head, first, count, rows, queries, panel, scores):
    """Scores (R, KEYS) of the keys first .. first + count."""
    size, stride = arg(args, SIZE), arg(args, K_ROW)
    width = 2 if arg(args, OPTIONS) & HALF else 4
    base = arg(args, K) + arg(args, K_BATCH) * batch + arg(args, K_HEAD) * head
    for j in range(0, count, 32):
        for i in range(rows):
            store_f32(scores + 4 * (KEYS * i + j), zero())
            store_f32(scores + 4 * (KEYS * i + j) + 64, zero())
        keys = base + width * (first + j)
        if width == 2:
            widen(keys, stride, panel, size)
            tile(rows, queries, panel, 128, scores + 4 * j, 4 * KEYS, size)
        else:
            tile(rows, queries, keys, stride, scores + 4 * j, 4 * KEYS, size)


@jit
def bias(args, batch, head, first, count, row, scores):
    """Apply soft cap, mask and causal limit to one row's (KEYS,) scores, in place."""
    group, options = arg(args, GROUP), arg(args, OPTIONS)
    cap = np.float32(arg_float(arg(args, SCALES), 1))
    if cap > 0:
        for j in range(count):
            value = np.float32(math.tanh(peek_f32(scores + 4 * j) / cap)) * cap
            poke_f32(scores + 4 * j, value)
    if arg(args, MASK):
        mask = arg(args, MASK) + arg(args, MASK_BATCH) * batch + 4 * first
        mask += arg(args, MASK_HEAD) * (head * group + row % group)
        mask += arg(args, MASK_ROW) * (row // group)
        for j in range(count):
            poke_f32(scores + 4 * j, peek_f32(scores + 4 * j) + peek_f32(mask + 4 * j))
    allowed = count
    if options & CAUSAL:
        allowed = min(count, max(0, row // group + (options >> 2) + 1 - first))
    for j in range(allowed, (count + 15) // 16 * 16):
        poke_f32(scores + 4 * j, NONE)


@jit
def weigh(scores, count, i, rows, weights, result, width, best, total):
    """One step of the running softmax for row i: scores (KEYS,) -> weights (KEYS, R) column i.

    The row's result (width,) and total are rescaled to the new maximum.
    """
    top = splat(NONE)
    for j in range(0, count, 16):
        top = maximum(top, load_f32(scores + 4 * j))
    old = peek_f32(best + 4 * i)
    new = max(old, max_lanes(top))
    if new == NONE:
        for j in range(count):
            poke_f32(weights + 4 * (rows * j + i), np.float32(0))
        return
    shift, sums = splat(new), zero()
    for j in range(0, count, 16):
        value = exp(sub(load_f32(scores + 4 * j), shift))
        sums = add(sums, value)
        store_f32(scores + 4 * j, value)
    for j in range(count):
        poke_f32(weights + 4 * (rows * j + i), peek_f32(scores + 4 * j))
    factor = np.float32(math.exp(old - new))
    poke_f32(total + 4 * i, peek_f32(total + 4 * i) * factor + sum_lanes(sums))
    poke_f32(best + 4 * i, new)
    if factor != np.float32(1):
        for j in range(0, width, 16):
            store_f32(result + 4 * j, mul(load_f32(result + 4 * j), splat(factor)))


@jit
def add_values(args, batch, head, first, count, rows, weights, panel, result, width):
    """result (R, width) += weights (count, R) times the values first .. first + count."""
    stride = arg(args, V_ROW)
    half = arg(args, OPTIONS) & HALF
    base = arg(args, V) + arg(args, V_BATCH) * batch + arg(args, V_HEAD) * head + stride * first
    for e in range(0, width, 32):
        if half:
            widen(base + 2 * e, stride, panel, count)
            tile(rows, weights, panel, 128, result + 4 * e, 4 * width, count)
        else:
            tile(rows, weights, base + 4 * e, stride, result + 4 * e, 4 * width, count)


@jit
def finish(args, batch, head, first, rows, result, width, total):
    """result (R, width) / total (R,) -> the rows' places in Y; rows that saw no key are zero."""
    group, size = arg(args, GROUP), arg(args, VALUE_SIZE)
    for i in range(min(rows, arg(args, QUERIES) * group - first)):
        row = first + i
        out = arg(args, Y) + arg(args, Y_BATCH) * batch + arg(args, Y_TOKEN) * (row // group)
        out += arg(args, Y_HEAD) * (head * group + row % group)
        whole = peek_f32(total + 4 * i)
        divisor = splat(whole if whole > 0 else np.float32(1))
        for e in range(0, size, 16):
            value = div(load_f32(result + 4 * (width * i + e)), divisor)
            store_f32_n(out + 4 * e, value, size - e)


@jit
def attend(args, batch, head, first, rows, scratch):
    """All keys for rows first .. first + R of one key/value head."""
    size, width = arg(args, SIZE), (arg(args, VALUE_SIZE) + 31) // 32 * 32
    queries = scratch
    panel = queries + 4 * size * rows
    scores = panel + 4 * 32 * size
    weights = scores + 4 * rows * KEYS
    values = weights + 4 * rows * KEYS
    result = values + 4 * 32 * KEYS
    best = result + 4 * rows * width
    total = best + 4 * rows
    pack_queries(args, batch, head, first, rows, queries)
    for i in range(rows):
        poke_f32(best + 4 * i, NONE)
        poke_f32(total + 4 * i, np.float32(0))
        for e in range(0, width, 16):
            store_f32(result + 4 * (width * i + e), zero())
    stop, options = arg(args, KEY_COUNT), arg(args, OPTIONS)
    live = min(rows, arg(args, QUERIES) * arg(args, GROUP) - first)
    if options & CAUSAL:
        stop = min(stop, (first + live - 1) // arg(args, GROUP) + (options >> 2) + 1)
    for start in range(0, stop, KEYS):
        count = min(KEYS, stop - start)
        score(args, batch, head, start, count, rows, queries, panel, scores)
        for i in range(rows):
            line = scores + 4 * KEYS * i
            if i < live:
                bias(args, batch, head, start, count, first + i, line)
                to = result + 4 * width * i
                weigh(line, count, i, rows, weights, to, width, best, total)
            else:
                for j in range(count):
                    poke_f32(weights + 4 * (rows * j + i), np.float32(0))
        add_values(args, batch, head, start, count, rows, weights, values, result, width)
    finish(args, batch, head, first, rows, result, width, total)


@kernel
def attention(args, thread, threads):
    """Q (B, H, T, D), K (B, KV, D, S), V (B, KV, S, E) -> Y (B, H, T, E), all by strides.

    args: as listed above. Threads take tiles in turn, for a causal mask makes later ones longer.
    """
    total = arg(args, QUERIES) * arg(args, GROUP)
    rows = FEW_ROWS if total <= FEW_ROWS else TILE_ROWS
    tiles = (total + rows - 1) // rows
    scratch = arg(args, SCRATCH) + arg(args, EACH) * thread
    for unit in range(thread, arg(args, BATCH) * arg(args, KV_HEADS) * tiles, threads):
        head = unit // tiles
        batch, first = head // arg(args, KV_HEADS), unit % tiles * rows
        attend(args, batch, head % arg(args, KV_HEADS), first, rows, scratch)


@kernel
def cache_append(args, thread, threads):
    """K (KV, T, D) and V (KV, T, E) by strides -> a float16 cache, from position `at` on.

    args: K, its head and token strides, V, its head and token strides, cached K (KV, D, capacity),
    cached V (KV, capacity, E padded), KV, T, D, E, padded E, capacity, at.
    """
    k, v, keys, values = arg(args, 0), arg(args, 3), arg(args, 6), arg(args, 7)
    tokens, size, value_size, padded = arg(args, 9), arg(args, 10), arg(args, 11), arg(args, 12)
    capacity, at = arg(args, 13), arg(args, 14)
    start, stop = share(arg(args, 8), 1, thread, threads)
    for h in range(start, stop):
        for t in range(tokens):
            source = k + arg(args, 1) * h + arg(args, 2) * t
            for d in range(size):
                to = keys + 2 * ((h * size + d) * capacity + at + t)
                poke_f16(to, peek_f32(source + 4 * d))
            source = v + arg(args, 4) * h + arg(args, 5) * t
            to = values + 2 * padded * (h * capacity + at + t)
            for e in range(value_size):
                poke_f16(to + 2 * e, peek_f32(source + 4 * e))
