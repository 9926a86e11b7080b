"""Products of few rows with a matrix on a GPU: what generating tokens spends its time on.

Dims: M rows of x, N columns of the result, K inner, B elements along K that share a scale. The
matrix is stored as N rows of K, its scales as N rows of K / B; rows begin at multiples of 16 bytes,
and K is a multiple of 32: what is shorter is filled up with zeros.

A weight is d q, or d q plus an offset, which is the same for a block: then the block's scale has a
second float16 behind it, either the offset itself ("m": of unsigned q) or the whole number z of an
offset d z ("z": of signed q).

The matrix is read once, from memory, so its loads decide: 16 bytes a lane, several under way before
the first is used. A warp computes one column for all M rows. Up to JOINED matrices that x is
multiplied with are one launch.
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    bits_of_f32, cuda, float32, halves, int32, int64, load_128, load_f16, load_u32, nibbles,
    signed_bytes, store_f32, stream_128, warp_sum,
)  # fmt: skip

WARPS = 4  # of a block, which is (32, WARPS) threads
JOINED = 3  # matrices of a launch: q, k and v
BLOCK = 32  # B of the integers: 16 of int8, or 32 of int4, come with one load


@device
def four(x):
    """(4,) float32 at an address that is a multiple of 16."""
    words = load_128(x)
    return (
        bits_of_f32(words[0]),
        bits_of_f32(words[1]),
        bits_of_f32(words[2]),
        bits_of_f32(words[3]),
    )


@device
def dot_f16(words, x, scale):
    """8 float16 in four words times (8,) float32 at x."""
    total = float32(0)
    for half in range(2):
        u = four(x + 16 * half)
        for i in range(2):
            low, high = halves(words[2 * half + i])
            total += low * u[2 * i]
            total += high * u[2 * i + 1]
    return total


@device
def dot_i8(words, x, scale):
    """16 int8 in four words times (16,) float32 at x, times their scale."""
    total = float32(0)
    for i in range(4):
        w, u = signed_bytes(words[i]), four(x + 16 * i)
        total += w[0] * u[0]
        total += w[1] * u[1]
        total += w[2] * u[2]
        total += w[3] * u[3]
    return total * scale


@device
def dot_i4(words, x, scale):
    """32 int4, stored as 8 more, in four words, times (32,) float32 at x, times their scale."""
    total = float32(0)
    for i in range(4):
        w, u, v = nibbles(words[i]), four(x + 32 * i), four(x + 32 * i + 16)
        total += w[0] * u[0]
        total += w[1] * u[1]
        total += w[2] * u[2]
        total += w[3] * u[3]
        total += w[4] * v[0]
        total += w[5] * v[1]
        total += w[6] * v[2]
        total += w[7] * v[3]
    return total * scale


@device
def sum_of(x, count):
    """The sum of (4 count,) float32 at x."""
    total = float32(0)
    for i in range(count):
        u = four(x + 16 * i)
        total += u[0] + u[1] + (u[2] + u[3])
    return total


@device
def dot_i8_offset(words, x, scale):
    """As dot_i8, where a scale is a pair: also an offset, times the sum of x."""
    return dot_i8(words, x, scale[0]) + scale[1] * sum_of(x, 4)


@device
def dot_i4_offset(words, x, scale):
    """As dot_i4, where a scale is a pair: also an offset, times the sum of x."""
    return dot_i4(words, x, scale[0]) + scale[1] * sum_of(x, 8)


@device
def no_scale(scales, i):
    """Of weights that have none."""
    return float32(1)


@device
def block_scale(scales, i):
    """The float16 scale of the block that element i of a row is in."""
    return load_f16(scales + 2 * (i // BLOCK))


@device
def scale_with_minimum(scales, i):
    """A block's scale, and its offset where q are unsigned ones, less 8."""
    pair = halves(load_u32(scales + 4 * (i // BLOCK)))
    return pair[0], pair[1] + float32(8) * pair[0]


@device
def scale_with_zero(scales, i):
    """A block's scale, and its offset as a multiple of it."""
    pair = halves(load_u32(scales + 4 * (i // BLOCK)))
    return pair[0], pair[0] * pair[1]


def make_gemv(encoding, dot, scale_of, per, bits, scale_bytes, rows):
    """The kernel for `rows` (M) rows and matrices of `bits` a weight, `per` weights a load."""
    step, unrolled = 32 * per, 4 if rows < 4 and per < 32 else 2 if rows < 8 else 1
    resident = {1: 7, 2: 4, 4: 3, 8: 2}[rows]

    @cuda_kernel(
        "al" + JOINED * "aaai", name=f"gemv_{encoding}_{rows}", threads=32 * WARPS,
        resident=resident,
    )  # fmt: skip
    def gemv(x, k, w, scales, y, n, w1, scales1, y1, n1, w2, scales2, y2, n2):
        """x (M, K) float32, w (N, K), scales (N, K / B) of one float16 or two -> y (M, N) float32;
        the same for a second and a third matrix, which may have no rows."""
        column = int32(cuda.blockIdx.x) * WARPS + int32(cuda.threadIdx.y)
        if column >= n:
            column -= n
            w, scales, y, n = w1, scales1, y1, n1
            if column >= n:
                column -= n
                w, scales, y, n = w2, scales2, y2, n2
        if column < n:
            total = cuda.local.array(rows, float32)
            for m in range(rows):
                total[m] = float32(0)
            row = w + int64(column) * k * bits // 8
            scale_row = scales + scale_bytes * (int64(column) * k // BLOCK)
            i = int64(cuda.threadIdx.x) * per
            while unrolled > 1 and i + (unrolled - 1) * step < k:
                at = row + i * bits // 8
                w0, w1 = stream_128(at), stream_128(at + 512)
                if unrolled == 4:
                    w2, w3 = stream_128(at + 1024), stream_128(at + 1536)
                for m in range(rows):
                    u = x + 4 * (m * k + i)
                    part = dot(w0, u, scale_of(scale_row, i))
                    part += dot(w1, u + 4 * step, scale_of(scale_row, i + step))
                    if unrolled == 4:
                        part += dot(w2, u + 8 * step, scale_of(scale_row, i + 2 * step))
                        part += dot(w3, u + 12 * step, scale_of(scale_row, i + 3 * step))
                    total[m] += part
                i += unrolled * step
            while i < k:
                words = stream_128(row + i * bits // 8)
                for m in range(rows):
                    total[m] += dot(words, x + 4 * (m * k + i), scale_of(scale_row, i))
                i += step
            for m in range(rows):
                summed = warp_sum(total[m])
                if cuda.threadIdx.x == 0:
                    store_f32(y + 4 * (int64(m) * n + column), summed)

    return gemv


def gemv_launch(encoding, rows, x, k, matrices):
    """The launch for x (M, K) and up to JOINED matrices, each (w, scales, y, N)."""
    given = [*matrices, *[(0, 0, 0, 0)] * (JOINED - len(matrices))]
    blocks = -(-sum(n for *_, n in matrices) // WARPS)
    arguments = (x, k, *(number for matrix in given for number in matrix))
    return GEMV[encoding, rows], (blocks,), (32, WARPS), arguments


ROWS = (1, 2, 4, 8)
ENCODINGS = {
    "f16": (dot_f16, no_scale, 8, 16, 0),
    "i8": (dot_i8, block_scale, 16, 8, 2),
    "i4": (dot_i4, block_scale, 32, 4, 2),
    "i8z": (dot_i8_offset, scale_with_zero, 16, 8, 4),
    "i4z": (dot_i4_offset, scale_with_zero, 32, 4, 4),
    "i4m": (dot_i4_offset, scale_with_minimum, 32, 4, 4),
}
"""Encoding -> products, scales, weights a load, bits a weight, bytes of a block's scale."""
GEMV = {
    (encoding, rows): make_gemv(encoding, *how, rows)
    for encoding, how in ENCODINGS.items()
    for rows in ROWS
}
"""(encoding, M) -> the kernel."""
