"""Rotary position embedding.

Dims: B batch, T tokens, H heads, D head size, R rotated elements of each head (R <= D);
cos and sin (B, T, R / 2). Source: Su et al., "RoFormer" (2021); ONNX RotaryEmbedding-23.
"""

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .buffers import contiguous, empty
from .indexing import in_range
from .jit import arg, jit, kernel, share
from .joined import Flow
from .lowered import Rows, plain
from .vector import fma, load_f32, mul, peek_f32, poke_f32, splat, store_f32


@jit
def rotate(x, out, cos, sin, half, size, interleaved):
    """One head's x (D,), cos and sin (R / 2,) -> out (D,)."""
    minus, done = splat(np.float32(-1)), 0
    if not interleaved:
        done = half // 16 * 16
        for i in range(0, done, 16):
            u, v = load_f32(x + 4 * i), load_f32(x + 4 * (half + i))
            c, s = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
            store_f32(out + 4 * i, fma(u, c, mul(mul(v, s), minus)))
            store_f32(out + 4 * (half + i), fma(v, c, mul(u, s)))
    for i in range(done, half):
        first = 2 * i if interleaved else i
        second = 2 * i + 1 if interleaved else half + i
        u, v = peek_f32(x + 4 * first), peek_f32(x + 4 * second)
        ci, si = peek_f32(cos + 4 * i), peek_f32(sin + 4 * i)
        poke_f32(out + 4 * first, u * ci - v * si)
        poke_f32(out + 4 * second, u * si + v * ci)
    for i in range(2 * half, size):
        poke_f32(out + 4 * i, peek_f32(x + 4 * i))


@kernel
def rotary(args, thread, threads):
    """x (B, T, H, D) by strides, cos and sin (B T, R / 2) -> out, laid out as x.

    args: x, out, cos, sin, B, T, H, D, R, strides in bytes of batch, token and head, interleaved.
    Element pairs are (i, i + R / 2), or (2 i, 2 i + 1) when interleaved. Shares are cut at heads.
    """
    x, out, cos, sin = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tokens, heads, size, half = arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8) // 2
    interleaved = arg(args, 12)
    start, stop = share(arg(args, 4) * tokens * heads, 1, thread, threads)
    for unit in range(start, stop):
        t, h = unit // heads, unit % heads
        place = arg(args, 9) * (t // tokens) + arg(args, 10) * (t % tokens) + arg(args, 11) * h
        c, s = cos + 4 * half * t, sin + 4 * half * t
        rotate(x + place, out + place, c, s, half, size, interleaved)


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
    source, place, *tables = (a.ctypes.data for a in (x, out, cos_cache, sin_cache))
    call = (rotary, source, place, *tables, b, t, heads, size, rotated, *strides, interleaved)
    flow = Flow(
        ((place, out.nbytes),), whole=tuple((table, cos_cache.nbytes) for table in tables),
        own=((source, x.nbytes),), items=heads if b * t == 1 else 0, each=size,
    )  # fmt: skip
    return Rows(
        (out,), [call], serial=b * t == 1, keep=(x, cos_cache, sin_cache), flows=(flow,)
    )  # fmt: skip


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
