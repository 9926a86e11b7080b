"""Primitives over quads: four consecutive elements of each of 16 rows, a byte each, as one vector.

Dims: `q` holds the eight quads of a group of 32 elements, (8, 16, 4) uint8: quad, row, element. A
quantised group of 32 activations is a record of RECORD bytes: high (32,) int8, low (32,) int8,
then the scale and scale times the sum in float32, and in int32 what a sum of products starts with
when the weights are stored plus an offset: minus 8, 128 or 32 times the activations' sum.

x = scale (128 high + low), so that two passes of 8-bit products carry 15 bits of the activations.
"""

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types

from .simd import (
    FLOAT, I8, I16, I32, I64, LANES, VF32, VI8, VI32, Vector, address, broadcast, call, constant,
    f32x16, host_has, lanes_from, load, primitive, read_memory, store, vector_of, write_memory,
)  # fmt: skip
from .vector import f32, i64

RECORD = 96
SCALE, SUM, MINUS_8, MINUS_128, MINUS_32_FIRST, MINUS_32_LAST, ZERO = range(64, 92, 4)
LIMIT = 127 * 128  # the largest |128 high + low|

QUADS, HALF_QUADS, BYTES = vector_of(I32, 128), vector_of(I32, 64), vector_of(I8, 64)
u8x512 = Vector("u8x512", QUADS)
words = Vector("words", VI32)
"""Four bytes of each of 16 rows: a quad."""
SUPPORTED = host_has("avx512vnni")
"""Whether the host multiplies bytes fast enough for panels to pay (vpdpbusd)."""


UPPER_BITS = 0x1020408000000000
"""The matrix over bits that takes a byte to its upper half (gf2p8affineqb): a byte a bit of what
it gives, the last byte for bit 0."""


def _nibbles(mask):
    return ir.Constant(I32, mask * 0x01010101)


def _upper(b, packed):
    """The upper halves of the bytes of a vector: one instruction where there is one."""
    count = packed.type.count
    if not (SUPPORTED and host_has("gfni")):
        shifted = b.lshr(packed, constant(4, packed.type))
        return b.and_(shifted, broadcast(b, _nibbles(15), packed.type))
    if count > LANES:
        half = count // 2
        ends = (b.shuffle_vector(packed, packed, lanes_from(i, half)) for i in (0, half))
        return b.shuffle_vector(*(_upper(b, end) for end in ends), lanes_from(0, count))
    bits = b.bitcast(constant(UPPER_BITS, vector_of(I64, 8)), BYTES)
    operands = [b.bitcast(packed, BYTES), bits, ir.Constant(I8, 0)]
    return b.bitcast(call(b, "llvm.x86.vgf2p8affineqb.512", BYTES, operands), packed.type)


@primitive(u8x512, address, twin=lambda p: read_memory(p, np.uint8, 512))
def load_quads(b, p):
    """Eight quads of whole bytes."""
    return load(b, p, QUADS)


def _twin_split(p):
    packed = read_memory(p, np.uint8, 256)
    return np.concatenate([packed & 15, packed >> 4])


@primitive(u8x512, address, twin=_twin_split)
def load_split_quads(b, p):
    """Four quads of bytes -> their lower halves, then their upper halves."""
    packed = load(b, p, HALF_QUADS)
    low = b.and_(packed, broadcast(b, _nibbles(15), HALF_QUADS))
    return b.shuffle_vector(low, _upper(b, packed), lanes_from(0, 128))


@primitive(u8x512, u8x512, twin=lambda q: q & 15)
def lower_nibbles(b, q):
    """The lower halves of the bytes of eight quads."""
    return b.and_(q, broadcast(b, _nibbles(15), QUADS))


@primitive(u8x512, u8x512, twin=lambda q: q >> 4)
def upper_nibbles(b, q):
    """The upper halves."""
    return _upper(b, q)


def _raised(mask, name):
    def twin(q, bits, shift):
        return q | (((bits >> shift) & mask) << 4).astype(np.uint8)

    def generate(b, q, bits, shift):
        turn = b.and_(b.sub(ir.Constant(I32, 4), b.trunc(shift, I32)), ir.Constant(I32, 31))
        turned = call(b, "llvm.fshl.v128i32", QUADS, [bits, bits, broadcast(b, turn, QUADS)])
        return b.or_(q, b.and_(turned, broadcast(b, _nibbles(16 * mask), QUADS)))

    generate.__name__ = name
    return primitive(u8x512, u8x512, u8x512, i64, twin=twin)(generate)


with_bit = _raised(1, "with_bit")
"""q with bit `shift` of each byte of eight quads as its fifth bit."""
with_two_bits = _raised(3, "with_two_bits")
"""q with two bits of each byte of eight quads, from `shift` on, as its fifth and sixth."""


def _operands(b, q, x):
    """Newer LLVM declares the instruction over bytes, older over words of four."""
    return [q, x] if llvm.llvm_version_info < (21,) else [b.bitcast(v, BYTES) for v in (q, x)]


