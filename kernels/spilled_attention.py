"""Attention over keys and values that lie on disk: they come in slices, in windows of memory.

Dims: as in attention_calls.py. Slices are cut where the kernels cut the keys anyway, and what they
have found goes on with the next slice: results are those of a cache in memory, to the last bit.
"""

from itertools import groupby, zip_longest

import numpy as np

from .attention_calls import (
    append_arguments, are_tokens, options_of, prompt_rows, stored_in, token_call,
    token_scratch_bytes,
)  # fmt: skip
from .buffers import empty
from .cache import AT, CAPACITY, K, K_SCALES, V, V_SCALES, cache_append
from .decode_attention import EACH, HEAD, PARTIAL, PIECE_COLUMNS, SCRATCH
from .flash import UNIT_ROWS, state_bytes
from .lowered import Rows
from .threads import team

BLOCK = 32


def spilled_rows(q, k, v, past_key, past_value, mask, scale, softcap, is_causal):
    """As attention_calls.cached_rows, for slots on disk: nothing is left to be called."""
    pair, (_, h, tokens, _) = past_key.with_values(past_value), q.shape
    out = empty((1, tokens, h, v.shape[3]))
    tail = pair.tail(k.shape[2])
    append = append_arguments(k, v, *tail)
    team().run([(cache_append, *append)])
    pair.store(tail, k.shape[2])
    numbers = mask, scale, softcap
    if tokens == k.shape[2] and are_tokens(q, pair.keys.length, mask, is_causal):
        for _, alike in groupby(range(tokens), lambda i: (pair.keys.length + i) // BLOCK):
            _attend_tokens(pair, list(alike), q, append, (k, v), out, *numbers)
    elif 0 not in out.shape:
        _attend_prompt(pair, q, k.shape[2], out, *numbers, is_causal)
    pair.done()
    return Rows((out,), [])


def _attend_prompt(pair, q, new, out, mask, scale, softcap, is_causal):
    """q (1, H, T, D) over all keys, the last `new` its own -> out (1, T, H, E), head after head."""
    (_, h, t, _), heads, before = q.shape, pair.keys.heads, pair.keys.length
    group, positions, count = h // heads, pair.slice_positions(1), before + new
    wide = None if mask is None else np.broadcast_to(mask, (1, h, t, count))
    tokens = max(1, pair.state_rows // group)
    for first in range(0, t, tokens):
        last = min(t, first + tokens)
        options = options_of(pair.keys, is_causal, before + first)
        state = _state(pair, (last - first) * group, out.shape[3])
        slices = [
            [(0, head, start, _blocks_end(min(count, start + positions)))]
            for head in range(heads)
            for start in range(0, count, positions)
        ]
        for keys, values, ((_, head, start, stop),) in pair.slices(1, slices):
            mine = slice(head * group, (head + 1) * group)
            prompt_rows(
                q[:, mine, first:last], 1, stored_in(keys, values, start), count,
                out[:, first:last, mine], None if wide is None else wide[:, mine, first:last],
                scale, softcap, options, (start, min(count, stop), *state),
            ).run()  # fmt: skip


def _state(pair, rows, value_size):
    """(address, bytes a unit) of memory for what is kept of so many rows: their units are full, or
    there are some four for each share of the work."""
    each = state_bytes(value_size)
    memory = pair.state(each * (rows // UNIT_ROWS + 4 * team().shares + 2))
    return memory.ctypes.data, each


def _blocks_end(position):
    return -(-position // BLOCK) * BLOCK


def _attend_tokens(pair, tokens, q, append, new, out, mask, scale, softcap):
    """Those tokens of q (1, H, T, D) over all keys up to their own -> out (1, T, H, E); the number
    of blocks of keys is the same for all, and so is how they are shared out."""
    last, shares = pair.keys.length + tokens[-1] + 1, team().shares
    each = -(-token_scratch_bytes(q, new) // 64) * 64
    scratch = pair.state(len(tokens) * shares * each).ctypes.data
    tables = np.zeros((len(tokens), shares, PIECE_COLUMNS), np.int64)
    rounds = _rounds(pair.keys.heads, last, shares, pair.slice_positions(shares))
    calls, held = [], []
    for n, token in enumerate(tokens):
        row = (*append[:AT], pair.keys.length + token, *append[AT + 1 :])
        call, kept = token_call(
            q, row, new, out, mask, scale, softcap, (scratch + shares * each * n, each),
            (tables[n].ctypes.data, 0), token,
        )  # fmt: skip
        calls.append(list(call))
        held.append(kept)
    parts = [[part for part, _, _ in pieces] for pieces in rounds]
    for i, (keys, values, _) in enumerate(pair.slices(shares, parts)):
        tables[:] = 0
        for table, call in zip(tables, calls, strict=True):
            _fill(table, call[1:], rounds[i], keys, values)
            call[-1] = i == len(rounds) - 1
        team().run(calls)


def _fill(table, arguments, pieces, keys, values):
    """One token's rows for the pieces that windows hold."""
    for part, nth, fresh in pieces:
        row = table[part[0]]
        row[: len(arguments)] = arguments
        result = arguments[SCRATCH] + arguments[EACH] * part[0] + arguments[PARTIAL] * nth
        row[HEAD:] = part[1], part[2], min(arguments[AT] + 1, part[3]), fresh, result
        _place(row, keys, values, part)


def _place(row, keys, values, part):
    """Tell a piece's row where position 0 of head 0 would be, of windows that begin elsewhere."""
    into, head, start, _ = part
    width, capacity = keys.array.itemsize, keys.capacity
    elements, scales = capacity * (into - head) - start, 4 * (capacity * (into - head) - start)
    row[K] = keys.address + width * keys.size * elements
    row[V] = values.address + width * (capacity * (into - head) * values.padded - 32 * start)
    row[K_SCALES], row[V_SCALES] = keys.scales_address + scales, values.scales_address + scales
    row[CAPACITY] = capacity


def _rounds(heads, count, shares, positions):
    """What attention_decode's shares of the work take at a time: for each round a list of (part,
    the how manyth head of its share, whether it is the first of that head)."""
    blocks = -(-count // BLOCK)
    total, of_shares = heads * blocks, []
    for share in range(shares):
        start, stop = total * share // shares, total * (share + 1) // shares
        first_head, pieces = start // blocks, []
        while start < stop:
            head = start // blocks
            end = min(stop, (head + 1) * blocks)
            first, last = BLOCK * (start - head * blocks), BLOCK * (end - head * blocks)
            pieces += [
                ((share, head, at, min(last, at + positions)), head - first_head, at == first)
                for at in range(first, last, positions)
            ]
            start = end
        of_shares.append(pieces)
    return [[p for p in pieces if p] for pieces in zip_longest(*of_shares)]
