"""Attention of many queries with products in bfloat16, as gemm_bf16.py has them.

Dims: as in flash.py, whose arguments, units and running softmax these are. STEP rows make a tile.
Queries are packed as (STEP / 16 panels, D / 32, 16, 32), D padded to 32, weights as (STEP / 16,
KEYS / 32, 16, 32). Keys are pairs along D, (D / 2, 32, 2) for each 32 of them, values pairs along
the keys, (KEYS / 2, 32, 2) for each 32 columns. Scores are (KEYS / 32, STEP, 32) float32, results
(E / 32, UNIT_ROWS, 32).

Queries, keys, values and weights are off by 2 ** -8 of each at most; sums are float32.
"""

import numpy as np

from ..registry import register_kernel
from . import flash
from .attention_softmax import add_mask, at, begin, hide, soften, weigh
from .attention_tile import KEYS
from .flash import (
    BATCH, BYTE, EACH, FIRST_KEY, GROUP, HALF, K, K_BATCH, K_HEAD, K_SCALES, KEY_COUNT, KV_HEADS,
    LAST_KEY, MASK, NUMBERS, OPTIONS, Q, Q_BATCH, Q_HEAD, Q_TOKEN, QUERIES, SCALES_HEAD, SCRATCH,
    SIZE, UNIT_ROWS, V, V_BATCH, V_HEAD, V_PANEL, V_ROW, V_SCALES, VALUE_SIZE, attention_exact,
    is_hidden, mask_row, seen, state_bytes, state_of, unit_of, unit_rows, write,
)  # fmt: skip
from .gemm_bf16 import multiply
from .jit import arg, arg_float, jit, kernel
from .tile_bf16 import (
    AMX, BLOCK_BYTES, PANEL, SUPPORTED, store_bf16, store_bf16_pairs, tiles_begin, tiles_end,
)  # fmt: skip
from .vector import (
    load_f16, load_f32, load_f32_n, load_i8, mul, peek_f32, splat, store_f32, zero,
)  # fmt: skip