def four_products(b, total, q, x):
    """total (16,) int32 plus, in each row, four products of a byte of q with one of x."""
    if SUPPORTED:
        return call(b, "llvm.x86.avx512.vpdpbusd.512", VI32, [total, *_operands(b, q, x)])
    wide = vector_of(I32, 64)
    terms = b.mul(b.zext(b.bitcast(q, BYTES), wide), b.sext(b.bitcast(x, BYTES), wide))
    for j in range(4):
        lanes = ir.Constant(VI32, [4 * i + j for i in range(16)])
        total = b.add(total, b.shuffle_vector(terms, ir.Constant(wide, ir.Undefined), lanes))
    return total


def _integers(record):
    """The elements of a record (32,) int32, for the twins."""
    parts = read_memory(record, np.int8, 64).astype(np.int32).reshape(2, 32)
    return 128 * parts[0] + parts[1]


def _sum_of_products(b, q, record, first, last, start):
    """start (16,) int32 plus quads first .. last times a record's elements -> (16,) float32."""
    sums = [constant(0, VI32), start]
    for j in range(first, last):
        quad = b.shuffle_vector(q, ir.Constant(QUADS, ir.Undefined), lanes_from(16 * j, 16))
        for part in range(2):
            where = b.add(record, ir.Constant(I64, 32 * part + 4 * j))
            x = broadcast(b, load(b, where, I32), VI32)
            sums[part] = four_products(b, sums[part], quad, x)
    return b.sitofp(b.add(b.shl(sums[0], constant(7, VI32)), sums[1]), VF32)


def _dot(first, last, name):
    """The product of quads first .. last with a record's elements."""

    def twin(q, record, start):
        x = _integers(record).reshape(8, 1, 4)[first:last]
        sums = (q.reshape(8, 16, 4)[first:last].astype(np.int32) * x).sum(axis=(0, 2))
        return (sums + read_memory(start, np.int32, 1)).astype(np.float32)

    def generate(b, q, record, start):
        initial = broadcast(b, load(b, start, I32), VI32)
        return _sum_of_products(b, q, record, first, last, initial)

    generate.__name__ = name
    return primitive(f32x16, u8x512, address, address, twin=twin)(generate)


dot = _dot(0, 8, "dot")
"""q times 128 high + low of a record, plus the int32 at `start` -> (16,), exact in int32."""
dot_first, dot_last = _dot(0, 4, "dot_first"), _dot(4, 8, "dot_last")
"""The same for the first 16 elements, and for the last."""


def _dot_above(first, last, field, bits, name):
    """The same less a row's own zero point; `field` of a record is minus 2 ** bits their sum."""

    def twin(q, record, zeros):
        above = q.reshape(8, 16, 4).astype(np.int32) - read_memory(zeros, np.uint8, 16)[:, None]
        x = _integers(record).reshape(8, 1, 4)
        return (above * x)[first:last].sum(axis=(0, 2)).astype(np.float32)

    def generate(b, q, record, zeros):
        scaled = load(b, b.add(record, ir.Constant(I64, field)), I32)
        minus = broadcast(b, b.ashr(scaled, ir.Constant(I32, bits)), VI32)
        start = b.mul(b.zext(load(b, zeros, VI8), VI32), minus)
        return _sum_of_products(b, q, record, first, last, start)

    generate.__name__ = name
    return primitive(f32x16, u8x512, address, address, twin=twin)(generate)


dot_above = _dot_above(0, 8, MINUS_8, 3, "dot_above")
"""q minus the (16,) bytes at `zeros`, one a row, times 128 high + low of a record -> (16,)."""
dot_above_first = _dot_above(0, 4, MINUS_32_FIRST, 5, "dot_above_first")
dot_above_last = _dot_above(4, 8, MINUS_32_LAST, 5, "dot_above_last")
"""The same for the first 16 elements, and for the last."""


def _twin_largest(p):
    magnitudes = np.abs(read_memory(p, np.float32, 32))
    return magnitudes.max() if np.isfinite(magnitudes).all() else np.float32(np.nan)


@primitive(f32, address, twin=_twin_largest)
def largest32(b, p):
    """The largest magnitude of 32 floats, NaN when one is not finite."""
    parts = [b.bitcast(load(b, b.add(p, ir.Constant(I64, i)), VF32), VI32) for i in (0, 64)]
    low, high = (b.and_(part, constant(0x7FFFFFFF, VI32)) for part in parts)
    larger = call(b, "llvm.smax.v16i32", VI32, [low, high])  # in order as integers, too
    most = call(b, "llvm.vector.reduce.smax.v16i32", I32, [larger])
    finite = b.icmp_signed("<", most, ir.Constant(I32, 0x7F800000))
    return b.bitcast(b.select(finite, most, ir.Constant(I32, 0x7FC00000)), FLOAT)


ROUND = 1.5 * 2.0**23
"""Added to a float32 below 2 ** 22, it leaves the nearest integer in the lower bits."""


