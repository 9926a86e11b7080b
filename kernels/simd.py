"""The SIMD layer: LLVM vectors as Numba values, and primitives over plain addresses.

Dims: every vector has 16 lanes. LLVM splits it into what the host has (one zmm, two ymm, four
NEON registers), so one source serves all of them.

A primitive is written once for the compiler (its code generator) and once for Python (its twin,
in NumPy); with NUMBA_DISABLE_JIT=1 the twin stands in, so that every kernel also runs uncompiled.
Addresses are integers: kernels take no arrays, and nothing here checks a bound.
"""

import ctypes
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, register_model

LANES = 16
JIT = not config.DISABLE_JIT
ON_X86 = "x86" in llvm.get_process_triple()

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
HALF, FLOAT, DOUBLE, VOID = ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.VoidType()


def vector_of(element, lanes=LANES):
    """The LLVM vector type of (lanes,) elements."""
    return ir.VectorType(element, lanes)


VF32, VI32, VI16, VI8, VF16 = (vector_of(t) for t in (FLOAT, I32, I16, I8, HALF))


class Vector(types.Type):
    """The Numba type of a (16,) vector; its data model is the LLVM vector itself."""

    def __init__(self, name, llvm_type):
        self.llvm_type = llvm_type
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, numba_type.llvm_type)


f32x16 = Vector("f32x16", VF32)
address = types.int64


@cache
def host_has(feature):
    """Whether the CPU that Numba compiles for has `feature` (LLVM's name, such as "f16c")."""
    if config.CPU_FEATURES is not None:
        return f"+{feature}" in config.CPU_FEATURES.split(",")
    if config.CPU_NAME not in (None, "host"):
        return False
    return bool(llvm.get_host_cpu_features().get(feature, False))


_BY_ARITY = (
    lambda f: lambda tc: f(),
    lambda f: lambda tc, a: f(a),
    lambda f: lambda tc, a, b: f(a, b),
    lambda f: lambda tc, a, b, c: f(a, b, c),
    lambda f: lambda tc, a, b, c, d: f(a, b, c, d),
    lambda f: lambda tc, a, b, c, d, e: f(a, b, c, d, e),
    lambda f: lambda tc, a, b, c, d, e, g: f(a, b, c, d, e, g),
)


def primitive(result, *arguments, twin):
    """Declare a primitive: its Numba types, its NumPy twin, and the code generator decorated.

    The generator is called with the IR builder and the argument values.
    """

    def declare(generate):
        if not JIT:
            return twin

        def codegen(context, builder, signature, values):
            value = generate(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        typer = _BY_ARITY[len(arguments)](lambda *_: (result(*arguments), codegen))
        typer.__name__ = generate.__name__
        return intrinsic(typer)

    return declare


# -- helpers of the code generators ------------------------------------------------------------


def pointer(builder, where, llvm_type):
    return builder.inttoptr(where, llvm_type.as_pointer())


def load(builder, where, llvm_type, align=1):
    return builder.load(pointer(builder, where, llvm_type), align=align)


def store(builder, value, where, align=1):
    builder.store(value, pointer(builder, where, value.type), align=align)


def call(builder, name, result, arguments):
    """Call the LLVM intrinsic or external symbol `name`."""
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


def constant(value, llvm_type=VF32):
    return ir.Constant(llvm_type, [value] * llvm_type.count)


def broadcast(builder, scalar, llvm_type=VF32):
    undefined = ir.Constant(llvm_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, constant(0, vector_of(I32, llvm_type.count)))


def lanes_from(first, count):
    """Which lanes a shuffle takes: `count` from `first` on."""
    return ir.Constant(vector_of(I32, count), list(range(first, first + count)))


def half_to_float(builder, bits):
    """<n x i16> holding fp16 -> <n x float>; by integer arithmetic where the CPU cannot."""
    count = bits.type.count
    if host_has("f16c") or not ON_X86:
        return builder.fpext(builder.bitcast(bits, vector_of(HALF, count)), vector_of(FLOAT, count))
    wide, single = vector_of(I32, count), vector_of(FLOAT, count)
    half = builder.zext(bits, wide)
    magnitude = builder.and_(half, constant(0x7FFF, wide))
    shifted = builder.shl(magnitude, constant(13, wide))
    scaled = builder.fmul(builder.bitcast(shifted, single), constant(2.0**112, single))
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00, wide))
    infinite = builder.or_(shifted, constant(0x7F800000, wide))
    value = builder.select(special, infinite, builder.bitcast(scaled, wide))
    sign = builder.shl(builder.and_(half, constant(0x8000, wide)), constant(16, wide))
    return builder.bitcast(builder.or_(value, sign), single)


