"""Attention over a cache that lies on a GPU.

Dims: B batch (1), T new tokens, H query heads, KV heads of keys and values, D head size, P
positions there is room for.
"""

import math

import numpy as np

from . import attention as _on_cpu  # noqa: F401
from .cuda_attention import (
    combine_splits, decode_attention, partial_bytes, queries_of_block,
)  # fmt: skip
from .cuda_flash import prefill_attention
from .cuda_ops import blocks
from .cuda_rope import append
from .cuda_rows import host_value, on_gpu

FEW = 4  # new tokens that are each attended by blocks of their own
BLOCKS = 256  # about how many keep a GPU busy
SHARE = 64  # positions of a block at least, at the cache's full length
WIDEST = {True: 256, False: 160}  # heads that a block's shared memory suffices for; since Ampere
TURING, AMPERE = (7, 5), (8, 0)


def attention_by_host(host, q, k, v, attn_mask=None, past_key=None, past_value=None, *others,
                      n_outputs=1, **attributes):  # fmt: skip
    """As the CPU's operator; what it appends to slots on a GPU is copied there."""
    q, k, v, attn_mask, *others = (host_value(x, False) for x in (q, k, v, attn_mask, *others))
    if not (_on_gpu(past_key) or _on_gpu(past_value)):
        given = q, k, v, attn_mask, past_key, past_value, *others
        return host.function(*given, n_outputs=n_outputs, **attributes)
    found, first = [], 0
    for keys, values, count in _sequences(past_key, past_value, q.shape[1]):
        its = (x[:, first : first + count] for x in (q, k, v))
        past = np.asarray(keys), np.asarray(values)
        y, *rest = host.function(
            *its, attn_mask, *past, *others, n_outputs=max(3, n_outputs), **attributes
        )
        for slot, present in zip((keys, values), rest, strict=False):
            slot.write(present[:, :, slot.length :])
        found.append((y, rest[2:]))
        first += count
    presents = _presents(past_key, past_value, k.shape[-2])
    y = np.concatenate([each for each, _ in found], axis=1)
    return y if n_outputs == 1 else (y, *presents, *found[-1][1])[:n_outputs]


@on_gpu("Attention", 0, 1, 2, otherwise=attention_by_host)
def attention(rows, q, k, v, attn_mask=None, past_key=None, past_value=None, lengths=None, *,
              is_causal=0, kv_num_heads=0, q_num_heads=0, qk_matmul_output_mode=0, scale=None,
              softcap=0.0, softmax_precision=0, left_window_size=-1, right_window_size=-1,
              n_outputs=1):  # fmt: skip
    """q (1, T, H D), k and v (1, T, KV D) and slots -> (1, T, H D), and the slots, longer by T."""
    plain = attn_mask is None and lengths is None and right_window_size < 0 and n_outputs <= 3
    if not plain or not _on_gpu(past_key) or not _on_gpu(past_value) or q.ndim != 3:
        return None
    newer = rows.board.device.capability >= AMPERE
    size = _size(past_key, past_value, q, q_num_heads)
    if size not in range(16, WIDEST[newer] + 1, 16) or not (is_causal or q.shape[1] == 1):
        return None
    heads = q_num_heads, kv_num_heads, size
    end = left_window_size + 1, scale or 1 / math.sqrt(size), softcap
    y, first = rows.room(q.shape, q.dtype), 0
    where = [rows.address(x) for x in (q, k, v, y)]
    strides = [4 * x.shape[2] for x in (q, k, v, y)]
    for keys, values, count in _sequences(past_key, past_value, q.shape[1]):
        at = [address + first * stride for address, stride in zip(where, strides, strict=True)]
        _attend(rows, at, keys, values, (count, *heads), end)
        first += count
    presents = _presents(past_key, past_value, q.shape[1])
    return rows.giving(*(y, *presents)[:n_outputs])


def _presents(past_key, past_value, tokens):
    return [slot.advanced(slot.shape[2] + tokens) for slot in (past_key, past_value)]


def _on_gpu(slot):
    """Whether the cache of every sequence lies on a GPU."""
    return all(getattr(part, "board", None) is not None for part, _ in _parts(slot))


def _size(past_key, past_value, q, heads):
    """What the heads of queries, keys and values all have; 0 when they differ."""
    sizes = {part.size for part, _ in _parts(past_key) + _parts(past_value)}
    size = max(sizes)
    return size if len(sizes) == 1 and q.shape[2] == heads * size else 0


def _parts(slot):
    return list(getattr(slot, "parts", [(slot, 0)]))


def _sequences(past_key, past_value, tokens):
    """(keys, values, tokens) of each sequence."""
    if not hasattr(past_key, "parts"):
        return [(past_key, past_value, tokens)]
    pairs = zip(past_key.parts, past_value.parts, strict=True)
    return [(keys, values, count) for (keys, count), (values, _) in pairs]


def _attend(rows, where, keys, values, shape, end):
    """Append the tokens of one sequence to its cache, and attend to it."""
    q, k, v, y = where
    tokens, heads, kv, size = shape
    keys.reserve(keys.length + tokens)
    past, positions = keys.past(), keys.capacity
    rows.slots.append(keys)
    for new, slot in ((k, keys), (v, values)):
        grid = blocks(tokens * kv * size)
        rows.launch(append, grid, new, slot.address, past, tokens, kv, size, positions)
    given = q, keys.address, values.address, past
    if tokens > FEW:
        newer = rows.board.device.capability >= AMPERE
        kernel = prefill_attention(size, since=AMPERE if newer else TURING)
        grid = -(-tokens // 64), heads
        rows.launch(kernel, grid, *given, y, tokens, heads, heads // kv, positions, *end)
        return
    each = queries_of_block(heads // kv)
    kernel = decode_attention(size, each)
    splits = max(1, min(BLOCKS * each // heads // tokens, positions // SHARE))
    parts = rows.room((partial_bytes(tokens, heads, size, splits) // 4,)).address
    grid = splits, tokens, heads // each
    rows.launch(kernel, grid, *given, parts, heads, heads // kv, positions, splits, *end)
    rows.launch(combine_splits, (tokens * heads,), parts, y, splits, size)