def twin_rounded(x, inverse):
    """As `rounded`, for the twins."""
    with np.errstate(invalid="ignore", over="ignore"):
        moved = read_memory(x, np.float32, 16) * np.float32(inverse) + np.float32(ROUND)
    return moved.view(np.int32) - np.float32(ROUND).view(np.int32)


def rounded(b, x, inverse):
    """16 floats at x times `inverse`, rounded to (16,) int32."""
    scaled = b.fmul(load(b, x, VF32), broadcast(b, inverse))
    moved = b.bitcast(b.fadd(scaled, constant(ROUND)), VI32)
    return b.sub(moved, constant(0x4B400000, VI32))


def _twin_quantize(x, inverse, out):
    whole = twin_rounded(x, inverse)
    high = (whole + 64) >> 7
    write_memory(out, high.astype(np.int8))
    write_memory(out + 32, (whole - 128 * high).astype(np.int8))
    return int(whole.sum())


@primitive(i64, address, f32, address, twin=_twin_quantize)
def quantize16(b, x, inverse, out):
    """16 floats at x times `inverse`, rounded -> high at out and low at out + 32; their sum."""
    whole = rounded(b, x, inverse)
    high = b.ashr(b.add(whole, constant(64, VI32)), constant(7, VI32))
    low = b.sub(whole, b.shl(high, constant(7, VI32)))
    store(b, b.trunc(high, VI8), out)
    store(b, b.trunc(low, VI8), b.add(out, ir.Constant(I64, 32)))
    return b.sext(call(b, "llvm.vector.reduce.add.v16i32", I32, [whole]), I64)


@primitive(i64, address, twin=lambda p: read_memory(p, np.int32, 1)[0].item())
def peek_i32(b, p):
    return b.sext(load(b, p, I32), I64)


@primitive(types.void, address, i64,
           twin=lambda p, x: write_memory(p, np.int64(x).astype(np.int32)))  # fmt: skip
def poke_i32(b, p, x):
    """The lower 32 bits of x."""
    store(b, b.trunc(x, I32), p)


@primitive(types.void, address, i64,
           twin=lambda p, x: write_memory(p, np.int64(x).astype(np.uint16)))  # fmt: skip
def poke_u16(b, p, x):
    store(b, b.trunc(x, I16), p)


@primitive(types.void, address, i64,
           twin=lambda p, x: write_memory(p, np.int64(x).astype(np.uint8)))  # fmt: skip
def poke_u8(b, p, x):
    store(b, b.trunc(x, I8), p)


@primitive(i64, address, twin=lambda p: read_memory(p, np.uint16, 1)[0].item())
def peek_u16(b, p):
    return b.zext(load(b, p, I16), I64)


def _twin_byte_words(p, step):
    rows = np.stack([read_memory(p + step * i, np.uint8, 16) for i in range(4)], axis=1)
    return rows.reshape(-1).view(np.int32)


@primitive(words, address, i64, twin=_twin_byte_words)
def byte_words(b, p, step):
    """Four runs of 16 bytes, `step` apart -> word i holds byte i of each."""
    total = constant(0, VI32)
    for j in range(4):
        run = b.zext(load(b, b.add(p, b.mul(step, ir.Constant(I64, j))), VI8), VI32)
        total = b.or_(total, b.shl(run, constant(8 * j, VI32)))
    return total


def _twin_nibble_words(p, step):
    runs = [read_memory(p + step * i, np.uint8, 8) for i in range(4)]
    rows = [np.stack([run & 15, run >> 4], axis=1).reshape(-1) for run in runs]
    return np.stack(rows, axis=1).reshape(-1).view(np.int32)


@primitive(words, address, i64, twin=_twin_nibble_words)
def nibble_words(b, p, step):
    """Four runs of 16 nibbles, `step` bytes apart -> word i holds nibble i of each, a byte each."""
    half, total = vector_of(I8, 8), constant(0, VI32)
    pairs = ir.Constant(VI32, [i // 2 + 8 * (i % 2) for i in range(16)])
    for j in range(4):
        run = load(b, b.add(p, b.mul(step, ir.Constant(I64, j))), half)
        low = b.and_(run, constant(15, half))
        high = b.lshr(run, constant(4, half))
        each = b.zext(b.shuffle_vector(low, high, pairs), VI32)
        total = b.or_(total, b.shl(each, constant(8 * j, VI32)))
    return total


@primitive(words, words, words, twin=lambda low, high: low | high << 4)
def with_upper_words(b, low, high):
    """Bytes of which `low` are the lower halves and `high` the upper."""
    return b.or_(low, b.shl(high, constant(4, VI32)))


@primitive(types.void, address, words, i64, twin=lambda p, v, flip: write_memory(
    p, v ^ np.int64(flip).astype(np.int32)))  # fmt: skip
def store_words(b, p, v, flip):
    """A quad, the lower 32 bits of `flip` turned over in every word."""
    store(b, b.xor(v, broadcast(b, b.trunc(flip, I32), VI32)), p)
