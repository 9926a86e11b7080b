"""Products of few rows on a GPU, simulated."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import Array, in_blocks, placed, poisoned

from onnxstream_nb.kernels.cuda_gemv import ROWS, WARPS, gemv_launch
from onnxstream_nb.kernels.cuda_simulator import simulate
from onnxstream_nb.kernels.cuda_widen import WIDEN


def encoded(w: Array, encoding: str) -> tuple[Array, Array, Array]:
    if encoding == "f16":
        stored = placed(w.astype(np.float16))
        return stored, placed(np.zeros(1, np.float16)), stored.astype(np.float32)
    stored, scales, meant = in_blocks(w, int(encoding[1]))
    if encoding.endswith(("z", "m")):
        return stored, *with_offsets(scales, meant, encoding[2])
    return stored, scales, meant


def with_offsets(scales: Array, meant: Array, kind: str) -> tuple[Array, Array]:
    """Scales -> pairs with offsets, and what weights then are."""
    rng = np.random.default_rng(3)
    second = rng.integers(-9, 9, scales.shape) if kind == "z" else rng.standard_normal(scales.shape)
    pairs = placed(np.stack([scales, second.astype(np.float16)], axis=-1))
    d, given = pairs[..., 0].astype(np.float64), pairs[..., 1].astype(np.float64)
    offset = d * given if kind == "z" else given + 8 * d
    return pairs, meant + np.repeat(offset, 32, axis=1)


def addresses(*arrays: Array) -> list[int]:
    return [array.ctypes.data for array in arrays]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("encoding", "k"),
    [("f16", 1312), ("i8", 2080), ("i4", 4384), ("i8z", 2080), ("i4z", 2208), ("i4m", 2208)],
)
def test_gemv_equals_the_product(encoding: str, k: int, rows: int) -> None:
    """K in several unrolled steps, single steps and a part of one; N no multiple of a block's."""
    rng, n = np.random.default_rng(rows), 2 * WARPS - 3
    x = placed(rng.standard_normal((rows, k)).astype(np.float32))
    stored, scales, w = encoded(rng.standard_normal((n, k)).astype(np.float32), encoding)
    y = poisoned(rows, n)
    simulate(
        *gemv_launch(encoding, rows, x.ctypes.data, k, [(*addresses(stored, scales, y), n)]),
        [x, stored, scales, y],
    )  # fmt: skip
    wanted = x.astype(np.float64) @ w.T
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("encoding", ["f16", "i8", "i4", "i8z", "i4z", "i4m"])
def test_gemv_of_a_short_row(encoding: str) -> None:
    """Fewer elements than a warp has lanes to load them."""
    rng = np.random.default_rng(5)
    x = placed(rng.standard_normal((1, 32)).astype(np.float32))
    stored, scales, w = encoded(rng.standard_normal((1, 32)).astype(np.float32), encoding)
    y = poisoned(1, 1)
    simulate(
        *gemv_launch(encoding, 1, x.ctypes.data, 32, [(*addresses(stored, scales, y), 1)]),
        [x, stored, scales, y],
    )  # fmt: skip
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 2), (4, 4, 4)])
def test_matrices_of_one_input_are_one_launch(sizes: tuple[int, ...], rows: int) -> None:
    rng, k = np.random.default_rng(len(sizes)), 96
    x = placed(rng.standard_normal((rows, k)).astype(np.float32))
    made = [encoded(rng.standard_normal((n, k)).astype(np.float32), "i8") for n in sizes]
    results = [poisoned(rows, n) for n in sizes]
    parts = [
        (*addresses(stored, scales, y), len(stored))
        for (stored, scales, _), y in zip(made, results, strict=True)
    ]
    arrays = [x, *results, *(a for stored, scales, _ in made for a in (stored, scales))]
    simulate(*gemv_launch("i8", rows, x.ctypes.data, k, parts), arrays)
    for (_, _, meant), y in zip(made, results, strict=True):
        np.testing.assert_allclose(y, x.astype(np.float64) @ meant.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", WIDEN)
def test_integers_become_halves(encoding: str) -> None:
    """As many loads as do not fill the last block."""
    n, k = 3, 32 * 45
    stored, scales, w = encoded(
        np.random.default_rng(1).standard_normal((n, k)).astype(np.float32), encoding
    )
    kernel, per, _, _ = WIDEN[encoding]
    y, loads = placed(np.full((n, k), np.nan, np.float16)), n * k // per
    simulate(
        kernel, -(-loads // kernel.threads), kernel.threads,
        [*(a.ctypes.data for a in (stored, scales, y)), loads], [stored, scales, y],
    )  # fmt: skip
    np.testing.assert_allclose(y, w, rtol=2**-11, atol=2e-6)


def test_int4_holds_its_whole_range() -> None:
    x = placed(np.eye(32, dtype=np.float32)[:8])
    stored, _, _ = in_blocks(np.zeros((2, 32), np.float32), 4)
    q = np.resize(np.arange(-8, 8), (2, 32))
    from cuda_arrays import words_of_nibbles

    stored[:] = words_of_nibbles(q)
    scales, y = placed(np.full((2, 1), 0.5, np.float16)), poisoned(8, 2)
    simulate(
        *gemv_launch("i4", 8, x.ctypes.data, 32, [(*addresses(stored, scales, y), 2)]),
        [x, stored, scales, y],
    )  # fmt: skip
    np.testing.assert_array_equal(y, 0.5 * q[:, :8].T)
