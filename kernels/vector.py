"""The primitives that kernels are written in.

Dims: a vector `v` has shape (16,) of float32; `p` is an address, `n` a count of leading lanes.
"""

import numpy as np
from llvmlite import ir
from numba import types

from .simd import (
    DOUBLE, FLOAT, I8, I16, I32, I64, LANES, VF32, VI8, VI16, VI32, VOID, address,
    bfloat_to_float, broadcast, call, constant, f32x16, float_to_half, half_to_float, load,
    masked_load, masked_store, pointer, primitive, read_memory, read_padded, store, vector_of,
    widen_bfloat, write_memory,
)  # fmt: skip

f32, i64 = types.float32, types.int64

# -- loads and stores of vectors ---------------------------------------------------------------


@primitive(f32x16, address, twin=lambda p: read_memory(p, np.float32, LANES))
def load_f32(b, p):
    return load(b, p, VF32)


@primitive(f32x16, address, i64, twin=lambda p, n: read_padded(p, np.float32, n))
def load_f32_n(b, p, n):
    return masked_load(b, p, n, FLOAT, "f32")


@primitive(types.void, address, f32x16, twin=lambda p, v: write_memory(p, np.float32(v)))
def store_f32(b, p, v):
    store(b, v, p)


@primitive(
    types.void, address, f32x16, i64,
    twin=lambda p, v, n: write_memory(p, np.float32(v)[: max(0, min(LANES, n))]),
)  # fmt: skip
def store_f32_n(b, p, v, n):
    masked_store(b, v, p, n, "f32")


@primitive(f32x16, address, twin=lambda p: read_memory(p, np.float16, LANES).astype(np.float32))
def load_f16(b, p):
    return half_to_float(b, load(b, p, VI16))


@primitive(f32x16, address, i64, twin=lambda p, n: read_padded(p, np.float16, n))
def load_f16_n(b, p, n):
    return half_to_float(b, masked_load(b, p, n, I16, "i16"))


def _to_half(v):
    with np.errstate(over="ignore"):
        return np.asarray(v).astype(np.float16)


@primitive(types.void, address, f32x16, twin=lambda p, v: write_memory(p, _to_half(v)))
def store_f16(b, p, v):
    store(b, float_to_half(b, v), p)


@primitive(
    types.void, address, f32x16, i64,
    twin=lambda p, v, n: write_memory(p, _to_half(v)[: max(0, min(LANES, n))]),
)  # fmt: skip
def store_f16_n(b, p, v, n):
    masked_store(b, float_to_half(b, v), p, n, "i16")


@primitive(f32x16, address, twin=lambda p: widen_bfloat(read_memory(p, np.uint16, LANES)))
def load_bf16(b, p):
    return bfloat_to_float(b, load(b, p, VI16))


@primitive(f32x16, address, twin=lambda p: read_memory(p, np.int8, LANES).astype(np.float32))
def load_i8(b, p):
    """16 signed bytes -> float."""
    return b.sitofp(b.sext(load(b, p, VI8), VI32), VF32)


@primitive(f32x16, address, twin=lambda p: read_memory(p, np.uint8, LANES).astype(np.float32))
def load_u8(b, p):
    """16 unsigned bytes -> float."""
    return b.uitofp(b.zext(load(b, p, VI8), VI32), VF32)


def _bits(b, p, shift, mask):
    wide = b.zext(load(b, p, VI8), VI32)
    return b.and_(b.lshr(wide, broadcast(b, b.trunc(shift, I32), VI32)), constant(mask, VI32))


@primitive(
    f32x16, address, i64,
    twin=lambda p, s: ((read_memory(p, np.uint8, LANES) >> s) & 15).astype(np.float32),
)  # fmt: skip
def load_nibbles(b, p, shift):
    """Four bits of each of 16 bytes, from bit `shift` (0 or 4), as float 0..15."""
    return b.uitofp(_bits(b, p, shift, 15), VF32)


def _twin_fifth(p, ph, at):
    low, high = read_memory(p, np.uint8, LANES), read_memory(ph, np.uint8, LANES)
    nibble = (low >> (4 * (at & 1))) & 15
    return (nibble | ((high >> at) & 1) << 4).astype(np.float32)


@primitive(f32x16, address, address, i64, twin=_twin_fifth)
def load_five_bits(b, p, ph, at):
    """Nibble at & 1 of 16 bytes at p, with bit `at` of 16 bytes at ph above it: float 0..31."""
    odd = b.shl(b.and_(at, ir.Constant(I64, 1)), ir.Constant(I64, 2))
    high = b.shl(_bits(b, ph, at, 1), constant(4, VI32))
    return b.uitofp(b.or_(_bits(b, p, odd, 15), high), VF32)


def _twin_sixth(p, ph, at):
    low, high = read_memory(p, np.uint8, LANES), read_memory(ph, np.uint8, LANES)
    nibble = (low >> (4 * (at >> 1))) & 15
    return (nibble | ((high >> (2 * at)) & 3) << 4).astype(np.float32) - np.float32(32)


