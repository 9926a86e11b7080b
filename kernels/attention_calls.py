"""The kernel calls of which attention is made, their arguments told from arrays and slots.

Dims: B batch, H query heads, KV key/value heads, G = H / KV, T queries, S keys (past and new), D
size of queries and keys, E size of values.
"""

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..errors import UnsupportedError
from .attention_softmax import NONE
from .buffers import contiguous, empty
from .cache import AT, NEW_K, NEW_K_TOKEN, NEW_V, NEW_V_TOKEN, cache_append
from .decode_attention import MASK, attention_decode, partial_bytes
from .decode_attention import scratch_bytes as decode_scratch_bytes
from .flash import BEFORE, BYTE, CAUSAL, HALF
from .flash_bf16 import BY_PRECISION
from .lowered import FEW_ROWS, Rows
from .threads import precision, team

HIDDEN = np.float32(-6e4)  # of a mask, as minus infinity: exports write float16's least number


def window_mask(before, queries, keys, left):
    """The additive mask (1, 1, T, S) of queries that `before` keys come before, and which see
    themselves and `left` keys before them: rows of one band, each a place further back."""
    band = np.full(keys + queries - 1, NONE)
    last = before + queries
    band[max(0, last - 1 - left) : last] = 0
    return as_strided(band[queries - 1 :], (1, 1, queries, keys), (0, 0, -4, 4), writeable=False)


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


def cached_rows(q, k, v, past_key, past_value, mask, scale, softcap, is_causal, left=-1):
    """The calls for attention over a cache in memory, which k and v are appended to; or over those
    of several sequences, whose tokens lie side by side."""
    out = empty((1, q.shape[2], q.shape[1], v.shape[3]))
    options = scale, softcap, is_causal, left
    if not hasattr(past_key, "parts"):
        return _sequence_rows(q, k, v, past_key, past_value, out, mask, *options)
    if mask is not None:
        raise UnsupportedError("Attention: a mask over the caches of several sequences")
    todo, first = Rows((out,), []), 0
    for (key, count), (value, _) in zip(past_key.parts, past_value.parts, strict=True):
        own, first = slice(first, first + count), first + count
        heads = (x[:, :, own] for x in (q, k, v))
        rows = _sequence_rows(*heads, key, value, out[:, own], None, *options)
        todo.growth += tuple((len(todo.calls) + i, *rest) for i, *rest in rows.growth)
        todo.calls += rows.calls
        todo.keep += rows.keep
    return todo


def _sequence_rows(q, k, v, past_key, past_value, out, mask, scale, softcap, is_causal, left=-1):
    """The calls for the tokens of one sequence -> out (1, T, H, E). `left` is given without a mask:
    how many keys before them they see at the most."""
    before, (_, heads, tokens, _) = past_key.length, k.shape
    append = append_arguments(k, v, past_key, past_value)
    if q.shape[2] == tokens and are_tokens(q, before, mask, is_causal):
        rows = _token_rows(q, append, (k, v), out, mask, scale, softcap)
        return _with_window(rows, past_key.capacity, left) if left >= 0 else rows
    if left >= 0:
        mask, is_causal = window_mask(before, q.shape[2], before + tokens, left), 0
    options, stored = options_of(past_key, is_causal, before), stored_in(past_key, past_value)
    rows = prompt_rows(q, heads, stored, before + tokens, out, mask, scale, softcap, options)
    return Rows(rows.outputs, [(cache_append, *append), *rows.calls], keep=(k, v, *rows.keep))


def are_tokens(q, before, mask, is_causal):
    """Whether the rows q (1, H, T, D) are a few that see nothing of what follows them: they are
    computed one by one, as they would be alone."""
    _, heads, tokens, _ = q.shape
    if tokens == 1 or is_causal or not 0 < tokens <= FEW_ROWS:
        return 0 < tokens <= FEW_ROWS
    if mask is None:
        return False
    new = np.broadcast_to(mask, (1, heads, tokens, before + tokens))[..., before:]
    return bool((new[..., *np.triu_indices(tokens, 1)] <= HIDDEN).all())


def _token_rows(q, append, new, out, mask, scale, softcap):
    """The calls for tokens one by one, each of which sees all keys up to its own; they can be run
    again some positions further."""
    scratch, each, held = team().scratch(token_scratch_bytes(q, new))
    calls, keep = [], []
    for i in range(q.shape[2]):
        call, kept = token_call(q, _token_of(append, i), new, out, mask, scale, softcap,
                                (scratch, each), token=i)  # fmt: skip
        calls.append(call)
        keep.append(kept)
    growth = tuple((i, AT, 1) for i in range(len(calls)))
    return Rows((out,), calls, growth, keep=(q, *new, keep, held))


@lru_cache(maxsize=4)
def _band(capacity, window):
    """Nothing for as many keys as there may be, then 0 for a window: it moves over the keys."""
    return np.concatenate([np.full(capacity, NONE), np.zeros(window, np.float32)])


def _with_window(rows, capacity, left):
    """Rows of single tokens over a cache of so much `capacity`, each of which sees itself and
    `left` keys before it, at these positions and at those after them."""
    band, calls = _band(capacity, left + 1), []
    for function, *arguments in rows.calls:
        arguments[MASK] = band.ctypes.data + 4 * (capacity + left - arguments[AT])
        calls.append((function, *arguments))
    growth = (*rows.growth, *((i, MASK, -4) for i in range(len(calls))))
    return Rows(rows.outputs, calls, growth, keep=(*rows.keep, band))


def _token_of(append, i):
    """What append_arguments gives for token i of those alone."""
    row = list(append)
    row[NEW_K] += row[NEW_K_TOKEN] * i
    row[NEW_V] += row[NEW_V_TOKEN] * i
    row[AT] += i
    return row


def token_scratch_bytes(q, new):
    """Bytes a thread needs for a token: q (1, H, 1, D), k (1, KV, T, D) and v (1, KV, T, E)."""
    (_, h, _, d), (_, kv_heads, _, value_size) = q.shape, new[1].shape
    return decode_scratch_bytes(kv_heads, h // kv_heads, d, -(-value_size // 32) * 32)


def token_call(q, append, new, out, mask, scale, softcap, scratch, pieces=(0, 0), token=0):
    """attention_decode's call that computes out (1, T, H, E) for one token, and what must be kept
    for it; the mask is that of all T."""
    (_, h, t, _), (_, kv_heads, _, value_size) = q.shape, new[1].shape
    group, padded, count = h // kv_heads, -(-value_size // 32) * 32, append[AT] + 1
    if mask is not None:
        mask = np.broadcast_to(mask, (1, h, t, count - token + t - 1))
        mask = mask[:, :, token : token + 1, :count]
    mask, view = _mask_view(mask, (1, h, 1, count))
    numbers, done = np.array([scale, softcap]), np.zeros(1, np.int64)
    call = (
        attention_decode, *append, q.ctypes.data + q.strides[2] * token, q.strides[1],
        out.ctypes.data + out.strides[1] * token, view[0], view[2], group, numbers.ctypes.data,
        done.ctypes.data, partial_bytes(group, padded), *scratch, *pieces,
    )  # fmt: skip
    return call, (mask, numbers, done)
