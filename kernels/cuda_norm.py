"""Normalization and softmax of rows on a GPU.

Dims: R rows of C columns. A block of THREADS threads has a row, and walks over it.
"""

from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    cuda, exp2, float32, int32, int64, load_f32, rsqrt, shared_f32, shared_memory, store_f32,
    store_shared_f32, warp_max, warp_sum,
)  # fmt: skip

THREADS = 256
WARPS = THREADS // 32
SHARED = 4 * WARPS
LOG2E = 1.4426950408889634


@device
def block_sum(value):
    """The sum of all threads' values, in every thread."""
    base, thread = shared_memory(), int32(cuda.threadIdx.x)
    summed = warp_sum(value)
    cuda.syncthreads()  # whoever still reads what was there before
    if thread % 32 == 0:
        store_shared_f32(base + 4 * (thread // 32), summed)
    cuda.syncthreads()
    total = float32(0)
    for warp in range(WARPS):
        total += shared_f32(base + 4 * warp)
    return total


@device
def block_max(value):
    """The largest of all threads' values, in every thread."""
    base, thread = shared_memory(), int32(cuda.threadIdx.x)
    largest = warp_max(value)
    cuda.syncthreads()
    if thread % 32 == 0:
        store_shared_f32(base + 4 * (thread // 32), largest)
    cuda.syncthreads()
    for warp in range(WARPS):
        largest = max(largest, shared_f32(base + 4 * warp))
    return largest


@cuda_kernel("aaaif", threads=THREADS, shared=SHARED)
def rms_norm(x, weight, y, columns, epsilon):
    """x (R, C), weight (C,) float32 -> y (R, C): x / sqrt(mean of its squares + epsilon), times
    the weight. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019)."""
    row = 4 * int64(cuda.blockIdx.x) * columns
    squares = float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = load_f32(x + row + 4 * i)
        squares += value * value
    scale = rsqrt(block_sum(squares) / float32(columns) + epsilon)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        store_f32(y + row + 4 * i, load_f32(x + row + 4 * i) * scale * load_f32(weight + 4 * i))


@cuda_kernel("aaaaaif", threads=THREADS, shared=SHARED)
def add_rms_norm(x, more, weight, total, y, columns, epsilon):
    """The same of x + more, both (R, C), which becomes `total`."""
    row = 4 * int64(cuda.blockIdx.x) * columns
    squares = float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = load_f32(x + row + 4 * i) + load_f32(more + row + 4 * i)
        store_f32(total + row + 4 * i, value)
        squares += value * value
    scale = rsqrt(block_sum(squares) / float32(columns) + epsilon)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = load_f32(total + row + 4 * i)
        store_f32(y + row + 4 * i, value * scale * load_f32(weight + 4 * i))


@cuda_kernel("aaaaif", threads=THREADS, shared=SHARED)
def layer_norm(x, weight, bias, y, columns, epsilon):
    """x (R, C), weight and bias (C,) float32 -> y (R, C), of mean 0 and variance 1 before weight
    and bias; a bias at address 0 is none."""
    row = 4 * int64(cuda.blockIdx.x) * columns
    total = float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        total += load_f32(x + row + 4 * i)
    mean = block_sum(total) / float32(columns)
    squares = float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = load_f32(x + row + 4 * i) - mean
        squares += value * value
    scale = rsqrt(block_sum(squares) / float32(columns) + epsilon)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = (load_f32(x + row + 4 * i) - mean) * scale * load_f32(weight + 4 * i)
        if bias != 0:
            value += load_f32(bias + 4 * i)
        store_f32(y + row + 4 * i, value)


@cuda_kernel("aai", threads=THREADS, shared=SHARED)
def softmax_rows(x, y, columns):
    """x (R, C) float32 -> y (R, C): e ** x over the row's sum; zeros for a row of -infinity."""
    row = 4 * int64(cuda.blockIdx.x) * columns
    largest = float32(-3e38)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        largest = max(largest, load_f32(x + row + 4 * i))
    largest = block_max(largest)
    total = float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        value = exp2((load_f32(x + row + 4 * i) - largest) * float32(LOG2E))
        store_f32(y + row + 4 * i, value)
        total += value
    total = block_sum(total)
    scale = float32(1) / total if total > float32(0) else float32(0)
    for i in range(int32(cuda.threadIdx.x), columns, THREADS):
        store_f32(y + row + 4 * i, load_f32(y + row + 4 * i) * scale)
