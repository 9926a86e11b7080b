"""The register tiles of attention: a few rows times 32 columns that are stored as the cache is.

Dims: R rows (fixed when compiled), N = 32 columns, K the common length. B is (K, 32) contiguous, in
float32, float16 or int8; C is (R, 32) float32, its rows `ldc` bytes apart. A is float32, packed
(K, R) where it holds queries, and (R, KEYS) where it holds weights.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .jit import jit
from .simd import (
    FLOAT, I64, VF32, VI8, VI16, VI32, address, broadcast, call, constant, half_to_float, host_has,
    load, primitive, read_memory, store, write_memory,
)  # fmt: skip
from .vector import have_come

KEYS = 128  # keys a block: what softmax and values take at a time
MANY_ROWS = 12 if host_has("avx512f") else 3  # of prompts: as tile.py's
FEW_ROWS = 8 if host_has("avx512f") else 3  # of one token, whose tile decodes what it reads
WIDTH = {"float32": 4, "float16": 2, "int8": 1}
AHEAD = 4096
"""Bytes: what a tile has come from a cache while it computes, into the second of the processor's
caches. Keys and each 32 columns of values are read in turns, a block of KEYS at a time, and the
hardware starts anew with each (Zen 4, 3 queries a head, 7900 keys: 16 GB/s without, 24 with)."""


def _columns(b, encoding, where):
    """16 elements at an address as float."""
    if encoding == "float16":
        return half_to_float(b, load(b, where, VI16))
    if encoding == "int8":
        return b.sitofp(b.sext(load(b, where, VI8), VI32), VF32)
    return load(b, where, VF32)


def _twin(rows, encoding, packed, fresh):
    def tile(a, b, c, ldc, k):
        if packed:
            left = read_memory(a, np.float32, k * rows).reshape(k, rows).T
        else:
            left = np.stack([read_memory(a + 4 * KEYS * i, np.float32, k) for i in range(rows)])
        right = read_memory(b, encoding, k * 32).reshape(k, 32).astype(np.float32)
        with np.errstate(invalid="ignore"):  # infinity times 0, which is a NaN
            products = left @ right
        for i in range(rows):
            before = 0 if fresh else read_memory(c + i * ldc, np.float32, 32)
            write_memory(c + i * ldc, np.float32(before + products[i]))

    return tile


def _define(rows, encoding, packed, fresh):
    """A tile C = A B when `fresh`, else C += A B."""
    step, apart = (4 * rows, 4) if packed else (4, 4 * KEYS)
    width = 16 * WIDTH[encoding]

    @primitive(types.void, address, address, address, types.int64, types.int64,
               twin=_twin(rows, encoding, packed, fresh))  # fmt: skip
    def tile(b, left, right, out, ldc, k):
        def at(base, offset):
            return b.add(base, ir.Constant(I64, offset))

        def result(i, j):
            return at(b.add(out, b.mul(ldc, ir.Constant(I64, i))), 64 * j)

        sums = {}
        for i in range(rows):
            for j in range(2):
                sums[i, j] = cgutils.alloca_once(b, VF32)
                b.store(constant(0.0) if fresh else load(b, result(i, j), VF32), sums[i, j])
        with cgutils.for_range(b, k, intp=I64) as loop:
            row = b.add(right, b.mul(loop.index, ir.Constant(I64, 2 * width)))
            if encoding != "float32":
                have_come(b, at(row, AHEAD))
            columns = [_columns(b, encoding, at(row, width * j)) for j in range(2)]
            column = b.add(left, b.mul(loop.index, ir.Constant(I64, step)))
            for i in range(rows):
                x = broadcast(b, load(b, at(column, apart * i), FLOAT))
                for j in range(2):
                    terms = [x, columns[j], b.load(sums[i, j])]
                    b.store(call(b, "llvm.fmuladd.v16f32", VF32, terms), sums[i, j])
        for (i, j), total in sums.items():
            store(b, b.load(total), result(i, j))

    return tile


score_many = _define(MANY_ROWS, "float32", packed=True, fresh=True)
sum_many = _define(MANY_ROWS, "float32", packed=False, fresh=False)

# No loop here: a name that a kernel refers to must be a module's.
_score_half_1 = _define(1, "float16", packed=True, fresh=True)
_score_half_2 = _define(2, "float16", packed=True, fresh=True)
_score_half_3 = _define(3, "float16", packed=True, fresh=True)
_score_half_4 = _define(4, "float16", packed=True, fresh=True)
_score_half_8 = _define(8, "float16", packed=True, fresh=True)
_score_byte_1 = _define(1, "int8", packed=True, fresh=True)
_score_byte_2 = _define(2, "int8", packed=True, fresh=True)
_score_byte_3 = _define(3, "int8", packed=True, fresh=True)
_score_byte_4 = _define(4, "int8", packed=True, fresh=True)
_score_byte_8 = _define(8, "int8", packed=True, fresh=True)
_sum_half_1 = _define(1, "float16", packed=False, fresh=False)
_sum_half_2 = _define(2, "float16", packed=False, fresh=False)
_sum_half_3 = _define(3, "float16", packed=False, fresh=False)
_sum_half_4 = _define(4, "float16", packed=False, fresh=False)
_sum_half_8 = _define(8, "float16", packed=False, fresh=False)
_sum_byte_1 = _define(1, "int8", packed=False, fresh=False)
_sum_byte_2 = _define(2, "int8", packed=False, fresh=False)
_sum_byte_3 = _define(3, "int8", packed=False, fresh=False)
_sum_byte_4 = _define(4, "int8", packed=False, fresh=False)
_sum_byte_8 = _define(8, "int8", packed=False, fresh=False)


@jit
def few_rows(left):
    """How many of the rows that are left a tile takes: there is one for 8, 4, 3, 2 and 1."""
    if left >= FEW_ROWS:
        return FEW_ROWS
    return min(left, 4)


@jit
def score_half(rows, queries, keys, scores, size):
    """scores (R, 32 of KEYS) = queries (D, R) times keys (D, 32) in float16."""
    if rows == 8:
        _score_half_8(queries, keys, scores, 4 * KEYS, size)
    elif rows == 4:
        _score_half_4(queries, keys, scores, 4 * KEYS, size)
    elif rows == 3:
        _score_half_3(queries, keys, scores, 4 * KEYS, size)
    elif rows == 2:
        _score_half_2(queries, keys, scores, 4 * KEYS, size)
    else:
        _score_half_1(queries, keys, scores, 4 * KEYS, size)


@jit
def score_byte(rows, queries, keys, scores, size):
    """The same with keys in int8, without their scales."""
    if rows == 8:
        _score_byte_8(queries, keys, scores, 4 * KEYS, size)
    elif rows == 4:
        _score_byte_4(queries, keys, scores, 4 * KEYS, size)
    elif rows == 3:
        _score_byte_3(queries, keys, scores, 4 * KEYS, size)
    elif rows == 2:
        _score_byte_2(queries, keys, scores, 4 * KEYS, size)
    else:
        _score_byte_1(queries, keys, scores, 4 * KEYS, size)


@jit
def sum_half(rows, weights, values, result, ldc, count):
    """result (R, 32) += weights (R, count of KEYS) times values (count, 32) in float16."""
    if rows == 8:
        _sum_half_8(weights, values, result, ldc, count)
    elif rows == 4:
        _sum_half_4(weights, values, result, ldc, count)
    elif rows == 3:
        _sum_half_3(weights, values, result, ldc, count)
    elif rows == 2:
        _sum_half_2(weights, values, result, ldc, count)
    else:
        _sum_half_1(weights, values, result, ldc, count)


@jit
def sum_byte(rows, weights, values, result, ldc, count):
    """The same with values in int8, without their scales."""
    if rows == 8:
        _sum_byte_8(weights, values, result, ldc, count)
    elif rows == 4:
        _sum_byte_4(weights, values, result, ldc, count)
    elif rows == 3:
        _sum_byte_3(weights, values, result, ldc, count)
    elif rows == 2:
        _sum_byte_2(weights, values, result, ldc, count)
    else:
        _sum_byte_1(weights, values, result, ldc, count)