STEP = 2 * PANEL if AMX else PANEL
APART = 128 * STEP  # bytes from a group of 32 scores of a row to the next
RESULT_APART = 128 * UNIT_ROWS
WEIGHTS_APART = BLOCK_BYTES * (KEYS // 32)


def scratch_bytes(size, value_size):
    """Bytes a thread needs: packed queries, keys and values of a block, scores, weights, a unit's
    state."""
    wide, padded = (size + 31) // 32 * 32, (value_size + 31) // 32 * 32
    packed = 2 * (wide * UNIT_ROWS + KEYS * (wide + padded) + STEP * KEYS)
    return packed + 4 * STEP * KEYS + state_bytes(value_size)


@jit
def pack_queries(args, batch, head, first, rows, out):
    """Rows first .. first + rows of a key/value head's queries, times the scale, zeros beyond."""
    group, size = arg(args, GROUP), arg(args, SIZE)
    total = arg(args, QUERIES) * group
    scale = splat(np.float32(arg_float(arg(args, NUMBERS), 0)))
    blocks = (size + 31) // 32
    for i in range(rows):
        row = first + i
        to = out + BLOCK_BYTES * blocks * (i // PANEL) + 64 * (i % PANEL)
        where = arg(args, Q) + arg(args, Q_BATCH) * batch + arg(args, Q_TOKEN) * (row // group)
        where += arg(args, Q_HEAD) * (head * group + row % group)
        for d in range(0, 32 * blocks, 32):
            low, high = zero(), zero()
            if row < total:
                low = mul(load_f32_n(where + 4 * d, size - d), scale)
                high = mul(load_f32_n(where + 4 * d + 64, size - d - 16), scale)
            store_bf16(to + BLOCK_BYTES * (d // 32), low, high)


@jit
def load_pair(options, where, low, high):
    """32 elements as the cache has them, times scales (16,) and (16,) where they are int8."""
    if options & HALF:
        return load_f16(where), load_f16(where + 32)
    if options & BYTE:
        return mul(load_i8(where), low), mul(load_i8(where + 16), high)
    return load_f32(where), load_f32(where + 64)


@jit
def pair_keys(options, keys, scales, size, out):
    """32 keys (D, 32) -> pairs (D / 2, 32, 2), zeros beyond D."""
    row = 64 if options & HALF else 32 if options & BYTE else 128
    low, high = zero(), zero()
    if options & BYTE:
        low, high = load_f32(scales), load_f32(scales + 64)
    for d in range(0, (size + 31) // 32 * 32, 2):
        a, b, c, e = zero(), zero(), zero(), zero()
        if d < size:
            a, b = load_pair(options, keys + row * d, low, high)
        if d + 1 < size:
            c, e = load_pair(options, keys + row * (d + 1), low, high)
        store_bf16_pairs(out + 64 * d, a, c)
        store_bf16_pairs(out + 64 * d + 64, b, e)


@jit
def load_value(args, options, where, scales, i, columns):
    """32 columns of value i, of which `columns` are there in a plain array."""
    if options & (HALF | BYTE):
        scale = zero()
        if options & BYTE:
            scale = splat(peek_f32(scales + 4 * i))
        return load_pair(options, where + arg(args, V_ROW) * i, scale, scale)
    where += arg(args, V_ROW) * i
    return load_f32_n(where, columns), load_f32_n(where + 64, columns - 16)


@jit
def pair_values(args, batch, head, start, count, out):
    """Values start .. start + count -> (E / 32, KEYS / 2, 32, 2), zeros up to a multiple of 32."""
    options, size = arg(args, OPTIONS), arg(args, VALUE_SIZE)
    where = arg(args, V) + arg(args, V_BATCH) * batch + arg(args, V_HEAD) * head
    where += arg(args, V_ROW) * start
    scales = arg(args, V_SCALES) + arg(args, SCALES_HEAD) * head + 4 * start
    for e in range(0, size, 32):
        to = out + 2 * KEYS * e
        for i in range(0, (count + 31) // 32 * 32, 2):
            a, b, c, d = zero(), zero(), zero(), zero()
            if i < count:
                a, b = load_value(args, options, where, scales, i, size - e)
            if i + 1 < count:
                c, d = load_value(args, options, where, scales, i + 1, size - e)
            store_bf16_pairs(to + 64 * i, a, c)
            store_bf16_pairs(to + 64 * i + 64, b, d)
        where += arg(args, V_PANEL)


@jit
def step(args, batch, head, first, rows, start, queries, keys, values, scores, state):
    """A block of keys from `start` on for the rows first .. first + rows of one tile."""
    size, width = arg(args, SIZE), (arg(args, VALUE_SIZE) + 31) // 32 * 32
    best, sums, result = state
    count = seen(args, first + rows - 1, start, min(KEYS, arg(args, KEY_COUNT) - start))
    if count == 0 or is_hidden(args, batch, head, first, rows, start, count):
        return
    wide, whole = (size + 31) // 32 * 32, (count + 31) // 32 * 32
    weights, apart = scores + 4 * STEP * KEYS, BLOCK_BYTES * (wide // 32)
    for i in range(0, 4 * STEP * whole, 64):
        store_f32(scores + i, zero())
    for j in range(0, count, 32):
        multiply(queries, apart, keys + 2 * wide * j, scores + 4 * STEP * j, rows, wide)
    cap = np.float32(arg_float(arg(args, NUMBERS), 1))
    for i in range(rows):
        line, to = scores + 128 * i, weights + WEIGHTS_APART * (i // PANEL) + 64 * (i % PANEL)
        if cap > 0:
            soften(line, APART, count, cap)
        if arg(args, MASK):
            add_mask(line, APART, count, mask_row(args, batch, head, first + i, start))
        hide(line, APART, seen(args, first + i, start, count), whole)
        weigh(line, APART, whole, best + 4 * i, sums + 64 * i, result + 128 * i, RESULT_APART,
              width)  # fmt: skip
        for j in range(0, whole, 32):
            low, high = load_f32(at(line, j, APART)), load_f32(at(line, j, APART) + 64)
            store_bf16(to + BLOCK_BYTES * (j // 32), low, high)
    for i in range(rows, STEP):  # of the unit's last tile, whose products nobody reads
        to = weights + WEIGHTS_APART * (i // PANEL) + 64 * (i % PANEL)
        for j in range(0, whole, 32):
            store_bf16(to + BLOCK_BYTES * (j // 32), zero(), zero())
    for e in range(0, width, 32):
        multiply(weights, WEIGHTS_APART, values + 2 * KEYS * e, at(result, e, RESULT_APART), rows,
                 whole)  # fmt: skip


@jit
def attend(args, batch, head, first, rows, unit, scratch):
    """The keys for rows first .. first + rows of one key/value head, a block after the other."""
    size, width = arg(args, SIZE), (arg(args, VALUE_SIZE) + 31) // 32 * 32
    options, wide = arg(args, OPTIONS), (arg(args, SIZE) + 31) // 32 * 32
    keys = scratch + 2 * wide * UNIT_ROWS
    values = keys + 2 * KEYS * wide
    scores = values + 2 * KEYS * width
    result = state_of(args, unit, scores + 6 * STEP * KEYS)
    sums = result + 4 * UNIT_ROWS * width
    best = sums + 64 * UNIT_ROWS
    padded = (rows + STEP - 1) // STEP * STEP
    pack_queries(args, batch, head, first, padded, scratch)
    for i in range(0 if arg(args, FIRST_KEY) else padded):
        begin(best + 4 * i, sums + 64 * i, result + 128 * i, RESULT_APART, width)
    element = 2 if options & HALF else 1 if options & BYTE else 4
    stored = arg(args, K) + arg(args, K_BATCH) * batch + arg(args, K_HEAD) * head
    scales = arg(args, K_SCALES) + arg(args, SCALES_HEAD) * head
    stop = min(seen(args, first + rows - 1, 0, arg(args, KEY_COUNT)), arg(args, LAST_KEY))
    for start in range(arg(args, FIRST_KEY), stop, KEYS):
        count = min(KEYS, stop - start)
        for j in range(0, count, 32):
            pair_keys(options, stored + element * size * (start + j), scales + 4 * (start + j),
                      size, keys + 2 * wide * j)  # fmt: skip
        pair_values(args, batch, head, start, count, values)
        for i in range(0, rows, STEP):
            state = best + 4 * i, sums + 64 * i, result + 128 * i
            step(args, batch, head, first + i, min(STEP, rows - i), start, scratch + 2 * wide * i,
                 keys, values, scores, state)  # fmt: skip
    if arg(args, LAST_KEY) == arg(args, KEY_COUNT):
        write(args, batch, head, first, rows, sums, result, 128, RESULT_APART)


@kernel
def attention_bf16(args, thread, threads):
    """Q (B, H, T, D), K (B, KV, S, D), V (B, KV, S, E) -> Y (B, H, T, E), all by strides.

    args: as flash.py lists them.
    """
    total, heads = arg(args, QUERIES) * arg(args, GROUP), arg(args, BATCH) * arg(args, KV_HEADS)
    rows = unit_rows(args, UNIT_ROWS, STEP, threads)
    units = (total + rows - 1) // rows
    scratch = arg(args, SCRATCH) + arg(args, EACH) * thread
    tiles_begin()
    for turn in range((heads * units + threads - 1) // threads):
        unit = unit_of(turn, thread, threads)
        if unit < heads * units:
            head, first = unit // units, unit % units * rows
            attend(args, head // arg(args, KV_HEADS), head % arg(args, KV_HEADS), first,
                   min(rows, total - first), unit, scratch)  # fmt: skip
    tiles_end()


EXACT = attention_exact, flash.scratch_bytes
FAST = (attention_bf16, scratch_bytes) if SUPPORTED else EXACT
BY_PRECISION = {"exact": EXACT, "fast": FAST}
"""What runs at each precision, and the bytes a thread needs for it."""
register_kernel("attention_fast", FAST[0])
