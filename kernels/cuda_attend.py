"""Attention over a cache that lies on a GPU.

Dims: B batch (1), T new tokens, H query heads, KV heads of keys and values, D head size, P
positions there is room for.
"""

import math
import weakref

import numpy as np

from ..registry import declared
from . import fused  # noqa: F401
from .cuda_attention import (
    combine_splits, decode_attention, partial_bytes, queries_of_block,
)  # fmt: skip
from .cuda_flash import prefill_attention
from .cuda_ops import blocks
from .cuda_rope import rotate_append
from .cuda_rows import host_value, on_gpu
from .rope import rotary_embedding

FEW = 4  # new tokens that are each attended by blocks of their own
BLOCKS = 256  # about how many keep a GPU busy
SHARE = 64  # positions of a block at least, at the cache's full length
ATTENTION = declared("Attention")[24]
ROTATION = ("interleaved", "rotary_embedding_dim")
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


def rotary_attention_by_host(host, q, k, v, past_key, past_value, cos_cache, sin_cache, **given):
    """As the CPU's operator, with slots that may lie on a GPU."""
    turning = {name: given.pop(name) for name in ROTATION if name in given}
    cos, sin = host_value(cos_cache, False), host_value(sin_cache, False)
    q, k = (
        rotary_embedding(host_value(x, False), cos, sin, num_heads=given[heads], **turning)
        for x, heads in ((q, "q_num_heads"), (k, "kv_num_heads"))
    )
    return attention_by_host(ATTENTION, q, k, v, None, past_key, past_value, **given)


@on_gpu("Attention", 0, 1, 2, otherwise=attention_by_host)
def attention(rows, q, k, v, attn_mask=None, past_key=None, past_value=None, lengths=None,
              **given):  # fmt: skip
    """q (1, T, H D), k and v (1, T, KV D) and slots -> (1, T, H D), and the slots, longer by T."""
    if attn_mask is not None or lengths is not None:
        return None
    return _attention(rows, (q, k, v), (past_key, past_value), None, **given)


@on_gpu("RotaryAttention", 0, 1, 2, 5, 6, domain="onnxstream_nb",
        otherwise=rotary_attention_by_host)  # fmt: skip
def rotary_attention(rows, q, k, v, past_key, past_value, cos_cache, sin_cache, *, interleaved=0,
                     rotary_embedding_dim=0, **given):  # fmt: skip
    """The same, of q and k that cos and sin (1, T, R / 2) rotate."""
    half, size = cos_cache.shape[-1], q.shape[-1] // given["q_num_heads"]
    fits = cos_cache.size == sin_cache.size == q.shape[1] * half
    if not fits or 2 * half != (rotary_embedding_dim or size):
        return None
    rotation = rows.address(cos_cache), rows.address(sin_cache), half, interleaved
    return _attention(rows, (q, k, v), (past_key, past_value), rotation, **given)


def _attention(rows, new, past, rotation, *, is_causal=0, kv_num_heads=0, q_num_heads=0,
               qk_matmul_output_mode=0, scale=None, softcap=0.0, softmax_precision=0,
               left_window_size=-1, right_window_size=-1, n_outputs=1):  # fmt: skip
    q = new[0]
    plain = q.ndim == 3 and (is_causal or q.shape[1] == 1) and right_window_size < 0
    if not plain or n_outputs > 3 or not all(map(_on_gpu, past)):
        return None
    size, tokens = _size(*past, q, q_num_heads), q.shape[1]
    if size not in range(16, WIDEST[rows.board.device.capability >= AMPERE] + 1, 16):
        return None
    heads = q_num_heads, kv_num_heads, size
    end = left_window_size + 1, scale or 1 / math.sqrt(size), softcap
    y, turned = rows.room(q.shape, q.dtype), rows.room(q.shape)
    cos, sin, half, interleaved = rotation or (0, 0, 0, 0)
    where = [*(rows.address(x) for x in new), cos, sin, turned.address, y.address]
    strides = [4 * n for n in (*(x.shape[2] for x in new), half, half, *2 * (q.shape[2],))]
    for keys, values, count in _sequences(*past, tokens):
        _append(rows, where, keys, values, (count, *heads, 2 * half, interleaved))
        _attend(rows, where[-2:], keys, values, (count, *heads), end)
        where = [at + count * stride for at, stride in zip(where, strides, strict=True)]
    return rows.giving(*(y, *_presents(*past, tokens))[:n_outputs])


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


def _append(rows, where, keys, values, shape):
    """Write the keys and values of one sequence's tokens behind its cache, and turn its queries."""
    tokens, heads, kv, size, *turning = shape
    keys.reserve(keys.length + tokens)
    rows.slots.append(weakref.ref(keys))  # who lets go of a cache gets its memory back
    grid = blocks(tokens * (heads + 2 * kv) * (size // 2))
    rows.launch(
        rotate_append, grid, *where[:6], keys.address, values.address, keys.past(), tokens, heads,
        kv, size, *turning, keys.capacity,
    )  # fmt: skip


def _attend(rows, where, keys, values, shape, end):
    """Attend to the cache of one sequence, which its tokens are in."""
    q, y = where
    tokens, heads, kv, size = shape
    past, positions = keys.past(), keys.capacity
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
