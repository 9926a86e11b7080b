"""Products of few rows with a matrix on a GPU: what generating tokens spends its time on.

Dims: M rows of x, N columns of the result, K inner, B elements along K that share a scale. The
matrix is stored as N rows of K, its scales as N rows of K / B; rows begin at multiples of 16 bytes,
and K is a multiple of 32: what is shorter is filled up with zeros.

The matrix is read once, from memory, so its loads decide: 16 bytes a lane, several under way before
the first is used. A warp computes one column for all M rows.
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    bits_of_f32, cuda, float32, halves, int32, int64, load_128, load_f16, nibbles, signed_bytes,
    store_f32, stream_128, warp_sum,
)  # fmt: skip

WARPS = 4  # of a block, which is (32, WARPS) threads
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
def no_scale(scales, i):
    """Of weights that have none."""
    return float32(1)


@device
def block_scale(scales, i):
    """The float16 scale of the block that element i of a row is in."""
    return load_f16(scales + 2 * (i // BLOCK))


def make_gemv(encoding, dot, scale_of, per, bits, rows):
    """The kernel for `rows` (M) rows and matrices of `bits` a weight, `per` weights a load."""
    step, unrolled = 32 * per, 4 if rows < 4 and per < 32 else 2
    resident = {1: 7, 2: 4, 4: 3, 8: 2}[rows]

    @cuda_kernel("aaaail", name=f"gemv_{encoding}_{rows}", threads=32 * WARPS, resident=resident)
    def gemv(x, w, scales, y, n, k):
        """x (M, K) float32, w (N, K), scales (N, K / B) float16 -> y (M, N) float32."""
        column = int32(cuda.blockIdx.x) * WARPS + int32(cuda.threadIdx.y)
        if column < n:
            total = cuda.local.array(rows, float32)
            for m in range(rows):
                total[m] = float32(0)
            row = w + int64(column) * k * bits // 8
            scale_row = scales + 2 * (int64(column) * k // BLOCK)
            i = int64(cuda.threadIdx.x) * per
            while i + (unrolled - 1) * step < k:
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


ROWS = (1, 2, 4, 8)
GEMV = {
    (encoding, rows): make_gemv(encoding, *how, rows)
    for encoding, how in {
        "f16": (dot_f16, no_scale, 8, 16),
        "i8": (dot_i8, block_scale, 16, 8),
        "i4": (dot_i4, block_scale, 32, 4),
    }.items()
    for rows in ROWS
}
"""(encoding, M) -> the kernel."""
