"""Primitives over 32 bytes at a time: dot products of encoded weights in integer arithmetic.

Dims: `q` is a vector (32,) of uint8; a float vector here has shape (8,). A quantised group of 32
activations is a record of RECORD bytes: high (32,) int8, low (32,) int8, then float32: the scale,
the sum of all, of the first 16 and of the last 16, each times the scale. A pair has shape (2,).

x = scale (128 high + low), so that two passes of 8-bit products carry 15 bits of the activations.
"""

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types

from .simd import (
    FLOAT, I8, I16, I32, I64, Vector, address, broadcast, call, constant, half_to_float, host_has,
    load, primitive, read_memory, store, vector_of, write_memory,
)  # fmt: skip
from .vector import f32

RECORD = 96
SCALE, SUM, SUM_FIRST, SUM_LAST = 64, 68, 72, 76
LIMIT = 127 * 128  # the largest |128 high + low|

B32, B16, W2, W8, W16 = (
    vector_of(t, n) for t, n in ((I8, 32), (I8, 16), (I32, 2), (I32, 8), (I32, 16))
)
F2, F8, F16 = (vector_of(FLOAT, n) for n in (2, 8, 16))
u8x32, f32x8, f32x2 = Vector("u8x32", B32), Vector("f32x8", F8), Vector("f32x2", F2)
SUPPORTED = host_has("avx512vnni") and host_has("avx512vl")
"""Whether the host multiplies bytes fast enough for this to pay (vpdpbusd)."""


def _byte(value):
    return constant(value, B32)


@primitive(u8x32, address, twin=lambda p: read_memory(p, np.uint8, 32))
def load_bytes(b, p):
    return load(b, p, B32)


def _twin_split(p):
    packed = read_memory(p, np.uint8, 16)
    return np.concatenate([packed & 15, packed >> 4])


@primitive(u8x32, address, twin=_twin_split)
def load_split(b, p):
    """16 bytes -> their 16 lower halves, then their 16 upper halves."""
    packed = load(b, p, B16)
    order = ir.Constant(vector_of(I32, 32), list(range(32)))
    both = b.shuffle_vector(packed, b.lshr(packed, constant(4, B16)), order)
    return b.and_(both, _byte(15))


@primitive(u8x32, u8x32, types.int64, twin=lambda q, shift: (q >> shift) & 15)
def nibbles(b, q, shift):
    """Four bits of each byte, from bit `shift` on."""
    return b.and_(b.lshr(q, broadcast(b, b.trunc(shift, I8), B32)), _byte(15))


def _raise(mask, to):
    def codegen(b, q, high, shift):
        bits = b.and_(b.lshr(high, broadcast(b, b.trunc(shift, I8), B32)), _byte(mask))
        return b.or_(q, b.shl(bits, _byte(to)))

    def twin(q, high, shift):
        return q | ((high >> shift) & mask).astype(np.uint8) << to

    return primitive(u8x32, u8x32, u8x32, types.int64, twin=twin)(codegen)


with_bit = _raise(1, 4)
"""q with bit `shift` of each byte of `high` as its fifth bit."""
with_two_bits = _raise(3, 4)
"""q with two bits of each byte of `high`, from `shift` on, as its fifth and sixth."""


@primitive(u8x32, u8x32, twin=lambda q: q ^ 128)
def unsigned(b, q):
    """Signed bytes plus 128."""
    return b.xor(q, _byte(-128))


def _twin_dot(q, record):
    parts = read_memory(record, np.int8, 64).astype(np.int32).reshape(2, 32)
    products = (128 * parts[0] + parts[1]) * q.astype(np.int32)
    return products.reshape(8, 4).sum(axis=1).astype(np.float32)


def _products(b, total, q, x):
    if SUPPORTED:
        return call(b, "llvm.x86.avx512.vpdpbusd.256", W8, [total, *_operands(b, q, x)])
    wide = vector_of(I32, 32)
    terms = b.mul(b.zext(q, wide), b.sext(x, wide))
    for j in range(4):
        lanes = ir.Constant(W8, [4 * i + j for i in range(8)])
        total = b.add(total, b.shuffle_vector(terms, ir.Constant(wide, ir.Undefined), lanes))
    return total


def _operands(b, q, x):
    """Newer LLVM declares the instruction over bytes, older over words of four."""
    return (q, x) if llvm.llvm_version_info >= (21,) else (b.bitcast(q, W8), b.bitcast(x, W8))


@primitive(f32x8, u8x32, address, twin=_twin_dot)
def dot32(b, q, record):
    """q (32,) times 128 high + low of a record, summed by fours -> (8,), exact in int32."""
    high, low = (load(b, b.add(record, ir.Constant(I64, o)), B32) for o in (0, 32))
    zero = constant(0, W8)
    upper = b.shl(_products(b, zero, q, high), constant(7, W8))
    return b.sitofp(_products(b, upper, q, low), F8)


