"""Single groups of panels, for products of many rows: a group's quads and its scales (panels.py).

Dims: a panel holds 16 rows of K elements in groups of 32; each function gives, of group g, the
quads and (16,) vectors: the scale; the scale and an offset; or the scales of its halves.
"""

from .jit import inline
from .quads import (
    load_quads, load_split_quads, lower_nibbles, upper_nibbles, with_bit, with_two_bits,
)  # fmt: skip
from .six_bits import six_bits_0, six_bits_1, six_bits_2, six_bits_3
from .vector import load_f16, load_i8, mul, splat


@inline
def between(panel, nbytes, i):
    """Block i of those that lie two by two about their scales (16,) float16, of `nbytes` with its
    own: where it is, and where its scales."""
    both, odd = panel + 2 * nbytes * (i >> 1), i & 1
    return both + (nbytes + 32) * odd, both + nbytes - 32 + 32 * odd


@inline
def read_q8_0(panel, g):
    quads, scales = between(panel, 544, g)
    return load_quads(quads), load_f16(scales)


@inline
def read_q4_0(panel, g):
    quads, scales = between(panel, 288, g)
    return load_split_quads(quads), load_f16(scales)


@inline
def read_q4_1(panel, g):
    block = panel + 320 * g
    return load_split_quads(block + 64), load_f16(block), load_f16(block + 32)


@inline
def k_affine(block, numbers, odd):
    """Scale and offset (16,) of a group of a q4_k or q5_k block, the first or second of a pair."""
    d, least = load_f16(block), mul(load_f16(block + 32), splat(-1.0))
    if odd:
        return mul(d, six_bits_1(numbers)), mul(least, six_bits_3(numbers))
    return mul(d, six_bits_0(numbers)), mul(least, six_bits_2(numbers))


@inline
def nibbles(q, upper):
    """The upper or lower halves of the bytes of eight quads."""
    return upper_nibbles(q) if upper else lower_nibbles(q)


@inline
def read_q4_k(panel, g):
    block, pair, odd = panel + 2304 * (g >> 3), (g & 7) >> 1, g & 1
    q = nibbles(load_quads(block + 256 + 512 * pair), odd)
    scale, offset = k_affine(block, block + 64 + 48 * pair, odd)
    return q, scale, offset


@inline
def read_q5_k(panel, g):
    block, pair, odd = panel + 2816 * (g >> 3), (g & 7) >> 1, g & 1
    q = nibbles(load_quads(block + 256 + 512 * pair), odd)
    scale, offset = k_affine(block, block + 64 + 48 * pair, odd)
    return with_bit(q, load_quads(block + 2304), g & 7), scale, offset


@inline
def read_q6_k(panel, g):
    """Of each four groups the first shares its bytes with the third, the second with the last."""
    block, scales = between(panel, 3360, g >> 3)
    d, half, i = load_f16(scales), (g & 7) >> 2, g & 3
    q = nibbles(load_quads(block + 256 + 1024 * half + 512 * (i & 1)), i >> 1)
    each = block + 128 * half + 32 * i
    first, last = mul(d, load_i8(each)), mul(d, load_i8(each + 16))
    return with_two_bits(q, load_quads(block + 2304 + 512 * half), 2 * i), first, last
