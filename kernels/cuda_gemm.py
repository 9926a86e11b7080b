"""Products of many rows with a matrix on a GPU, by its tensor cores.

Dims: M rows of x, N columns of the result, K inner. A block computes a tile of (BM, BN) of the
result, in steps of BK along K, with WM x WN warps; a warp computes (BM / WM, BN / WN) of it in
products of (16, 16) by (16, 8).

float16 times float16 is summed in float32. Tiles of both factors come into shared memory by
asynchronous copies, STAGES - 1 steps ahead; rows there are 16 bytes longer than they need to be, so
that the eight rows of a small matrix lie in different banks. K is a multiple of 8, rows begin at
multiples of 16 bytes; M and N are any: what is outside is read as zeros and not written.
Source of the layouts: PTX ISA, "Matrix fragments for mma.m16n8k16".
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    cuda, float32, int32, int64, load_128, shared_memory, store_f32, store_shared_128, uint32,
)  # fmt: skip
from .cuda_tensor_prims import (
    commit_copies, copy_async, load_matrices, multiply_8, multiply_16, wait_all_copies,
    wait_but_one,
)  # fmt: skip


@device
def copy_now(to, source, nbytes):
    """Write 16 bytes of shared memory: from global memory, or zeros."""
    if nbytes > 0:
        words = load_128(source)
        store_shared_128(to, words[0], words[1], words[2], words[3])
    else:
        store_shared_128(to, uint32(0), uint32(0), uint32(0), uint32(0))


@device
def nothing():
    """What copies that are done at once have to wait for."""


@device
def multiply_twice(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """The product of (16, 16) by (16, 8) in two halves."""
    d = multiply_8(a0, a1, b0, c0, c1, c2, c3)
    return multiply_8(a2, a3, b1, d[0], d[1], d[2], d[3])


def make_copy_rows(copy):
    """The device function that copies a tile, by asynchronous copies or at once."""

    @device
    def copy_rows(to, source, first, limit, k0, k, rows, chunks, pitch, thread, threads):
        """Begin to copy (rows, 8 chunks) halves from row `first` and column k0 of a matrix of
        `limit` rows of k, to rows `pitch` bytes apart; zeros for what is outside."""
        for i in range(thread, rows * chunks, threads):
            row, column = first + i // chunks, k0 + 8 * (i % chunks)
            inside = row < limit and column < k
            at = source + 2 * (int64(row) * k + column) if inside else source
            copy(to + pitch * (i // chunks) + 16 * (i % chunks), at, 16 if inside else 0)

    return copy_rows


copy_rows = make_copy_rows(copy_async)


@device
def store_pair(y, row, column, m, n, pitch, first, second):
    """Two neighbours of a row of the result, as far as they are inside."""
    if row < m:
        at = y + 4 * (int64(row) * pitch + column)
        if column < n:
            store_f32(at, first)
        if column + 1 < n:
            store_f32(at + 4, second)


def make_gemm(name, bm, bn, bk, wm, wn, stages, since=(8, 0)):
    """The kernel for tiles of these sizes; before sm_80 nothing is asynchronous."""
    newer = since >= (8, 0)
    copy_tile = copy_rows if newer else make_copy_rows(copy_now)
    commit = commit_copies if newer else nothing
    wait = (wait_but_one if stages == 3 else wait_all_copies) if newer else nothing
    multiply = multiply_16 if newer else multiply_twice
    threads, chunks, apart = 32 * wm * wn, bk // 8, 2 * bk + 16
    stage = (bm + bn) * apart
    tall, wide = bm // wm // 16, bn // wn // 16  # products a warp has down, pairs of them across
    sums = 8 * tall * wide

    @cuda_kernel(
        "aaaiiii", name=name, threads=threads, resident=1, shared=stages * stage, since=since
    )
    def gemm(x, w, y, m, n, k, pitch):
        """x (M, K) float16, w (N, K) float16 -> y (M, N) float32, of rows of `pitch`."""
        total = cuda.local.array(sums, float32)
        for i in range(sums):
            total[i] = float32(0)
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread % 32, thread // 32
        row0, column0 = int32(cuda.blockIdx.y) * bm, int32(cuda.blockIdx.x) * bn
        base, steps = shared_memory(), (k + bk - 1) // bk
        for ahead in range(stages - 1):
            at = base + ahead * stage
            copy_tile(at, x, row0, m, ahead * bk, k, bm, chunks, apart, thread, threads)
            at += bm * apart
            copy_tile(at, w, column0, n, ahead * bk, k, bn, chunks, apart, thread, threads)
            commit()
        # Where a lane's rows of small matrices begin: of x 16 rows by 16, of w twice 8 rows by 16.
        x_lane = (warp // wn * (bm // wm) + lane % 16) * apart + 16 * (lane // 16)
        w_row = warp % wn * (bn // wn) + lane % 8 + 8 * (lane // 16)
        w_lane = (bm + w_row) * apart + 16 * (lane // 8 % 2)
        for step in range(steps):
            wait()
            cuda.syncthreads()
            following = step + stages - 1
            at = base + following % stages * stage
            copy_tile(at, x, row0, m, following * bk, k, bm, chunks, apart, thread, threads)
            at += bm * apart
            copy_tile(at, w, column0, n, following * bk, k, bn, chunks, apart, thread, threads)
            commit()
            here = base + step % stages * stage
            for inner in range(bk // 16):
                for i in range(tall):
                    a = load_matrices(here + x_lane + 16 * i * apart + 32 * inner)
                    for j in range(wide):
                        b = load_matrices(here + w_lane + 16 * j * apart + 32 * inner)
                        o = 8 * (i * wide + j)
                        d = multiply(
                            a[0], a[1], a[2], a[3], b[0], b[1],
                            total[o], total[o + 1], total[o + 2], total[o + 3],
                        )  # fmt: skip
                        e = multiply(
                            a[0], a[1], a[2], a[3], b[2], b[3],
                            total[o + 4], total[o + 5], total[o + 6], total[o + 7],
                        )  # fmt: skip
                        total[o], total[o + 1], total[o + 2], total[o + 3] = d[0], d[1], d[2], d[3]
                        o += 4
                        total[o], total[o + 1], total[o + 2], total[o + 3] = e[0], e[1], e[2], e[3]
        row = row0 + warp // wn * (bm // wm) + lane // 4
        column = column0 + warp % wn * (bn // wn) + 2 * (lane % 4)
        for i in range(tall):
            for j in range(2 * wide):
                o, c = 4 * (2 * i * wide + j), column + 8 * j
                store_pair(y, row + 16 * i, c, m, n, pitch, total[o], total[o + 1])
                store_pair(y, row + 16 * i + 8, c, m, n, pitch, total[o + 2], total[o + 3])

    return gemm


GEMM_75 = make_gemm("gemm_f16_75", 128, 64, 32, 4, 2, 2, (7, 5))
GEMM = make_gemm("gemm_f16", 128, 128, 32, 2, 4, 3)
GEMM_SMALL = make_gemm("gemm_f16_small", 64, 64, 32, 2, 2, 3)
