"""The simulator of CUDA kernels: it computes what kernels say, and tells what a GPU would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.kernels.cuda_kernel import CudaKernel
from onnxstream_nb.kernels.cuda_prims import (
    cuda,
    float32,
    load_f32,
    pack_halves,
    shared_128,
    shared_f32,
    shared_memory,
    shuffle_xor,
    store_f32,
    store_shared_f16,
    store_shared_f32,
    warp_max,
    warp_sum,
)
from onnxstream_nb.kernels.cuda_simulator import ORDERS, simulate
from onnxstream_nb.kernels.cuda_tensor_prims import (
    commit_copies,
    copy_async,
    load_matrices,
    multiply_8,
    multiply_16,
    wait_all_copies,
)

Array = np.ndarray[Any, Any]


def kernel(function: Callable[..., None], arguments: str, threads: int = 128) -> CudaKernel:
    return CudaKernel(function.__name__, function, arguments, threads)


def run(function: Callable[..., None], x: Array, y: Array, threads: int = 32, **how: Any) -> Array:
    made = kernel(function, "aa")
    simulate(made, 1, threads, (x.ctypes.data, y.ctypes.data), [x, y], **how)
    return y


def numbers(count: int) -> Array:
    return np.random.default_rng(count).standard_normal(count).astype(np.float32)


def poison(count: int) -> Array:
    return np.full(count, np.nan, np.float32)


# -- threads, warps, barriers


def reversed_through_shared(x: int, y: int) -> None:
    t, base = cuda.threadIdx.x, shared_memory()
    store_shared_f32(base + 4 * t, load_f32(x + 4 * t))
    cuda.syncthreads()
    store_f32(y + 4 * t, shared_f32(base + 4 * (cuda.blockDim.x - 1 - t)))


def reversed_without_barrier(x: int, y: int) -> None:
    t, base = cuda.threadIdx.x, shared_memory()
    store_shared_f32(base + 4 * t, load_f32(x + 4 * t))
    store_f32(y + 4 * t, shared_f32(base + 4 * (cuda.blockDim.x - 1 - t)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [1, 33, 128])
def test_a_barrier_lets_threads_see_each_other(order: str, threads: int) -> None:
    x = numbers(threads)
    y = run(reversed_through_shared, x, poison(threads), threads, shared=512, order=order)
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_told(order: str) -> None:
    with pytest.raises(IndexError, match="never written"):
        run(reversed_without_barrier, numbers(64), poison(64), 64, shared=256, order=order)


def summed(x: int, y: int) -> None:
    t = cuda.threadIdx.x
    value = load_f32(x + 4 * t)
    store_f32(y + 8 * t, warp_sum(value))
    store_f32(y + 8 * t + 4, warp_max(value))


def test_warps_sum_and_take_the_largest() -> None:
    x = numbers(64)
    y = run(summed, x, poison(128), 64).reshape(64, 2)
    for warp in (0, 32):
        lanes = slice(warp, warp + 32)
        np.testing.assert_allclose(y[lanes, 0], x[lanes].sum(dtype=np.float64), rtol=1e-5)
        np.testing.assert_array_equal(y[lanes, 1], x[lanes].max())


def some_lanes_only(x: int, y: int) -> None:
    t = cuda.threadIdx.x
    if t < 31:
        store_f32(y + 4 * t, shuffle_xor(load_f32(x + 4 * t), 1))


def some_return_first(x: int, y: int) -> None:
    t = cuda.threadIdx.x
    if t > 3:
        cuda.syncthreads()
    store_f32(y + 4 * t, float32(0))


@pytest.mark.parametrize(
    ("function", "message"),
    [(some_lanes_only, "wait for warp; 1 have"), (some_return_first, "wait for block; 4 have")],
)
def test_threads_that_never_meet_are_told(function: Callable[..., None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(function, numbers(32), poison(32))


def test_blocks_and_threads_know_their_places() -> None:
    def places(y: int) -> None:
        number = cuda.blockIdx.x + cuda.gridDim.x * cuda.blockIdx.y
        thread = cuda.threadIdx.x + cuda.blockDim.x * cuda.threadIdx.y
        store_f32(y + 4 * (number * cuda.blockDim.x * cuda.blockDim.y + thread), number + thread)

    y = poison(6 * 8)
    simulate(kernel(places, "a"), (3, 2), (4, 2), (y.ctypes.data,), [y])
    np.testing.assert_array_equal(y, np.add.outer(np.arange(6), np.arange(8)).reshape(-1))


# -- bad accesses


@pytest.mark.parametrize("shift", [-4, 4 * 32, 2])
def test_accesses_outside_of_arrays_and_between_elements_are_told(shift: int) -> None:
    def shifted(x: int, y: int) -> None:
        store_f32(y, load_f32(x))

    x, y = numbers(32), poison(32)
    with pytest.raises(IndexError, match="aligned" if shift == 2 else "outside"):
        simulate(kernel(shifted, "aa"), 1, 1, (x.ctypes.data + shift, y.ctypes.data), [x, y])


def test_a_block_larger_than_it_was_compiled_for_is_refused() -> None:
    with pytest.raises(ValueError, match="compiled for 128"):
        run(summed, numbers(160), poison(320), 160)


# -- asynchronous copies


def copied(x: int, y: int) -> None:
    t, base = cuda.threadIdx.x, shared_memory()
    copy_async(base + 16 * t, x + 16 * t, 16)
    commit_copies()
    wait_all_copies()
    cuda.syncthreads()
    store_f32(y + 4 * t, shared_f32(base + 4 * t))


def copied_without_wait(x: int, y: int) -> None:
    t, base = cuda.threadIdx.x, shared_memory()
    copy_async(base + 16 * t, x + 16 * t, 16)
    commit_copies()
    cuda.syncthreads()
    store_f32(y + 4 * t, shared_f32(base + 4 * t))


@pytest.mark.parametrize("eager", [False, True])
def test_asynchronous_copies(eager: bool) -> None:
    x = numbers(128)
    y = run(copied, x, poison(32), shared=512, eager=eager)
    np.testing.assert_array_equal(y, x[:32])


def test_a_copy_that_is_not_waited_for_is_told() -> None:
    with pytest.raises(IndexError, match="never written"):
        run(copied_without_wait, numbers(128), poison(32), shared=512)


# -- tensor cores


def product_16(x: int, y: int) -> None:
    """x: A (16, 16) and the transpose of B, (8, 16), as float32 -> y (16, 8)."""
    lane, base = cuda.threadIdx.x, shared_memory()
    for i in range(lane, 384, 32):
        store_shared_f16(base + 2 * i, load_f32(x + 4 * i))
    cuda.syncthreads()
    a = load_matrices(base + 2 * (16 * (lane % 16) + 8 * (lane // 16)))
    b = load_matrices(base + 2 * (256 + 16 * (lane % 8) + 8 * (lane // 8 % 2)))
    zero = float32(0)
    d = multiply_16(a[0], a[1], a[2], a[3], b[0], b[1], zero, zero, zero, float32(1))
    row, column = lane // 4, 2 * (lane % 4)
    store_f32(y + 4 * (8 * row + column), d[0])
    store_f32(y + 4 * (8 * row + column + 1), d[1])
    store_f32(y + 4 * (8 * (row + 8) + column), d[2])
    store_f32(y + 4 * (8 * (row + 8) + column + 1), d[3] - float32(1))


def product_8(x: int, y: int) -> None:
    """The first 8 columns of A with the first 8 of B's transpose -> y (16, 8)."""
    lane = cuda.threadIdx.x
    row, pair = lane // 4, 2 * (lane % 4)
    zero = float32(0)
    top, low = x + 4 * (16 * row + pair), x + 4 * (16 * (row + 8) + pair)
    b = x + 4 * (256 + 16 * row + pair)
    d = multiply_8(
        pack_halves(load_f32(top), load_f32(top + 4)),
        pack_halves(load_f32(low), load_f32(low + 4)),
        pack_halves(load_f32(b), load_f32(b + 4)),
        zero, zero, zero, zero,
    )  # fmt: skip
    for i in range(2):
        store_f32(y + 4 * (8 * row + pair + i), d[i])
        store_f32(y + 4 * (8 * (row + 8) + pair + i), d[2 + i])


@pytest.mark.parametrize(("function", "depth"), [(product_16, 16), (product_8, 8)])
def test_a_product_of_tensor_cores(function: Callable[..., None], depth: int) -> None:
    x = numbers(384).astype(np.float16).astype(np.float32)
    y = run(function, x, poison(128), shared=768).reshape(16, 8)
    a, b = x[:256].reshape(16, 16), x[256:].reshape(8, 16)
    np.testing.assert_allclose(y, a[:, :depth] @ b[:, :depth].T, atol=1e-5)


def test_words_of_shared_memory() -> None:
    def word(x: int, y: int) -> None:
        store_shared_f32(shared_memory() + 4 * cuda.threadIdx.x, load_f32(x + 4 * cuda.threadIdx.x))
        cuda.syncthreads()
        store_f32(y + 4 * cuda.threadIdx.x, shared_128(shared_memory())[cuda.threadIdx.x % 4])

    x = np.arange(32, dtype=np.uint32).view(np.float32)
    y = run(word, x, poison(32), shared=128)
    np.testing.assert_array_equal(y, np.tile(np.arange(4, dtype=np.float32), 8))
