"""The operator Attention, with or without a cache of keys and values.

Dims: B batch, H query heads, KV key/value heads, T queries, S keys (past and new), D size of
queries and keys, E size of values. Results are float32 inside, of Q's type outside.
"""

import math
from functools import partial

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .attention_calls import cached_rows, prompt_rows, window_mask
from .attention_softmax import NONE
from .buffers import contiguous, empty
from .flash import BEFORE, CAUSAL
from .lowered import plain
from .spilled_attention import spilled_rows

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


def _plain(q, k, v, mask, scale, softcap, options):
    """The calls for attention over arrays."""
    v = v if v.strides[3] == 4 else contiguous(v)
    keys = _blocked_keys(k)
    stored = (keys.ctypes.data, *keys.strides[:2], v.ctypes.data, *v.strides[:2], 128, v.strides[2],
              0, 0, 0)  # fmt: skip
    out = empty((len(q), q.shape[2], q.shape[1], v.shape[3]))
    rows = prompt_rows(q, k.shape[1], stored, k.shape[2], out, mask, scale, softcap, options)
    rows.keep += (keys, v)
    return rows


def lower_attention(
    q, k, v, attn_mask=None, past_key=None, past_value=None, *, is_causal=0, kv_num_heads=0,
    q_num_heads=0, qk_matmul_output_mode=0, scale=None, softcap=0.0, softmax_precision=0,
    left_window_size=-1, n_outputs=1,
):  # fmt: skip
    """The next token of each sequence, 3-D inputs, and a cache that has slots in memory."""
    tokens = getattr(past_key, "tokens", 0)
    if not tokens or past_key.on_disk or attn_mask is not None or q.ndim != 3:
        return None
    if n_outputs > 3 or not q.shape[1] == k.shape[1] == tokens or not plain(q, k, v):
        return None
    heads = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    scale = scale or 1 / math.sqrt(heads[0].shape[3])
    options = scale, softcap, is_causal, left_window_size
    rows = cached_rows(*heads, past_key, past_value, None, *options)
    y = rows.outputs[0].reshape(1, tokens, -1)
    presents = [slot.advanced(slot.shape[2] + tokens) for slot in (past_key, past_value)]
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
                       nonpad_kv_seqlen=None, *, right_window_size=-1, **attributes):  # fmt: skip
    """As version 23's, and with a window."""
    if nonpad_kv_seqlen is not None or right_window_size >= 0:
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
    is_slot, behind = hasattr(past_key, "reserve"), -1
    if left >= 0 and is_causal and lengths is None and right < 0 and n_outputs <= 3:
        if mask is None and is_slot and not past_key.on_disk:
            behind = left
        else:
            limits = window_mask(before, q.shape[2], count, left)
            mask, is_causal = limits if mask is None else mask + limits, 0
    elif lengths is not None or left >= 0 or right >= 0 or n_outputs > 3:
        first = before if lengths is None else np.asarray(lengths) - q.shape[2]
        limits = _limits(len(q), q.shape[2], count, first, is_causal, lengths, left, right)
        mask, is_causal = limits if mask is None else mask + limits, 0
    if is_slot:
        rows = spilled_rows if past_key.on_disk else partial(cached_rows, left=behind)
        y = rows(q, k, v, past_key, past_value, mask, scale, softcap, is_causal).run()
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
