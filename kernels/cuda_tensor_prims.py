"""Primitives of kernels that multiply by tensor cores: copies to shared memory that go on by
themselves, small matrices there, and their products.

Dims: as in cuda_prims.py; a warp works on each matrix together. In the simulator a copy lands as
late, or as soon, as the hardware may let it. Source: PTX ISA 9.0 (mma.sync, ldmatrix, cp.async).
"""

from functools import cache

import numpy as np

from . import cuda_simulator as simulator
from .cuda_primitive import assembly, primitive
from .cuda_prims import SHARED

# -- asynchronous copies ---------------------------------------------------------------------------


@primitive("void", "i32", "i64", "i32", twin=simulator.copy_later)
def copy_async(ir, builder, to, source, nbytes):
    """Begin to write 16 bytes of shared memory, at a multiple of 16: the first `nbytes` from global
    memory, at a multiple of 16 too, and zeros (sm_80)."""
    text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
    return assembly(ir, builder, text, [], [to, source, nbytes], effect=True, memory=True)


@primitive("void", twin=simulator.commit)
def commit_copies(ir, builder):
    """What was begun since the last time is one group."""
    return assembly(ir, builder, "cp.async.commit_group;", [], [], effect=True, memory=True)


def _waiter(left):
    def generate(ir, builder):
        text = f"cp.async.wait_group {left};"
        return assembly(ir, builder, text, [], [], effect=True, memory=True)

    return primitive("void", twin=lambda: simulator.wait(left))(generate)


wait_all_copies, wait_but_one, wait_but_two = _waiter(0), _waiter(1), _waiter(2)


# -- tensor cores ----------------------------------------------------------------------------------


def _matrices_twin(address):
    addresses, lane = simulator.exchange(address)
    memory, words = simulator.memory(SHARED), []
    for matrix in range(4):
        row = memory.vector(addresses[8 * matrix + lane // 4], 4, np.uint32)
        words.append(int(row[lane % 4]))
    return tuple(words)


@primitive("u32x4", "i32", twin=_matrices_twin)
def load_matrices(ir, builder, address):
    """Four 8 x 8 matrices of halves in shared memory: lane l names row l % 8 of matrix l // 8, and
    gets of each the pair 2 (l % 4) of row l // 4 (ldmatrix.x4)."""
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True, memory=True)


def _turned_twin(address):
    addresses, lane = simulator.exchange(address)
    memory, words = simulator.memory(SHARED), []
    for matrix in range(4):
        rows = [
            memory.vector(addresses[8 * matrix + 2 * (lane % 4) + i], 8, np.uint16)
            for i in range(2)
        ]
        words.append(int(rows[0][lane // 4]) | int(rows[1][lane // 4]) << 16)
    return tuple(words)


@primitive("u32x4", "i32", twin=_turned_twin)
def load_turned_matrices(ir, builder, address):
    """The same of the matrices' transposes."""
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True, memory=True)


@cache
def _places(depth):
    """Where the elements of A (16, depth) and B (depth, 8) are among a warp's, which are
    (32, words, 2): of each word its two halves."""
    a_words, b_words = depth // 4, depth // 8
    numbers = np.arange(32 * (a_words + b_words) * 2).reshape(32, -1, 2)
    a, b = np.zeros((16, depth), int), np.zeros((depth, 8), int)
    for each in range(32):
        row, pair = each // 4, 2 * (each % 4)
        for i in range(a_words):
            column = pair + 8 * (i // 2)
            a[row + 8 * (i % 2), column : column + 2] = numbers[each, i]
        for i in range(b_words):
            b[pair + 8 * i : pair + 8 * i + 2, row] = numbers[each, a_words + i]
    return a, b


def _multiply(words, sums, depth):
    """A lane's two rows of A times its two columns of B."""
    everything, lane = simulator.exchange(words)
    halves = np.array(everything, np.uint32).view(np.float16).ravel().astype(np.float32)
    (a, b), row, column = _places(depth), lane // 4, 2 * (lane % 4)
    product = halves[a[row::8]] @ halves[b[:, column : column + 2]]
    return tuple(np.float32(c + d) for c, d in zip(sums, product.reshape(4), strict=True))


@primitive(
    "f32x4", *["u32"] * 6, *["f32"] * 4,
    twin=lambda *values: _multiply(values[:6], values[6:], 16),
)  # fmt: skip
def multiply_16(ir, builder, *values):
    """(16, 16) float16 times (16, 8) float16 plus (16, 8) float32, of a warp (sm_80)."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return assembly(ir, builder, text, [ir.FloatType()] * 4, values, effect=True)


@primitive(
    "f32x4", *["u32"] * 3, *["f32"] * 4,
    twin=lambda *values: _multiply(values[:3], values[3:], 8),
)  # fmt: skip
def multiply_8(ir, builder, *values):
    """(16, 8) float16 times (8, 8) float16 plus (16, 8) float32, of a warp (sm_75)."""
    text = (
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};"
    )
    return assembly(ir, builder, text, [ir.FloatType()] * 4, values, effect=True)
