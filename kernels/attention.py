"""The operator Attention, with or without a cache of keys and values.

Dims: B batch, H query heads, KV key/value heads, T queries, S keys (past and new), D size of
queries and keys, E size of values. Results are float32 inside, of Q's type outside.
"""

import math

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .buffers import contiguous, empty
from .cache import AT, cache_append
from .decode_attention import attention_decode, partial_bytes
from .decode_attention import scratch_bytes as decode_scratch_bytes
from .flash import BEFORE, BYTE, CAUSAL, HALF
from .flash_bf16 import BY_PRECISION
from .lowered import Rows, plain
from .threads import precision, team

NONE = np.float32(-np.inf)
USES = ("attention_{precision}", "attention_decode", "cache_append")


def _heads(x, heads):
    """(B, T, H D) or (B, H, T, D) -> a view (B, H, T, D), float32, D contiguous."""
    if x.ndim == 3:
        if not heads or x.shape[2] % heads:
            raise ShapeError(
                f"Attention: {x.shape[2]} columns do not split into {heads} heads; "
                "q_num_heads and kv_num_heads are needed for 3-D inputs"
            )
        x = x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)
    return x if x.dtype == np.float32 and x.strides[3] == 4 else contiguous(x, np.float32)


def _blocked_keys(k):
    """(B, KV, S, D) -> (B, KV, S / 32, D, 32), S padded with zeros."""
    b, heads, s, d = k.shape
    blocks, whole = empty((b, heads, -(-s // 32), d, 32)), s // 32
    for i in range(whole):
        blocks[:, :, i] = k[:, :, 32 * i : 32 * i + 32].swapaxes(2, 3)
    if whole < blocks.shape[2]:
        blocks[:, :, whole] = 0
        blocks[:, :, whole, :, : s % 32] = k[:, :, 32 * whole :].swapaxes(2, 3)
    return blocks


def _additive(mask, keys):
    """A boolean or additive mask as additive float32, short rows closed up to `keys`."""
    if mask.dtype == np.bool_:
        mask = np.where(mask, np.float32(0), NONE)
    missing = keys - mask.shape[-1]
    if missing > 0 and mask.shape[-1] != 1:
        mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=NONE)
    return mask.astype(np.float32, copy=False)


def _limits(batch, queries, keys, before, is_causal, lengths, left, right):
    """What lengths, windows and a causal limit over them allow: additive (B or 1, 1, T, S)."""
    at = np.arange(keys)
    before = np.asarray(before).reshape(-1, 1, 1, 1)
    position = np.arange(queries).reshape(1, 1, -1, 1) + before
    allowed = np.ones((len(before), 1, queries, keys), np.bool_)
    if lengths is not None:
        allowed = allowed & (at < np.asarray(lengths).reshape(batch, 1, 1, 1))
    if is_causal:
        allowed &= at <= position
    if left >= 0:
        allowed &= position - at <= left
    if right >= 0:
        allowed &= at - position <= right
    return np.where(allowed, np.float32(0), NONE)


def _mask_view(mask, shape):
    """(address, strides of batch, head and row) of a mask broadcast to (B, H, T, S)."""
    if mask is None:
        return None, (0, 0, 0, 0)
    # Keys must be contiguous; the other axes may repeat.
    if mask.shape[-1] != shape[-1] or mask.strides[-1] != 4:
        mask = contiguous(np.broadcast_to(mask, (*mask.shape[:-1], shape[-1])))
    wide = np.broadcast_to(mask, shape)
    return mask, (wide.ctypes.data, *wide.strides[:3])


def _rows(q, kv_heads, stored, count, value_size, mask, scale, softcap, options):
    """The call that computes (B, T, H, E) float32; `stored` are the kernel's K .. SCALES_HEAD."""
    b, h, t, d = q.shape
    out = empty((b, t, h, value_size))
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
        scratch, each,
    )  # fmt: skip
    return Rows((out,), [call], keep=(q, mask, numbers, held))


def _plain(q, k, v, mask, scale, softcap, options):
    """The calls for attention over arrays."""
    v = v if v.strides[3] == 4 else contiguous(v)
    keys = _blocked_keys(k)
    stored = (keys.ctypes.data, *keys.strides[:2], v.ctypes.data, *v.strides[:2], 128, v.strides[2],
              0, 0, 0)  # fmt: skip
    rows = _rows(q, k.shape[1], stored, k.shape[2], v.shape[3], mask, scale, softcap, options)
    rows.keep += (keys, v)
    return rows


def _append(k, v, past_key, past_value):
    """The arguments of what writes k (1, KV, T, D) and v (1, KV, T, E) behind a cache's content."""
    at, (_, heads, tokens, size) = past_key.length, k.shape
    past_key.reserve(at + tokens)
    past_value.reserve(at + tokens)
    return (
        k.ctypes.data, *k.strides[1:3], v.ctypes.data, *v.strides[1:3], past_key.address,
        past_value.address, past_key.scales_address, past_value.scales_address, heads, tokens, size,
        v.shape[3], past_key.capacity, at, past_key.quantised,
    )  # fmt: skip


def _cached(q, k, v, past_key, past_value, mask, scale, softcap, is_causal):
    """The calls for attention over a cache that grows in place."""
    append = _append(k, v, past_key, past_value)
    if q.shape[2] == k.shape[2] == 1:
        return _decode(q, append, (k, v), mask, scale, softcap)
    before, (_, heads, tokens, size) = past_key.length, k.shape
    options = BYTE if past_key.quantised else HALF
    if is_causal:
        options |= CAUSAL | before << BEFORE
    capacity, width = past_key.capacity, past_key.array.itemsize
    stored = (
        past_key.address, 0, width * size * capacity, past_value.address, 0,
        width * past_value.padded * capacity, 32 * width * capacity, 32 * width,
        past_key.scales_address, past_value.scales_address, 4 * capacity,
    )  # fmt: skip
    rows = _rows(q, heads, stored, before + tokens, v.shape[3], mask, scale, softcap, options)
    return Rows(rows.outputs, [(cache_append, *append), *rows.calls], keep=(k, v, *rows.keep))


def _decode(q, append, new, mask, scale, softcap):
    """The call for one token, which sees all keys; it can be run again a position further."""
    (_, h, _, d), (_, kv_heads, _, value_size) = q.shape, new[1].shape
    out = np.empty((1, 1, h, value_size), np.float32)
    group, padded = h // kv_heads, -(-value_size // 32) * 32
    mask, view = _mask_view(mask, (1, h, 1, append[AT] + 1))
    numbers, done = np.array([scale, softcap]), np.zeros(1, np.int64)
    scratch, each, held = team().scratch(decode_scratch_bytes(kv_heads, group, d, padded))
    call = (
        attention_decode, *append, q.ctypes.data, q.strides[1], out.ctypes.data, view[0], view[2],
        group, numbers.ctypes.data, done.ctypes.data, partial_bytes(group, padded), scratch, each,
    )  # fmt: skip
    return Rows((out,), [call], ((0, AT, 1),), keep=(q, *new, mask, numbers, done, held))


def lower_attention(
    q, k, v, attn_mask=None, past_key=None, past_value=None, *, is_causal=0, kv_num_heads=0,
    q_num_heads=0, qk_matmul_output_mode=0, scale=None, softcap=0.0, softmax_precision=0,
    n_outputs=1,
):  # fmt: skip
    """One token, 3-D inputs, and a cache that has slots."""
    slots = past_key is not None and not isinstance(past_key, np.ndarray)
    if not slots or attn_mask is not None or q.ndim != 3 or q.shape[:2] != (1, 1):
        return None
    if n_outputs > 3 or k.shape[1] != 1 or not plain(q, k, v):
        return None
    heads = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    scale = scale or 1 / math.sqrt(heads[0].shape[3])
    rows = _cached(*heads, past_key, past_value, None, scale, softcap, is_causal)
    y = rows.outputs[0].reshape(1, 1, -1)
    presents = [slot.advanced(slot.length + 1) for slot in (past_key, past_value)]
    rows.outputs = (y, *presents)[:n_outputs]
    return rows


def _scores(q, k, mask, scale, softcap, mode):
    """The optional fourth output, by NumPy: scores (B, H, T, S) before or after each step."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    raw = (q * np.float32(math.sqrt(scale))) @ (k * np.float32(math.sqrt(scale))).swapaxes(2, 3)
    capped = raw if softcap <= 0 else np.tanh(raw / softcap) * np.float32(softcap)
    biased = capped if mask is None else capped + mask
    if mode < 3:
        return (raw, capped, biased)[mode]
    top = biased.max(axis=-1, keepdims=True)
    weights = np.exp(biased - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def lower_attention_24(q, k, v, attn_mask=None, past_key=None, past_value=None,
                       nonpad_kv_seqlen=None, *, left_window_size=-1, right_window_size=-1,
                       **attributes):  # fmt: skip
    """As version 23's."""
    if nonpad_kv_seqlen is not None or left_window_size >= 0 or right_window_size >= 0:
        return None
    return lower_attention(q, k, v, attn_mask, past_key, past_value, **attributes)


@op("Attention", since=23, native=("past_key", "past_value"), uses=USES, lower=lower_attention)
def attention_23(
    q, k, v, attn_mask=None, past_key=None, past_value=None, *, is_causal=0, kv_num_heads=0,
    q_num_heads=0, qk_matmul_output_mode=0, scale=None, softcap=0.0, softmax_precision=0,
    n_outputs=1,
):  # fmt: skip
    """q, k, v as (B, heads, T, size) or (B, T, heads size) -> Y laid out as q, the cache, scores.

    past_key and past_value are arrays (B, KV, P, size) or slots of a cache: then k and v are
    written behind what the slots hold, and the presents are the same memory, longer by T.
    """
    return _attention(
        q, k, v, attn_mask, past_key, past_value, None, is_causal, kv_num_heads, q_num_heads,
        qk_matmul_output_mode, scale, softcap, -1, -1, n_outputs,
    )  # fmt: skip


@op("Attention", since=24, native=("past_key", "past_value"), uses=USES, lower=lower_attention_24)
def attention_24(
    q, k, v, attn_mask=None, past_key=None, past_value=None, nonpad_kv_seqlen=None, *,
    is_causal=0, kv_num_heads=0, q_num_heads=0, qk_matmul_output_mode=0, scale=None, softcap=0.0,
    softmax_precision=0, left_window_size=-1, right_window_size=-1, n_outputs=1,
):  # fmt: skip
    """As version 23, with the number of valid keys (B,); the windows are version 25's."""
    return _attention(
        q, k, v, attn_mask, past_key, past_value, nonpad_kv_seqlen, is_causal, kv_num_heads,
        q_num_heads, qk_matmul_output_mode, scale, softcap, left_window_size, right_window_size,
        n_outputs,
    )  # fmt: skip


def _attention(q, k, v, mask, past_key, past_value, lengths, is_causal, kv_heads, q_heads, mode,
               scale, softcap, left, right, n_outputs):  # fmt: skip
    dtype, flat = q.dtype, q.ndim == 3
    q, k, v = _heads(q, q_heads), _heads(k, kv_heads), _heads(v, kv_heads)
    scale = scale or 1 / math.sqrt(q.shape[3])
    before = 0 if past_key is None else past_key.shape[2]
    count = before + k.shape[2]
    mask = None if mask is None else _additive(mask, count)
    if lengths is not None or left >= 0 or right >= 0 or n_outputs > 3:
        first = before if lengths is None else np.asarray(lengths) - q.shape[2]
        limits = _limits(len(q), q.shape[2], count, first, is_causal, lengths, left, right)
        mask, is_causal = limits if mask is None else mask + limits, 0
    if past_key is not None and not isinstance(past_key, np.ndarray):
        y = _cached(q, k, v, past_key, past_value, mask, scale, softcap, is_causal).run()
        present_key, present_value = past_key.advanced(count), past_value.advanced(count)
    else:
        if past_key is not None:
            k = np.concatenate([np.asarray(past_key, np.float32), k], axis=2)
            v = np.concatenate([np.asarray(past_value, np.float32), v], axis=2)
        options = CAUSAL | before << BEFORE if is_causal else 0
        y = _plain(q, k, v, mask, scale, softcap, options).run()
        present_key, present_value = k.astype(dtype, copy=False), v.astype(dtype, copy=False)
    scores = None
    if n_outputs > 3:
        keys = np.asarray(present_key, np.float32)
        scores = _scores(q, keys, mask, scale, softcap, mode).astype(dtype, copy=False)
    if flat:
        y = y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])
    else:
        y = contiguous(y.transpose(0, 2, 1, 3))
    outputs = (y.astype(dtype, copy=False), present_key, present_value, scores)
    return outputs[0] if n_outputs == 1 else outputs[:n_outputs]
