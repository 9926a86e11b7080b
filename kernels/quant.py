"""Encoded weights: unpacking groups of 32 elements of a row, for every encoding.

Dims: a row holds K elements; group g is its elements 32 g .. 32 g + 31, unpacked into two
vectors (16,) of float32. Blocks are those of GGUF (ggml-quants.c): a scale d in fp16 and, by
encoding, a minimum m: q8_0 d q; q4_0 d (q - 8); q4_1 d q + m; q4_k and q5_k
(d s) q - (dmin m) with 6-bit s and m per 32 elements; q6_k (d s) (q - 32) with int8 s per 16.
"""

import numpy as np

from .encoding import Token
from .jit import inline
from .vector import (
    fma, load_bf16, load_f16, load_f32, load_five_bits, load_i8, load_nibbles,
    load_six_bits, load_u8, mul, peek_bf16, peek_f16, peek_f32, peek_i8, peek_u8, splat,
)  # fmt: skip


@inline
def unpack_float32(row, g):
    """Group g of a row: (16,), (16,)."""
    return load_f32(row + 128 * g), load_f32(row + 128 * g + 64)


@inline
def unpack_float16(row, g):
    return load_f16(row + 64 * g), load_f16(row + 64 * g + 32)


@inline
def unpack_bfloat16(row, g):
    return load_bf16(row + 64 * g), load_bf16(row + 64 * g + 32)


@inline
def unpack_uint8(row, g):
    """The stored integers; scale and zero point belong to the whole tensor."""
    return load_u8(row + 32 * g), load_u8(row + 32 * g + 16)


@inline
def unpack_q8_0(row, g):
    p = row + 34 * g
    d = splat(peek_f16(p))
    return mul(load_i8(p + 2), d), mul(load_i8(p + 18), d)


@inline
def unpack_q4_0(row, g):
    p = row + 18 * g
    d = peek_f16(p)
    scale, offset = splat(d), splat(-8 * d)
    return fma(load_nibbles(p + 2, 0), scale, offset), fma(load_nibbles(p + 2, 4), scale, offset)


@inline
def unpack_q4_1(row, g):
    p = row + 20 * g
    scale, offset = splat(peek_f16(p)), splat(peek_f16(p + 2))
    return fma(load_nibbles(p + 4, 0), scale, offset), fma(load_nibbles(p + 4, 4), scale, offset)


@inline
def k_scale(p, i):
    """The 6-bit scale and minimum of group i of 8, from the 12 bytes at p."""
    if i < 4:
        return peek_u8(p + i) & 63, peek_u8(p + i + 4) & 63
    high = peek_u8(p + i + 4)
    scale = (high & 15) | ((peek_u8(p + i - 4) >> 6) << 4)
    return scale, (high >> 4) | ((peek_u8(p + i) >> 6) << 4)


@inline
def _k_affine(p, i):
    """Scale and offset of group i of the q4_k or q5_k block at p: value = scale q + offset."""
    s, m = k_scale(p + 4, i)
    return splat(peek_f16(p) * s), splat(-(peek_f16(p + 2) * m))


@inline
def unpack_q4_k(row, g):
    p, i = row + 144 * (g >> 3), g & 7
    scale, offset = _k_affine(p, i)
    q, shift = p + 16 + 32 * (i >> 1), 4 * (i & 1)
    low, high = load_nibbles(q, shift), load_nibbles(q + 16, shift)
    return fma(low, scale, offset), fma(high, scale, offset)


@inline
def unpack_q5_k(row, g):
    p, i = row + 176 * (g >> 3), g & 7
    scale, offset = _k_affine(p, i)
    q, h = p + 48 + 32 * (i >> 1), p + 16
    low, high = load_five_bits(q, h, i), load_five_bits(q + 16, h + 16, i)
    return fma(low, scale, offset), fma(high, scale, offset)


@inline
def unpack_q6_k(row, g):
    p, half, i = row + 210 * (g >> 3), (g & 7) >> 2, g & 3
    q, h = p + 64 * half + 32 * (i & 1), p + 128 + 32 * half
    s, d = p + 192 + 8 * half + 2 * i, peek_f16(p + 208)
    low, high = load_six_bits(q, h, i), load_six_bits(q + 16, h + 16, i)
    return mul(low, splat(d * peek_i8(s))), mul(high, splat(d * peek_i8(s + 1)))


@inline
def element_float32(row, k):
    """Element k of a row, for the last K % 32."""
    return peek_f32(row + 4 * k)


@inline
def element_float16(row, k):
    return peek_f16(row + 2 * k)


@inline
def element_bfloat16(row, k):
    return peek_bf16(row + 2 * k)


@inline
def element_uint8(row, k):
    return np.float32(peek_u8(row + k))


@inline
def element_none(row, k):
    """Rows of a block encoding are whole groups; there is no last K % 32."""
    return 0.0


FLOAT32 = Token("float32", unpack_float32, element_float32)
FLOAT16 = Token("float16", unpack_float16, element_float16)
BFLOAT16 = Token("bfloat16", unpack_bfloat16, element_bfloat16)
UINT8 = Token("uint8", unpack_uint8, element_uint8)
Q8_0 = Token("q8_0", unpack_q8_0, element_none)
Q4_0 = Token("q4_0", unpack_q4_0, element_none)
Q4_1 = Token("q4_1", unpack_q4_1, element_none)
Q4_K = Token("q4_k", unpack_q4_k, element_none)
Q5_K = Token("q5_k", unpack_q5_k, element_none)
Q6_K = Token("q6_k", unpack_q6_k, element_none)
