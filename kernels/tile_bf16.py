"""The register tile under products in bfloat16: C += A B on 8 rows, or in AMX tiles on 16 and 32.

Dims: A is (K / 32, R, 32) bfloat16, 16 rows R a panel; B is (K / 2, 32, 2) bfloat16: pairs of
elements along K, column by column; C is (R, 32) float32. Sums are float32.

vdpbf16ps multiplies pairs and adds them up in 16 lanes, tdpbf16ps in tiles of 16 rows of 64 bytes.
Intel, "Architecture Instruction Set Extensions" (319433), on both.
"""

import ctypes
import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .simd import (
    I8, I32, I64, LANES, VF32, VI16, VI32, VOID, address, broadcast, call, constant, f32x16,
    host_has, load, pointer, primitive, read_memory, store, vector_of, widen_bfloat, write_memory,
)  # fmt: skip

PANEL = 16  # rows of A
COLUMNS = 32
BLOCK_BYTES = 64 * PANEL  # a panel's 32 elements of K


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite lacks: it only needs a name."""

    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"

    _to_string = __str__

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash("bfloat")


BFLOATS, PAIRS = vector_of(BFloat(), LANES), vector_of(BFloat(), 2 * LANES)


def _allowed():
    """Ask Linux for the use of tiles: without it, their first instruction ends the process."""
    if sys.platform != "linux":
        return False
    request, tile_data = 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (158, request, tile_data))) == 0


AMX = host_has("amx-bf16") and host_has("amx-tile") and _allowed()
"""Whether products run in AMX tiles."""
NATIVE = host_has("avx512bf16")
"""Whether it has instructions for bfloat16 in vectors; elsewhere the kernels compile, too."""
SUPPORTED = AMX or NATIVE
"""Whether the host multiplies bfloat16 faster than float32."""


def round_bfloat(values):
    """(n,) float32 -> (n,) uint16 holding bfloat16, round to nearest even, NaN kept."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), (bits >> 16 | 0x40).astype(np.uint16), rounded)


def _narrowed(b, x):
    """(16,) float32 -> (16,) bfloat16, as `round_bfloat`: elsewhere LLVM would call a library."""
    if NATIVE:
        return b.fptrunc(x, BFLOATS)
    bits = b.bitcast(x, VI32)
    odd = b.and_(b.lshr(bits, constant(16, VI32)), constant(1, VI32))
    rounded = b.add(b.add(bits, constant(0x7FFF, VI32)), odd)
    quiet = b.or_(bits, constant(0x400000, VI32))
    whole = b.select(b.fcmp_unordered("uno", x, x), quiet, rounded)
    return b.bitcast(b.trunc(b.lshr(whole, constant(16, VI32)), VI16), BFLOATS)


def _twin_rest(x):
    rounded = widen_bfloat(round_bfloat(x))
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(rounded), x - rounded, np.float32(0))


@primitive(f32x16, f32x16, twin=_twin_rest)
def rest_bf16(b, x):
    """What rounding to bfloat16 takes from each element; 0 beside what is not finite."""
    rounded = b.fpext(_narrowed(b, x), VF32)
    size = call(b, "llvm.fabs.v16f32", VF32, [rounded])
    finite = b.fcmp_ordered("<", size, constant(float("inf")))
    return b.select(finite, b.fsub(x, rounded), constant(0.0))


@primitive(types.void, address, f32x16, f32x16,
           twin=lambda p, x, y: write_memory(p, round_bfloat(np.concatenate([x, y]))))  # fmt: skip
def store_bf16(b, p, x, y):
    """(16,) and (16,) -> 32 bfloat16 at p."""
    order = ir.Constant(vector_of(I32, 32), list(range(32)))
    both = b.shuffle_vector(_narrowed(b, x), _narrowed(b, y), order)
    store(b, both, p)