@primitive(f32x8, twin=lambda: np.zeros(8, np.float32))
def zero8(b):
    return constant(0.0, F8)


@primitive(f32x8, f32x8, f32x8, twin=np.add)
def add8(b, x, y):
    return b.fadd(x, y)


def _spread(b, pair, lanes):
    """Lanes of a pair, by number, as a vector (8,)."""
    return b.shuffle_vector(pair, ir.Constant(F2, ir.Undefined), ir.Constant(W8, lanes))


@primitive(f32x8, f32x8, f32x2, f32x8, twin=lambda x, s, y: np.float32(x * s[0] + y))
def scale_add(b, x, s, y):
    """x times the first of a pair, plus y."""
    return call(b, "llvm.fmuladd.v8f32", F8, [x, _spread(b, s, [0] * 8), y])


@primitive(f32x8, f32x8, f32x2, f32x8, twin=lambda x, s, y: np.float32(x * np.repeat(s, 4) + y))
def scale_add_halves(b, x, s, y):
    """x times the first of a pair in the first four lanes, the second in the last, plus y."""
    return call(b, "llvm.fmuladd.v8f32", F8, [x, _spread(b, s, [0] * 4 + [1] * 4), y])


@primitive(f32x2, address, twin=lambda p: read_memory(p, np.float16, 2).astype(np.float32))
def pair_of_halves(b, p):
    """Two fp16 at p."""
    return half_to_float(b, load(b, p, vector_of(I16, 2)))


@primitive(
    f32x2, address, twin=lambda p: np.repeat(read_memory(p, np.float16, 1).astype(np.float32), 2)
)
def pair_of_half(b, p):
    """One fp16 at p, twice."""
    one = b.insert_element(ir.Constant(vector_of(I16, 2), [0, 0]), load(b, p, I16),
                           ir.Constant(I32, 0))  # fmt: skip
    return b.shuffle_vector(half_to_float(b, one), ir.Constant(F2, ir.Undefined), constant(0, W2))


@primitive(f32x2, address, twin=lambda p: read_memory(p, np.float32, 2))
def pair_of_floats(b, p):
    return load(b, p, F2)


@primitive(f32x2, f32, twin=lambda x: np.float32([x, x]))
def pair_of_float(b, x):
    """One float, twice."""
    return broadcast(b, x, F2)


@primitive(f32x2, types.int64, types.int64, twin=lambda x, y: np.float32([x, y]))
def pair_of_integers(b, x, y):
    both = ir.Constant(W2, ir.Undefined)
    for i, value in enumerate((x, y)):
        both = b.insert_element(both, b.trunc(value, I32), ir.Constant(I32, i))
    return b.sitofp(both, F2)


@primitive(f32x2, f32x2, f32x2, twin=np.multiply)
def pair_mul(b, x, y):
    return b.fmul(x, y)


@primitive(f32x2, f32x2, f32x2, twin=np.add)
def pair_add(b, x, y):
    return b.fadd(x, y)


@primitive(f32x2, twin=lambda: np.zeros(2, np.float32))
def pair_zero(b):
    return constant(0.0, F2)


def _lane(i):
    @primitive(f32, f32x2, twin=lambda x: x[i])
    def lane(b, x):
        return b.extract_element(x, ir.Constant(I32, i))

    return lane


first, second = _lane(0), _lane(1)


@primitive(f32, f32x8, twin=lambda x: np.float32(np.sum(x, dtype=np.float32)))
def sum8(b, x):
    function = b.module.declare_intrinsic(
        "llvm.vector.reduce.fadd.v8f32", (), ir.FunctionType(FLOAT, [FLOAT, F8])
    )
    return b.call(function, [ir.Constant(FLOAT, -0.0), x], fastmath=("reassoc",))


def _twin_quantize(x, inverse, out):
    rounded = np.rint(read_memory(x, np.float32, 16) * np.float32(inverse))
    whole = np.nan_to_num(rounded).astype(np.int32)
    high = (whole + 64) >> 7
    write_memory(out, high.astype(np.int8))
    write_memory(out + 32, (whole - 128 * high).astype(np.int8))
    return np.float32(whole.sum())


@primitive(f32, address, f32, address, twin=_twin_quantize)
def quantize16(b, x, inverse, out):
    """16 floats at x times `inverse`, rounded -> high at out and low at out + 32; their sum."""
    scaled = b.fmul(load(b, x, F16), broadcast(b, inverse, F16))
    rounded = call(b, "llvm.rint.v16f32", F16, [scaled])
    whole = call(b, "llvm.fptosi.sat.v16i32.v16f32", W16, [rounded])
    high = b.ashr(b.add(whole, constant(64, W16)), constant(7, W16))
    low = b.sub(whole, b.shl(high, constant(7, W16)))
    store(b, b.trunc(high, B16), out)
    store(b, b.trunc(low, B16), b.add(out, ir.Constant(I64, 32)))
    return b.sitofp(call(b, "llvm.vector.reduce.add.v16i32", I32, [whole]), FLOAT)