@primitive(f32x16, address, address, i64, twin=_twin_sixth)
def load_six_bits(b, p, ph, at):
    """Nibble at >> 1 of 16 bytes at p, bits 2 at.. of 16 bytes at ph above it: float -32..31."""
    upper = b.shl(b.lshr(at, ir.Constant(I64, 1)), ir.Constant(I64, 2))
    high = _bits(b, ph, b.shl(at, ir.Constant(I64, 1)), 3)
    value = b.or_(_bits(b, p, upper, 15), b.shl(high, constant(4, VI32)))
    return b.sitofp(b.sub(value, constant(32, VI32)), VF32)


# -- scalars -----------------------------------------------------------------------------------


def _peek(dtype):
    return lambda p: read_memory(p, dtype, 1)[0].item()


@primitive(f32, address, twin=lambda p: read_memory(p, np.float32, 1)[0])
def peek_f32(b, p):
    return load(b, p, FLOAT)


@primitive(f32, address, twin=lambda p: np.float32(read_memory(p, np.float16, 1)[0]))
def peek_f16(b, p):
    bits = b.insert_element(ir.Constant(vector_of(I16, 1), [0]), load(b, p, I16),
                            ir.Constant(I32, 0))  # fmt: skip
    return b.extract_element(half_to_float(b, bits), ir.Constant(I32, 0))


@primitive(types.float64, address, twin=_peek(np.float64))
def peek_f64(b, p):
    return load(b, p, DOUBLE)


@primitive(i64, address, twin=_peek(np.int64))
def peek_i64(b, p):
    return load(b, p, I64)


@primitive(i64, address, twin=_peek(np.uint8))
def peek_u8(b, p):
    return b.zext(load(b, p, I8), I64)


@primitive(i64, address, twin=_peek(np.int8))
def peek_i8(b, p):
    return b.sext(load(b, p, I8), I64)


@primitive(f32, address, twin=lambda p: widen_bfloat(read_memory(p, np.uint16, 1))[0])
def peek_bf16(b, p):
    bits = b.shl(b.zext(load(b, p, I16), I32), ir.Constant(I32, 16))
    return b.bitcast(bits, FLOAT)


@primitive(types.void, address, f32, twin=lambda p, x: write_memory(p, np.float32(x)))
def poke_f32(b, p, x):
    store(b, x, p)


@primitive(types.void, address, f32, twin=lambda p, x: write_memory(p, _to_half(x)))
def poke_f16(b, p, x):
    half = float_to_half(b, broadcast(b, x))
    store(b, b.extract_element(half, ir.Constant(I32, 0)), p)


# -- arithmetic --------------------------------------------------------------------------------


@primitive(f32x16, twin=lambda: np.zeros(LANES, np.float32))
def zero(b):
    return constant(0.0)


@primitive(f32x16, f32, twin=lambda x: np.full(LANES, x, np.float32))
def splat(b, x):
    return broadcast(b, x)


@primitive(f32x16, f32x16, f32x16, twin=np.add)
def add(b, x, y):
    return b.fadd(x, y)


@primitive(f32x16, f32x16, f32x16, twin=np.subtract)
def sub(b, x, y):
    return b.fsub(x, y)


@primitive(f32x16, f32x16, f32x16, twin=np.multiply)
def mul(b, x, y):
    return b.fmul(x, y)


def _quiet_divide(x, y):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(x, y)


@primitive(f32x16, f32x16, f32x16, twin=_quiet_divide)
def div(b, x, y):
    return b.fdiv(x, y)


@primitive(f32x16, f32x16, f32x16, f32x16, twin=lambda x, y, z: np.float32(x * y + z))
def fma(b, x, y, z):
    """x * y + z, in one rounding where the CPU has it."""
    return call(b, "llvm.fmuladd.v16f32", VF32, [x, y, z])