@primitive(
    types.void, address, f32x16, f32x16,
    twin=lambda p, x, y: write_memory(p, round_bfloat(np.stack([x, y], 1).ravel())),
)  # fmt: skip
def store_bf16_pairs(b, p, x, y):
    """(16,) and (16,) -> 16 pairs of bfloat16 at p, one of x and one of y."""
    order = ir.Constant(vector_of(I32, 32), [i // 2 + LANES * (i & 1) for i in range(32)])
    both = b.shuffle_vector(_narrowed(b, x), _narrowed(b, y), order)
    store(b, both, p)


def _blocks(a, rows, blocks):
    """Rows of A as float32, (rows, 32 blocks)."""
    parts = [read_memory(a + BLOCK_BYTES * i, np.uint16, 32 * rows) for i in range(blocks)]
    return np.hstack([widen_bfloat(part).reshape(rows, 32) for part in parts])


def _twin(rows):
    def tile(a, right, out, k):
        left = _blocks(a, rows, k // 32)
        pairs = widen_bfloat(read_memory(right, np.uint16, k * COLUMNS)).reshape(-1, COLUMNS, 2)
        columns = pairs.transpose(0, 2, 1).reshape(k, COLUMNS)
        sums = read_memory(out, np.float32, rows * COLUMNS).reshape(rows, COLUMNS)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
            write_memory(out, np.float32(sums + left @ columns))

    return tile


def _at(b, base, offset):
    return b.add(base, ir.Constant(I64, offset))


def _pair_products(b, total, x, y):
    """total (16,) plus, in each lane, the products of two bfloat16 of x with two of y, which are
    (16,) int32."""
    if NATIVE:
        pairs = [b.bitcast(v, PAIRS) for v in (x, y)]
        return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", VF32, [total, *pairs])
    low = [b.bitcast(b.shl(v, constant(16, VI32)), VF32) for v in (x, y)]
    high = [b.bitcast(b.and_(v, constant(-65536, VI32)), VF32) for v in (x, y)]
    total = call(b, "llvm.fmuladd.v16f32", VF32, [*low, total])
    return call(b, "llvm.fmuladd.v16f32", VF32, [*high, total])


@primitive(types.void, address, address, address, types.int64, twin=_twin(8))
def tile8(b, a, right, out, k):
    """8 rows of a panel, K a multiple of 32."""
    sums = {(i, j): cgutils.alloca_once(b, VF32) for i in range(8) for j in range(2)}
    for (i, j), total in sums.items():
        b.store(load(b, _at(b, out, 128 * i + 64 * j), VF32), total)
    with cgutils.for_range(b, b.lshr(k, ir.Constant(I64, 5)), intp=I64) as loop:
        left = b.add(a, b.mul(loop.index, ir.Constant(I64, BLOCK_BYTES)))
        columns = b.add(right, b.mul(loop.index, ir.Constant(I64, 16 * 128)))
        for pair in range(16):
            y = [load(b, _at(b, columns, 128 * pair + 64 * j), VI32) for j in range(2)]
            for i in range(8):
                x = broadcast(b, load(b, _at(b, left, 64 * i + 4 * pair), I32), VI32)
                for j in range(2):
                    b.store(_pair_products(b, b.load(sums[i, j]), x, y[j]), sums[i, j])
    for (i, j), total in sums.items():
        store(b, b.load(total), _at(b, out, 128 * i + 64 * j))


def _tiles(panels):
    """AMX: `panels` panels of A, `apart` bytes from one to the next, times two tiles of columns.

    Tiles: C at 2 panel + j, A at 4, B at 6 and 7.
    """

    def tile(n):
        return ir.Constant(I8, n)

    def each(b, name, number, where, stride):
        arguments = [tile(number), pointer(b, where, I8), ir.Constant(I64, stride)]
        call(b, f"llvm.x86.{name}", VOID, arguments)

    def generate(b, a, apart, right, out, k):
        def results(name):
            for i in range(panels):
                for j in range(2):
                    each(b, name, 2 * i + j, _at(b, out, 128 * PANEL * i + 64 * j), 128)

        results("tileloadd64")
        with cgutils.for_range(b, b.lshr(k, ir.Constant(I64, 5)), intp=I64) as loop:
            left = b.add(a, b.mul(loop.index, ir.Constant(I64, BLOCK_BYTES)))
            columns = b.add(right, b.mul(loop.index, ir.Constant(I64, 16 * 128)))
            for j in range(2):
                each(b, "tileloadd64", 6 + j, _at(b, columns, 64 * j), 128)
            for i in range(panels):
                each(b, "tileloadd64", 4 + i, b.add(left, b.mul(apart, ir.Constant(I64, i))), 64)
                for j in range(2):
                    call(b, "llvm.x86.tdpbf16ps", VOID, [tile(2 * i + j), tile(4 + i), tile(6 + j)])
        results("tilestored64")

    generate.__name__ = f"tiles_{panels}"
    five = (address, types.int64, address, address, types.int64)

    def twin(a, apart, right, out, k):
        for i in range(panels):
            _twin(PANEL)(a + apart * i, right, out + 128 * PANEL * i, k)

    return primitive(types.void, *five, twin=twin)(generate)


tiles_one, tiles_two = _tiles(1), _tiles(2)


@primitive(types.void, twin=lambda: None)
def tiles_begin(b):
    """Give this thread eight tiles of 16 rows of 64 bytes; nothing where there are none."""
    if AMX:
        palette = [1, 0] + 14 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [PANEL] + 8 * [0]
        kind = vector_of(I8, 64)
        config = cgutils.alloca_once_value(b, ir.Constant(kind, palette))
        call(b, "llvm.x86.ldtilecfg", VOID, [b.bitcast(config, I8.as_pointer())])


@primitive(types.void, twin=lambda: None)
def tiles_end(b):
    if AMX:
        call(b, "llvm.x86.tilerelease", VOID, [])
