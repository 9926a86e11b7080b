"""The kernel calls of which attention is made, their arguments told from arrays and slots.

Dims: B batch, H query heads, KV key/value heads, G = H / KV, T queries, S keys (past and new), D
size of queries and keys, E size of values.
"""

import numpy as np

from .buffers import contiguous, empty
from .cache import AT, cache_append
from .decode_attention import attention_decode, partial_bytes
from .decode_attention import scratch_bytes as decode_scratch_bytes
from .flash import BEFORE, BYTE, CAUSAL, HALF
from .flash_bf16 import BY_PRECISION
from .lowered import Rows
from .threads import precision, team


def _mask_view(mask, shape):
    """(address, strides of batch, head and row) of a mask broadcast to (B, H, T, S)."""
    if mask is None:
        return None, (0, 0, 0, 0)
    # Keys must be contiguous; the other axes may repeat.
    if mask.shape[-1] != shape[-1] or mask.strides[-1] != 4:
        mask = contiguous(np.broadcast_to(mask, (*mask.shape[:-1], shape[-1])))
    wide = np.broadcast_to(mask, shape)
    return mask, (wide.ctypes.data, *wide.strides[:3])


def prompt_rows(q, kv_heads, stored, count, out, mask, scale, softcap, options, part=None):
    """The call that computes out (B, T, H, E) float32; `stored` are the kernel's K .. SCALES_HEAD,
    `part` its FIRST_KEY .. STATE_EACH where it does not see all keys at once."""
    (b, h, t, d), value_size = q.shape, out.shape[3]
    if 0 in out.shape:
        return Rows((out,), [])
    mask, view = _mask_view(mask, (b, h, t, count))
    numbers = np.array([scale, softcap])
    attention, scratch_bytes = BY_PRECISION[precision()]
    scratch, each, held = team().scratch(scratch_bytes(d, value_size))
    y = out.strides
    call = (
        attention, q.ctypes.data, *q.strides[:3], *stored, out.ctypes.data, y[0], y[2], y[1],
        *view, b, kv_heads, h // kv_heads, t, count, d, value_size, options, numbers.ctypes.data,
        scratch, each, *(part or (0, count, 0, 0)),
    )  # fmt: skip
    return Rows((out,), [call], keep=(q, mask, numbers, held))


def stored_in(keys, values, first=0):
    """prompt_rows' `stored` for slots, which hold what the kernel calls position `first` at 0."""
    capacity, width = keys.capacity, keys.array.itemsize
    return (
        keys.address - width * keys.size * first, 0, width * keys.size * capacity,
        values.address - 32 * width * first, 0, width * values.padded * capacity,
        32 * width * capacity, 32 * width,
        keys.scales_address - 4 * first, values.scales_address - 4 * first, 4 * capacity,
    )  # fmt: skip


def options_of(slot, is_causal, before):
    """The kernel's OPTIONS for a slot, and for queries that `before` keys come before."""
    options = BYTE if slot.quantised else HALF
    return options | CAUSAL | before << BEFORE if is_causal else options


def append_arguments(k, v, past_key, past_value):
    """The arguments of what writes k (1, KV, T, D) and v (1, KV, T, E) behind a cache's content."""
    at, (_, heads, tokens, size) = past_key.length, k.shape
    past_key.reserve(at + tokens)
    past_value.reserve(at + tokens)
    return (
        k.ctypes.data, *k.strides[1:3], v.ctypes.data, *v.strides[1:3], past_key.address,
        past_value.address, past_key.scales_address, past_value.scales_address, heads, tokens, size,
        v.shape[3], past_key.capacity, at, past_key.quantised,
    )  # fmt: skip


def cached_rows(q, k, v, past_key, past_value, mask, scale, softcap, is_causal):
    """The calls for attention over a cache in memory, which k and v are appended to."""
    append = append_arguments(k, v, past_key, past_value)
    if q.shape[2] == k.shape[2] == 1:
        return _token_rows(q, append, (k, v), mask, scale, softcap)
    before, (_, heads, tokens, _) = past_key.length, k.shape
    options, stored = options_of(past_key, is_causal, before), stored_in(past_key, past_value)
    out = empty((1, q.shape[2], q.shape[1], v.shape[3]))
    rows = prompt_rows(q, heads, stored, before + tokens, out, mask, scale, softcap, options)
    return Rows(rows.outputs, [(cache_append, *append), *rows.calls], keep=(k, v, *rows.keep))


def _token_rows(q, append, new, mask, scale, softcap):
    """The call for one token, which sees all keys; it can be run again a position further."""
    out = np.empty((1, 1, q.shape[1], new[1].shape[3]), np.float32)
    scratch, each, held = team().scratch(token_scratch_bytes(q, new))
    call, keep = token_call(q, append, new, out, mask, scale, softcap, (scratch, each))
    return Rows((out,), [call], ((0, AT, 1),), keep=(q, *new, keep, held))


def token_scratch_bytes(q, new):
    """Bytes a thread needs for a token: q (1, H, 1, D), k (1, KV, T, D) and v (1, KV, T, E)."""
    (_, h, _, d), (_, kv_heads, _, value_size) = q.shape, new[1].shape
    return decode_scratch_bytes(kv_heads, h // kv_heads, d, -(-value_size // 32) * 32)


def token_call(q, append, new, out, mask, scale, softcap, scratch, pieces=(0, 0)):
    """attention_decode's call that computes out (1, 1, H, E), and what must be kept for it."""
    (_, h, _, _), (_, kv_heads, _, value_size) = q.shape, new[1].shape
    group, padded = h // kv_heads, -(-value_size // 32) * 32
    mask, view = _mask_view(mask, (1, h, 1, append[AT] + 1))
    numbers, done = np.array([scale, softcap]), np.zeros(1, np.int64)
    call = (
        attention_decode, *append, q.ctypes.data, q.strides[1], out.ctypes.data, view[0], view[2],
        group, numbers.ctypes.data, done.ctypes.data, partial_bytes(group, padded), *scratch,
        *pieces,
    )  # fmt: skip
    return call, (mask, numbers, done)