@primitive(f32x16, f32x16, f32x16, twin=np.maximum)
def maximum(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@primitive(f32x16, f32x16, f32x16, twin=np.minimum)
def minimum(b, x, y):
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@primitive(f32x16, f32x16, twin=np.sqrt)
def sqrt(b, x):
    return call(b, "llvm.sqrt.v16f32", VF32, [x])


@primitive(f32x16, f32x16, twin=np.abs)
def absolute(b, x):
    return call(b, "llvm.fabs.v16f32", VF32, [x])


@primitive(f32, f32x16, twin=lambda x: np.float32(np.sum(x, dtype=np.float32)))
def sum_lanes(b, x):
    function = ir.FunctionType(FLOAT, [FLOAT, VF32])
    reduce = b.module.declare_intrinsic("llvm.vector.reduce.fadd.v16f32", (), function)
    return b.call(reduce, [ir.Constant(FLOAT, -0.0), x], fastmath=("reassoc",))


@primitive(f32, f32x16, twin=lambda x: np.float32(np.max(x)))
def max_lanes(b, x):
    return call(b, "llvm.vector.reduce.fmax.v16f32", FLOAT, [x])


@primitive(
    f32x16, address, f32x16, f32x16, i64,
    twin=lambda p, x, y, n: np.where(read_padded(p, np.uint8, n) != 0, x, y),
)  # fmt: skip
def choose_n(b, p, x, y, n):
    """Lanes of x where the first n bytes at p are not 0, of y elsewhere."""
    wanted = b.icmp_unsigned("!=", masked_load(b, p, n, I8, "i8"), constant(0, VI8))
    return b.select(wanted, x, y)


def _twin_exp(x):
    with np.errstate(under="ignore"):
        value = np.exp(np.minimum(x, np.float32(88.02969)), dtype=np.float64)
        return np.where(x < -87.33654, 0, value).astype(np.float32)


EXPONENTS = 1.5 * 2.0**23 + 127


@primitive(f32x16, f32x16, twin=_twin_exp)
def exp(b, x):
    """e ** x to 2 ulp; 0 where the result is below the normal numbers, at most e ** 88.02969.

    Cephes' expf: x = n ln 2 + r, a polynomial of degree 5 in r, times 2 ** n.
    """

    def madd(u, v, w):
        return call(b, "llvm.fmuladd.v16f32", VF32, [u, v, w])

    # Comparisons are written so that a NaN passes through them.
    tiny = b.fcmp_ordered("<", x, constant(-87.33654))
    x = b.select(b.fcmp_ordered(">", x, constant(88.02969)), constant(88.02969), x)
    # So far from 0, a float32's last bits are those of the nearest integer: of n + 127.
    moved = madd(x, constant(1.44269504088896341), constant(EXPONENTS))
    n = b.fsub(moved, constant(EXPONENTS))
    r = madd(n, constant(-0.693359375), x)
    r = madd(n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = madd(p, r, constant(c))
    p = b.fadd(madd(b.fmul(p, r), r, r), constant(1.0))
    power = b.bitcast(b.shl(b.bitcast(moved, VI32), constant(23, VI32)), VF32)
    return b.select(tiny, constant(0.0), b.fmul(p, power))


# -- moving lanes ------------------------------------------------------------------------------


def _twin_transpose(p, stride, q, to):
    rows = np.stack([read_memory(p + i * stride, np.float32, LANES) for i in range(LANES)])
    for i in range(LANES):
        write_memory(q + i * to, rows[:, i])


@primitive(types.void, address, i64, address, i64, twin=_twin_transpose)
def transpose16(b, p, stride, q, to):
    """Transpose 16 rows of 16 floats, `stride` bytes apart at p, to rows `to` bytes apart at q.

    Four rounds of exchanging blocks of 1, 2, 4 and 8 lanes between rows as far apart.
    """
    rows = [load(b, b.add(p, b.mul(stride, ir.Constant(I64, i))), VF32) for i in range(LANES)]
    for step in (1, 2, 4, 8):
        keep = [i if not i & step else LANES + i - step for i in range(LANES)]
        swap = [i + step if not i & step else LANES + i for i in range(LANES)]
        for i in range(LANES):
            if not i & step:
                x, y = rows[i], rows[i + step]
                rows[i] = b.shuffle_vector(x, y, ir.Constant(VI32, keep))
                rows[i + step] = b.shuffle_vector(x, y, ir.Constant(VI32, swap))
    for i in range(LANES):
        store(b, rows[i], b.add(q, b.mul(to, ir.Constant(I64, i))))


# -- memory and threads ------------------------------------------------------------------------


def have_come(b, p, locality=2):
    """Ask for the cache line at p, to be in the caches from the second on, or from the first on
    with a `locality` of 3."""
    hint = [ir.Constant(I32, n) for n in (0, locality, 1)]
    call(b, "llvm.prefetch.p0", VOID, [pointer(b, p, I8), *hint])


@primitive(types.void, address, twin=lambda p: None)
def prefetch(b, p):
    """Ask for the cache line at p; any address is allowed."""
    have_come(b, p, 3)


def _twin_atomic_add(p, x):
    old = read_memory(p, np.int64, 1)[0].item()
    write_memory(p, np.int64(old + x))
    return old


@primitive(i64, address, i64, twin=_twin_atomic_add)
def atomic_add(b, p, x):
    """Add to the int64 at p, for all threads; the value before."""
    return b.atomic_rmw("add", pointer(b, p, I64), x, "seq_cst")


@primitive(i64, address, twin=_peek(np.int64))
def atomic_load(b, p):
    return b.load_atomic(pointer(b, p, I64), "seq_cst", 8)


@primitive(types.void, address, i64, twin=lambda p, x: write_memory(p, np.int64(x)))
def atomic_store(b, p, x):
    b.store_atomic(x, pointer(b, p, I64), "seq_cst", 8)


def _twin_compare_exchange(p, expected, x):
    old = read_memory(p, np.int64, 1)[0].item()
    if old == expected:
        write_memory(p, np.int64(x))
    return old


@primitive(i64, address, i64, i64, twin=_twin_compare_exchange)
def atomic_compare_exchange(b, p, expected, x):
    """Store x at p if the int64 there is `expected`, for all threads; the value before."""
    result = b.cmpxchg(pointer(b, p, I64), expected, x, "seq_cst", "seq_cst")
    return b.extract_value(result, 0)
