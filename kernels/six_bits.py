"""Four numbers of 6 bits of each of 16 rows in 48 bytes: what q4_k and q5_k scale two groups by.

Dims: (16,) uint16, then (16,) uint8. The first holds two numbers and the lower four bits of the
last one, the second a number and the upper two.
"""

import numpy as np
from llvmlite import ir

from .simd import (
    I64, VF32, VI8, VI16, VI32, address, constant, f32x16, load, primitive, read_memory,
)  # fmt: skip


def _six_bits(choose, name):
    """One of four numbers of 6 bits that 16 rows have in 48 bytes at p."""

    def twin(p):
        words = read_memory(p, np.uint16, 16).astype(np.int32)
        return choose(words, read_memory(p + 32, np.uint8, 16).astype(np.int32)).astype(np.float32)

    def generate(b, p):
        words = b.zext(load(b, p, VI16), VI32)
        more = b.zext(load(b, b.add(p, ir.Constant(I64, 32)), VI8), VI32)
        return b.sitofp(choose(_Bits(b, words), _Bits(b, more)).value, VF32)

    generate.__name__ = name
    return primitive(f32x16, address, twin=twin)(generate)


class _Bits:
    """A (16,) int32 value that understands what NumPy does of shifts and masks."""

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def __rshift__(self, count):
        return _Bits(self.builder, self.builder.lshr(self.value, constant(count, VI32)))

    def __and__(self, mask):
        return _Bits(self.builder, self.builder.and_(self.value, constant(mask, VI32)))

    def __or__(self, other):
        return _Bits(self.builder, self.builder.or_(self.value, other.value))


six_bits_0 = _six_bits(lambda words, more: words & 63, "six_bits_0")
six_bits_1 = _six_bits(lambda words, more: words >> 6 & 63, "six_bits_1")
six_bits_2 = _six_bits(lambda words, more: more & 63, "six_bits_2")
six_bits_3 = _six_bits(lambda words, more: words >> 12 | more >> 2 & 48, "six_bits_3")
"""The four numbers of each row as floats (16,)."""
