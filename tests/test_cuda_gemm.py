"""Products of many rows by tensor cores, simulated on small tiles; what must not be left out."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_arrays import placed, poisoned

from onnxstream_nb.kernels import cuda_gemm
from onnxstream_nb.kernels.cuda_gemm import make_gemm
from onnxstream_nb.kernels.cuda_kernel import CudaKernel
from onnxstream_nb.kernels.cuda_simulator import ORDERS, simulate

TILES: dict[str, tuple[Any, ...]] = {
    "two_stages": (32, 32, 16, 2, 1, 2),
    "three_stages": (32, 32, 32, 1, 2, 3),
    "one_warp": (16, 16, 16, 1, 1, 3),
    "before_sm80": (32, 16, 16, 2, 1, 2, (7, 5)),
}


@cache
def small(tiles: str) -> CudaKernel:
    made: CudaKernel = make_gemm(f"gemm_{tiles}", *TILES[tiles])
    return made


def product(
    kernel: CudaKernel, tile: tuple[Any, ...], shape: tuple[int, int, int], **how: Any
) -> float:
    """The largest error of x (M, K) times w (N, K), in units of the result's largest."""
    m, n, k = shape
    rng = np.random.default_rng(m)
    x = placed(rng.standard_normal((m, k)).astype(np.float16))
    w = placed(rng.standard_normal((n, k)).astype(np.float16))
    y = poisoned(m, n + 3)
    grid = (-(-n // tile[1]), -(-m // tile[0]))
    arguments = [*(a.ctypes.data for a in (x, w, y)), m, n, k, n + 3]
    simulate(kernel, grid, kernel.threads, arguments, [x, w, y], **how)
    assert np.isnan(y[:, n:]).all()
    wanted = x.astype(np.float64) @ w.astype(np.float64).T
    return float(np.abs(y[:, :n] - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tiles", "shape"),
    [
        ("two_stages", (33, 35, 72)),
        ("three_stages", (9, 33, 40)),
        ("one_warp", (5, 9, 8)),
        ("before_sm80", (33, 21, 40)),
    ],
)
def test_gemm_equals_the_product(
    tiles: str, shape: tuple[int, int, int], order: str, eager: bool
) -> None:
    """Sizes that no tile divides; copies that land at once, or as late as they may."""
    assert product(small(tiles), TILES[tiles], shape, order=order, eager=eager) < 1e-6


LEFT_OUT = {
    "the barrier": ("cuda.syncthreads()", "pass"),
    "the wait": ("            wait()\n", ""),
    "the order of matrices": ("8 * (lane // 16)", "8 * (lane // 8 % 2)"),
    "the guard of rows": ("if row < m:", "if row < m + 1:"),
    "zeros behind K": ("row < limit and column < k", "row < limit"),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_left_out_is_noticed(what: str) -> None:
    """A kernel without it is wrong, or told, in one order or with one kind of copies."""
    source = inspect.getsource(cuda_gemm)
    before, after = LEFT_OUT[what]
    assert before in source
    scope = {**vars(cuda_gemm)}
    start = source.index("@device\ndef copy_now")
    changed = source[start : source.index("GEMM_75 = ")].replace(before, after)
    exec(textwrap.dedent(changed), scope)
    made = scope["make_gemm"](f"without {what}", *TILES["two_stages"])
    tile, shape = TILES["two_stages"], (33, 35, 72)
    problems = 0
    for order in ORDERS:
        for eager in (False, True):
            try:
                problems += not product(made, tile, shape, order=order, eager=eager) < 1e-6
            except IndexError:
                problems += 1
    assert problems


def test_shared_memory_is_what_the_stages_need() -> None:
    kernel = small("two_stages")
    with pytest.raises(IndexError, match="shared"):
        product(replace(kernel, shared=kernel.shared - 32), TILES["two_stages"], (32, 32, 64))