def bfloat_to_float(builder, bits):
    wide = builder.shl(builder.zext(bits, VI32), constant(16, VI32))
    return builder.bitcast(wide, VF32)


def float_to_half(builder, value):
    """<16 x float> -> <16 x i16> holding fp16, round to nearest even."""
    if host_has("f16c") or not ON_X86:
        return builder.bitcast(builder.fptrunc(value, VF16), VI16)
    # Adding 0.5 ulp of the half's exponent rounds in fp32 hardware (F. Giesen, "half to float").
    bits = builder.bitcast(value, VI32)
    sign = builder.and_(bits, constant(-0x80000000, VI32))
    magnitude = builder.xor(bits, sign)
    odd = builder.and_(builder.lshr(magnitude, constant(13, VI32)), constant(1, VI32))
    normal = builder.add(builder.add(magnitude, constant(-0x37FFF001, VI32)), odd)
    small = builder.fadd(builder.bitcast(magnitude, VF32), constant(0.5))
    denormal = builder.sub(builder.bitcast(small, VI32), constant(0x3F000000, VI32))
    half = builder.lshr(normal, constant(13, VI32))
    is_small = builder.icmp_unsigned("<", magnitude, constant(0x38800000, VI32))
    half = builder.select(is_small, denormal, half)
    is_large = builder.icmp_unsigned(">=", magnitude, constant(0x47800000, VI32))
    is_nan = builder.icmp_unsigned(">", magnitude, constant(0x7F800000, VI32))
    large = builder.select(is_nan, constant(0x7E00, VI32), constant(0x7C00, VI32))
    half = builder.select(is_large, large, half)
    return builder.trunc(builder.or_(half, builder.lshr(sign, constant(16, VI32))), VI16)


def lane_mask(builder, count):
    """<16 x i1>: lane i is set when i < count."""
    lanes = ir.Constant(VI32, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, I32), VI32))


def masked_load(builder, where, count, element, suffix):
    vector = vector_of(element)
    return call(builder, f"llvm.masked.load.v16{suffix}.p0", vector, [
        pointer(builder, where, vector), ir.Constant(I32, 1), lane_mask(builder, count),
        constant(0, vector) if suffix != "f32" else constant(0.0),
    ])  # fmt: skip


def masked_store(builder, value, where, count, suffix):
    call(builder, f"llvm.masked.store.v16{suffix}.p0", VOID, [
        value, pointer(builder, where, value.type), ir.Constant(I32, 1), lane_mask(builder, count),
    ])  # fmt: skip


# -- helpers of the twins ----------------------------------------------------------------------


def read_memory(where, dtype, count):
    """(count,) elements at an address, copied."""
    size = np.dtype(dtype).itemsize * count
    return np.frombuffer(ctypes.string_at(int(where), size), dtype).copy()


def write_memory(where, array):
    data = np.ascontiguousarray(array)
    ctypes.memmove(int(where), data.ctypes.data, data.nbytes)


def read_padded(where, dtype, count):
    """The first `count` of 16 lanes at an address as fp32, zeros behind them."""
    lanes = np.zeros(LANES, np.float32)
    count = max(0, min(LANES, int(count)))
    lanes[:count] = read_memory(where, dtype, count).astype(np.float32)
    return lanes


def widen_bfloat(bits):
    """(n,) uint16 holding bfloat16 -> (n,) float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
