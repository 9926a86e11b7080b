"""Attention of many queries, blockwise with a running softmax.

Dims: B batch, H query heads, G queries that share a key/value head (H / KV), T queries, S keys,
D size of queries and keys, E size of values, padded to 32. A row is a query of a head, t G + g of
one key/value head; R = MANY_ROWS rows make a tile, up to UNIT_ROWS of them a unit of work.

Keys come in blocks of 32, each (D, 32) contiguous: (KV, S / 32, D, 32). A cache's values come in
panels of 32 columns, (KV, E / 32, capacity, 32); plain arrays' as (S, E) by strides. Elements are
float32 in plain arrays; in a cache float16, or int8 with a float32 scale a position and head. Both
are widened to float32 once for all tiles of a unit. Scores are float32.

Source: Dao et al., "FlashAttention" (2022), for the running softmax; ONNX Attention-23.
"""

import numpy as np

from .attention_softmax import NONE, add_mask, begin, finish, hide, soften, weigh
from .attention_tile import KEYS, MANY_ROWS, score_many, sum_many
from .jit import arg, arg_float, jit, kernel
from .vector import (
    load_f16, load_f32, load_f32_n, load_i8, mul, peek_f32, poke_f32, splat, store_f32,
)  # fmt: skip

UNIT_ROWS = 192

# Arguments of the kernel, in order. Strides are in bytes.
(Q, Q_BATCH, Q_HEAD, Q_TOKEN, K, K_BATCH, K_HEAD, V, V_BATCH, V_HEAD, V_PANEL, V_ROW,
 K_SCALES, V_SCALES, SCALES_HEAD, Y, Y_BATCH, Y_HEAD, Y_TOKEN,
 MASK, MASK_BATCH, MASK_HEAD, MASK_ROW, BATCH, KV_HEADS, GROUP, QUERIES, KEY_COUNT, SIZE,
 VALUE_SIZE, OPTIONS, NUMBERS, SCRATCH, EACH, FIRST_KEY, LAST_KEY, STATE, STATE_EACH,
 ) = range(38)  # fmt: skip
# Bits of OPTIONS: how keys and values are stored (float32 when neither), and a causal limit, with
# the number of keys before the first query in bits BEFORE..
HALF, BYTE, CAUSAL, BEFORE = 1, 2, 4, 3
# A call may take the keys FIRST_KEY .. LAST_KEY only, the first a multiple of KEYS. K, V and scales
# are where position 0 would be then, and STATE, STATE_EACH bytes a unit, keeps what the call for
# the next slice of the keys goes on with; the last one writes Y.


