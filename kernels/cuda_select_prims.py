"""Primitives of kernels that select: an order of floats by integers, long integers among a warp,
counting in shared memory.

Dims: as in cuda_prims.py. Source: PTX ISA 9.0.
"""

import numpy as np

from . import cuda_simulator as simulator
from .cuda_primitive import assembly, primitive
from .cuda_prims import SHARED


def _order_twin(value):
    bits = int(np.array([value], np.float32).view(np.uint32)[0])
    if bits == 0x80000000:
        return bits
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


@primitive("u32", "f32", twin=_order_twin)
def order_of_f32(ir, builder, value):
    """A whole number for a float32: the larger the one, the larger the other; -0 is as 0."""
    i32 = ir.IntType(32)
    bits, top = builder.bitcast(value, i32), i32(0x80000000)
    flipped = builder.xor(bits, builder.or_(builder.ashr(bits, i32(31)), top))
    return builder.select(builder.icmp_unsigned("==", bits, top), top, flipped)


def _shuffle_twin(value, mask):
    values, lane = simulator.exchange(int(value))
    return values[lane ^ mask]


@primitive("i64", "i64", "i32", twin=_shuffle_twin)
def shuffle_xor_i64(ir, builder, value, mask):
    """The value that the lane whose number differs by `mask` gives; every lane has to come."""
    text = (
        "{ .reg .b32 low, high; mov.b64 {low, high}, $1; "
        "shfl.sync.bfly.b32 low, low, $2, 0x1f, 0xffffffff; "
        "shfl.sync.bfly.b32 high, high, $2, 0x1f, 0xffffffff; mov.b64 $0, {low, high}; }"
    )
    return assembly(ir, builder, text, [ir.IntType(64)], [value, mask], effect=True)


@primitive("i64", "i32", twin=lambda a: simulator.memory(SHARED).load(a, np.int64))
def shared_i64(ir, builder, address):
    """8 bytes of shared memory."""
    text = "ld.shared.s64 $0, [$1];"
    return assembly(ir, builder, text, [ir.IntType(64)], [address], effect=True, memory=True)


@primitive(
    "void", "i32", "i64", twin=lambda a, v: simulator.memory(SHARED).store(a, int(v), np.int64)
)
def store_shared_i64(ir, builder, address, value):
    """Write 8 bytes of shared memory."""
    text = "st.shared.s64 [$0], $1;"
    return assembly(ir, builder, text, [], [address, value], effect=True, memory=True)


def _add_twin(address, value):
    memory = simulator.memory(SHARED)
    memory.store(address, memory.load(address, np.int32) + int(value), np.int32)


@primitive("void", "i32", "i32", twin=_add_twin)
def add_shared_i32(ir, builder, address, value):
    """Add to 4 bytes of shared memory, whoever else adds to them."""
    text = "red.shared.add.s32 [$0], $1;"
    return assembly(ir, builder, text, [], [address, value], effect=True, memory=True)


@primitive("f32", "f32", twin=lambda x: np.log2(np.float32(x)))
def log2(ir, builder, x):
    """The binary logarithm by the special function unit: within 2 ** -22, of numbers from 1/2 to 2
    absolutely, of others of its value."""
    return assembly(ir, builder, "lg2.approx.ftz.f32 $0, $1;", [ir.FloatType()], [x])
