"""Rotary position embedding.

Dims: B batch, T tokens, H heads, D head size, R rotated elements of each head (R <= D);
cos and sin (B, T, R / 2). Source: Su et al., "RoFormer" (2021); ONNX RotaryEmbedding-23.
"""

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .buffers import contiguous, empty
from .indexing import in_range
from .jit import arg, kernel, share
from .lowered import Rows, plain
from .vector import fma, load_f32, mul, peek_f32, poke_f32, splat, store_f32


@kernel
def rotary(args, thread, threads):
    """x (B, T, H, D) by strides, cos and sin (B T, R / 2) -> out, laid out as x.

    args: x, out, cos, sin, B, T, H, D, R, strides in bytes of batch, token and head, interleaved.
    Element pairs are (i, i + R / 2), or (2 i, 2 i + 1) when interleaved.
    """
    x, out, cos, sin = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tokens, heads, size, half = arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8) // 2
    minus = splat(np.float32(-1))
    start, stop = share(arg(args, 4) * tokens, 1, thread, threads)
    for t in range(start, stop):
        token = arg(args, 9) * (t // tokens) + arg(args, 10) * (t % tokens)
        c, s = cos + 4 * half * t, sin + 4 * half * t
        for h in range(heads):
            p, q = x + token + arg(args, 11) * h, out + token + arg(args, 11) * h
            done = 0
            if not arg(args, 12):
                done = half // 16 * 16
                for i in range(0, done, 16):
                    u, v = load_f32(p + 4 * i), load_f32(p + 4 * (half + i))
                    cv, sv = load_f32(c + 4 * i), load_f32(s + 4 * i)
                    store_f32(q + 4 * i, fma(u, cv, mul(mul(v, sv), minus)))
                    store_f32(q + 4 * (half + i), fma(v, cv, mul(u, sv)))
            for i in range(done, half):
                first = 2 * i if arg(args, 12) else i
                second = 2 * i + 1 if arg(args, 12) else half + i
                u, v = peek_f32(p + 4 * first), peek_f32(p + 4 * second)
                ci, si = peek_f32(c + 4 * i), peek_f32(s + 4 * i)
                poke_f32(q + 4 * first, u * ci - v * si)
                poke_f32(q + 4 * second, u * si + v * ci)
            for i in range(2 * half, size):
                poke_f32(q + 4 * i, peek_f32(p + 4 * i))


def lower_rotary(
    x, cos_cache, sin_cache, position_ids=None, *, interleaved=0, num_heads=0,
    rotary_embedding_dim=0,
):  # fmt: skip
    """x (B, H, T, D) or (B, T, H D), caches (B, T, R / 2), contiguous float32."""
    if position_ids is not None or not plain(x, cos_cache, sin_cache):
        return None
    if x.ndim == 3:
        (b, t, hidden), heads = x.shape, num_heads
        size = hidden // heads
        strides = (4 * t * hidden, 4 * hidden, 4 * size)
    else:
        b, heads, t, size = x.shape
        strides = (4 * heads * t * size, 4 * size, 4 * t * size)
    rotated = rotary_embedding_dim or size
    if not cos_cache.shape == sin_cache.shape == (b, t, rotated // 2):
        return None
    out = empty(x.shape)
    call = (rotary, x.ctypes.data, out.ctypes.data, cos_cache.ctypes.data, sin_cache.ctypes.data,
            b, t, heads, size, rotated, *strides, interleaved)  # fmt: skip
    return Rows((out,), [call], serial=b * t == 1, keep=(x, cos_cache, sin_cache))


@op("RotaryEmbedding", since=23, uses=("rotary",), lower=lower_rotary)
def rotary_embedding(
    x, cos_cache, sin_cache, position_ids=None, *, interleaved=0, num_heads=0,
    rotary_embedding_dim=0,
):  # fmt: skip
    """x (B, H, T, D) or (B, T, H D), caches (B, T, R / 2) or, by position_ids, (P, R / 2)."""
    if position_ids is not None:
        ids = in_range("RotaryEmbedding", position_ids, len(cos_cache), 0)
        cos_cache, sin_cache = cos_cache[ids], sin_cache[ids]
    b, t = x.shape[0], x.shape[-2]
    shape = (b, t, cos_cache.shape[-1])
    cos = contiguous(np.broadcast_to(cos_cache, shape), np.float32)
    sin = contiguous(np.broadcast_to(sin_cache, shape), np.float32)
    ready = lower_rotary(
        contiguous(x, np.float32), cos, sin, interleaved=interleaved,
        num_heads=num_heads, rotary_embedding_dim=rotary_embedding_dim,
    )  # fmt: skip
    if ready is None:
        raise ShapeError(
            f"RotaryEmbedding: cos and sin of shapes {cos_cache.shape} and {sin_cache.shape} do "
            f"not fit x of shape {x.shape}"
        )
    return ready.run().astype(x.dtype, copy=False)
