"""The register tile under every matrix product: C += A B on a few rows of 32 columns.

Dims: M tile rows (fixed when compiled), N = 32 columns, K the common length.
A is packed (K, M) float32; B is (K, 32) float32 with a row stride of `ldb` bytes; C is (M, 32)
float32 with a row stride of `ldc` bytes.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .simd import (
    FLOAT, I64, VF32, address, broadcast, call, host_has, load, primitive, read_memory, store,
    write_memory,
)  # fmt: skip

TILE_COLUMNS = 32
# 2 vectors a row: as many rows as accumulators fit beside two vectors of B and one of A.
TILE_ROWS = 12 if host_has("avx512f") else 3


def _twin(rows):
    def tile(a, b, ldb, c, ldc, k):
        left = read_memory(a, np.float32, k * rows).reshape(k, rows)
        right = np.stack([read_memory(b + i * ldb, np.float32, 32) for i in range(k)])
        for i in range(rows):
            row = read_memory(c + i * ldc, np.float32, 32)
            write_memory(c + i * ldc, np.float32(row + left[:, i] @ right))

    return tile


def _define(rows):
    @primitive(types.void, address, address, types.int64, address, types.int64, types.int64,
               twin=_twin(rows))  # fmt: skip
    def tile(b, left, right, ldb, out, ldc, k):
        def at(base, stride, count, offset=0):
            where = b.add(base, b.mul(stride, ir.Constant(I64, count)))
            return b.add(where, ir.Constant(I64, offset))

        sums = {}
        for i in range(rows):
            for j in range(2):
                sums[i, j] = cgutils.alloca_once(b, VF32)
                b.store(load(b, at(out, ldc, i, 64 * j), VF32), sums[i, j])
        with cgutils.for_range(b, k, intp=I64) as loop:
            row = b.add(right, b.mul(ldb, loop.index))
            columns = [load(b, b.add(row, ir.Constant(I64, 64 * j)), VF32) for j in range(2)]
            step = b.add(left, b.mul(loop.index, ir.Constant(I64, 4 * rows)))
            for i in range(rows):
                x = broadcast(b, load(b, b.add(step, ir.Constant(I64, 4 * i)), FLOAT))
                for j in range(2):
                    terms = [x, columns[j], b.load(sums[i, j])]
                    b.store(call(b, "llvm.fmuladd.v16f32", VF32, terms), sums[i, j])
        for (i, j), total in sums.items():
            store(b, b.load(total), at(out, ldc, i, 64 * j))

    return tile


tile_many = _define(TILE_ROWS)