def state_bytes(value_size):
    """Bytes of a unit's results, its sums and its maxima."""
    return 4 * UNIT_ROWS * ((value_size + 31) // 32 * 32 + 17)


def scratch_bytes(size, value_size):
    """Bytes a thread needs: packed queries, keys and values of a block, scores, a unit's state."""
    padded = (value_size + 31) // 32 * 32
    rows = size * UNIT_ROWS + MANY_ROWS * KEYS
    return 4 * (rows + KEYS * (size + padded)) + state_bytes(value_size)


@jit
def pack_queries(args, batch, head, first, rows, out):
    """Rows first .. first + rows of a key/value head's queries, times the scale -> (D, R) tiles."""
    group, size = arg(args, GROUP), arg(args, SIZE)
    total, scale = arg(args, QUERIES) * group, np.float32(arg_float(arg(args, NUMBERS), 0))
    for i in range(rows):
        row = first + i
        to = out + 4 * (i // MANY_ROWS * MANY_ROWS * size + i % MANY_ROWS)
        where = arg(args, Q) + arg(args, Q_BATCH) * batch + arg(args, Q_TOKEN) * (row // group)
        where += arg(args, Q_HEAD) * (head * group + row % group)
        for d in range(size):
            value = peek_f32(where + 4 * d) * scale if row < total else np.float32(0)
            poke_f32(to + 4 * MANY_ROWS * d, value)


@jit
def widen_keys(options, keys, scales, size, out):
    """(D, 32) keys of a cache -> float32, times their scales (32,)."""
    if options & HALF:
        for i in range(0, 2 * size):
            store_f32(out + 64 * i, load_f16(keys + 32 * i))
    else:
        low, high = load_f32(scales), load_f32(scales + 64)
        for d in range(size):
            store_f32(out + 128 * d, mul(load_i8(keys + 32 * d), low))
            store_f32(out + 128 * d + 64, mul(load_i8(keys + 32 * d + 16), high))


@jit
def widen_values(args, batch, head, start, count, out):
    """Values start .. start + count -> (E / 32, KEYS, 32) float32, zero beyond their size."""
    options, size, row = arg(args, OPTIONS), arg(args, VALUE_SIZE), arg(args, V_ROW)
    base = arg(args, V) + arg(args, V_BATCH) * batch + arg(args, V_HEAD) * head + row * start
    scales = arg(args, V_SCALES) + arg(args, SCALES_HEAD) * head + 4 * start
    for e in range(0, size, 32):
        to = out + 4 * KEYS * e
        for i in range(count):
            where = base + row * i
            if options & HALF:
                low, high = load_f16(where), load_f16(where + 32)
            elif options & BYTE:
                scale = splat(peek_f32(scales + 4 * i))
                low, high = mul(load_i8(where), scale), mul(load_i8(where + 16), scale)
            else:
                low, high = load_f32_n(where, size - e), load_f32_n(where + 64, size - e - 16)
            store_f32(to + 128 * i, low)
            store_f32(to + 128 * i + 64, high)
        base += arg(args, V_PANEL)


@jit
def mask_row(args, batch, head, row, start):
    """Where the mask of a row begins, at key `start`."""
    group = arg(args, GROUP)
    where = arg(args, MASK) + arg(args, MASK_BATCH) * batch + 4 * start
    where += arg(args, MASK_HEAD) * (head * group + row % group)
    return where + arg(args, MASK_ROW) * (row // group)


@jit
def seen(args, row, start, count):
    """How many of the keys start .. start + count a row may see."""
    options = arg(args, OPTIONS)
    if options & CAUSAL:
        count = min(count, row // arg(args, GROUP) + (options >> BEFORE) + 1 - start)
    return max(0, count)


@jit
def is_hidden(args, batch, head, first, rows, start, count):
    """Whether a mask hides the keys start .. start + count from all rows of a tile."""
    if not arg(args, MASK):
        return False
    for i in range(rows):
        mask = mask_row(args, batch, head, first + i, start)
        for j in range(count):
            if peek_f32(mask + 4 * j) != NONE:
                return False
    return True


@jit
def step(args, batch, head, first, rows, start, queries, keys, values, scores, state):
    """A block of keys from `start` on for the rows first .. first + rows of one tile.

    scores (R, KEYS); `state` holds where the tile's best, sums and results are.
    """
    size, width = arg(args, SIZE), (arg(args, VALUE_SIZE) + 31) // 32 * 32
    best, sums, result = state
    count = seen(args, first + rows - 1, start, min(KEYS, arg(args, KEY_COUNT) - start))
    if count == 0 or is_hidden(args, batch, head, first, rows, start, count):
        return
    for j in range(0, count, 32):
        score_many(queries, keys + 4 * size * j, scores + 4 * j, 4 * KEYS, size)
    cap = np.float32(arg_float(arg(args, NUMBERS), 1))
    for i in range(rows):
        line = scores + 4 * KEYS * i
        if cap > 0:
            soften(line, 128, count, cap)
        if arg(args, MASK):
            add_mask(line, 128, count, mask_row(args, batch, head, first + i, start))
        hide(line, 128, seen(args, first + i, start, count), count)
        to = result + 4 * width * i
        weigh(line, 128, count, best + 4 * i, sums + 64 * i, to, 128, width)
    for e in range(0, width, 32):
        sum_many(scores, values + 4 * KEYS * e, result + 4 * e, 4 * width, count)


@jit
def write(args, batch, head, first, rows, sums, result, stride, apart):
    """The results of rows first .. first + rows, `stride` bytes from one to the next, -> Y."""
    group = arg(args, GROUP)
    for i in range(rows):
        row = first + i
        out = arg(args, Y) + arg(args, Y_BATCH) * batch + arg(args, Y_TOKEN) * (row // group)
        out += arg(args, Y_HEAD) * (head * group + row % group)
        finish(sums + 64 * i, result + stride * i, apart, arg(args, VALUE_SIZE), out)


@jit
def state_of(args, unit, own):
    """Where a unit's results, sums and maxima are: `own`, if no later call needs them."""
    state = arg(args, STATE)
    return state + arg(args, STATE_EACH) * unit if state else own


@jit
def attend(args, batch, head, first, rows, unit, scratch):
    """The keys for rows first .. first + rows of one key/value head, a block after the other."""
    size, width = arg(args, SIZE), (arg(args, VALUE_SIZE) + 31) // 32 * 32
    options = arg(args, OPTIONS)
    keys = scratch + 4 * size * UNIT_ROWS
    values = keys + 4 * KEYS * size
    scores = values + 4 * KEYS * width
    result = state_of(args, unit, scores + 4 * MANY_ROWS * KEYS)
    sums = result + 4 * UNIT_ROWS * width
    best = sums + 64 * UNIT_ROWS
    padded = (rows + MANY_ROWS - 1) // MANY_ROWS * MANY_ROWS
    pack_queries(args, batch, head, first, padded, scratch)
    for i in range(0 if arg(args, FIRST_KEY) else padded):
        begin(best + 4 * i, sums + 64 * i, result + 4 * width * i, 128, width)
    stored = arg(args, K) + arg(args, K_BATCH) * batch + arg(args, K_HEAD) * head
    scales = arg(args, K_SCALES) + arg(args, SCALES_HEAD) * head
    element = 2 if options & HALF else 1 if options & BYTE else 4
    stop = min(seen(args, first + rows - 1, 0, arg(args, KEY_COUNT)), arg(args, LAST_KEY))
    for start in range(arg(args, FIRST_KEY), stop, KEYS):
        count = min(KEYS, stop - start)
        block = stored + element * size * start
        if element == 4:
            keys = block
        else:
            for j in range(0, count, 32):
                widen_keys(options, block + element * size * j, scales + 4 * (start + j), size,
                           keys + 4 * size * j)  # fmt: skip
        widen_values(args, batch, head, start, count, values)
        for i in range(0, rows, MANY_ROWS):
            state = best + 4 * i, sums + 64 * i, result + 4 * width * i
            step(args, batch, head, first + i, min(MANY_ROWS, rows - i), start,
                 scratch + 4 * size * i, keys, values, scores, state)  # fmt: skip
    if arg(args, LAST_KEY) == arg(args, KEY_COUNT):
        write(args, batch, head, first, rows, sums, result, 4 * width, 128)


@jit
def unit_rows(args, most, align, threads):
    """How many rows a unit of work has: fewer where there would be few units."""
    total = arg(args, QUERIES) * arg(args, GROUP) * arg(args, BATCH) * arg(args, KV_HEADS)
    fair = (total + 4 * threads - 1) // (4 * threads)
    return min(most, (fair + align - 1) // align * align)


@jit
def unit_of(turn, thread, threads):
    """Units are dealt out back and forth, for a causal limit makes later ones longer."""
    return turn * threads + (thread if turn % 2 == 0 else threads - 1 - thread)


@kernel
def attention_exact(args, thread, threads):
    """Q (B, H, T, D), K (B, KV, S, D), V (B, KV, S, E) -> Y (B, H, T, E), all by strides.

    args: as listed above.
    """
    total, heads = arg(args, QUERIES) * arg(args, GROUP), arg(args, BATCH) * arg(args, KV_HEADS)
    rows = unit_rows(args, UNIT_ROWS, MANY_ROWS, threads)
    units = (total + rows - 1) // rows
    scratch = arg(args, SCRATCH) + arg(args, EACH) * thread
    for turn in range((heads * units + threads - 1) // threads):
        unit = unit_of(turn, thread, threads)
        if unit < heads * units:
            head, first = unit // units, unit % units * rows
            attend(args, head // arg(args, KV_HEADS), head % arg(args, KV_HEADS), first,
                   min(rows, total - first), unit, scratch)  # fmt: skip
