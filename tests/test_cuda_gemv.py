"""Products of few rows on a GPU, simulated."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import Array, in_blocks, placed, poisoned

from onnxstream_nb.kernels.cuda_gemv import GEMV, ROWS, WARPS
from onnxstream_nb.kernels.cuda_simulator import simulate


def encoded(w: Array, encoding: str) -> tuple[Array, Array, Array]:
    if encoding == "f16":
        stored = placed(w.astype(np.float16))
        return stored, placed(np.zeros(1, np.float16)), stored.astype(np.float32)
    return in_blocks(w, int(encoding[1:]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("encoding", "k"), [("f16", 1312), ("i8", 2080), ("i4", 4384)])
def test_gemv_equals_the_product(encoding: str, k: int, rows: int) -> None:
    """K in several unrolled steps, single steps and a part of one; N no multiple of a block's."""
    rng, n = np.random.default_rng(rows), 2 * WARPS - 3
    x = placed(rng.standard_normal((rows, k)).astype(np.float32))
    stored, scales, w = encoded(rng.standard_normal((n, k)).astype(np.float32), encoding)
    y = poisoned(rows, n)
    simulate(
        GEMV[encoding, rows], -(-n // WARPS), (32, WARPS),
        [*(a.ctypes.data for a in (x, stored, scales, y)), n, k], [x, stored, scales, y],
    )  # fmt: skip
    wanted = x.astype(np.float64) @ w.T
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("encoding", ["f16", "i8", "i4"])
def test_gemv_of_a_short_row(encoding: str) -> None:
    """Fewer elements than a warp has lanes to load them."""
    rng = np.random.default_rng(5)
    x = placed(rng.standard_normal((1, 32)).astype(np.float32))
    stored, scales, w = encoded(rng.standard_normal((1, 32)).astype(np.float32), encoding)
    y = poisoned(1, 1)
    simulate(
        GEMV[encoding, 1], 1, (32, WARPS),
        [*(a.ctypes.data for a in (x, stored, scales, y)), 1, 32], [x, stored, scales, y],
    )  # fmt: skip
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.T, rtol=1e-5)


def test_int4_holds_its_whole_range() -> None:
    x = placed(np.eye(32, dtype=np.float32)[:8])
    stored, _, _ = in_blocks(np.zeros((2, 32), np.float32), 4)
    q = np.resize(np.arange(-8, 8), (2, 32))
    from cuda_arrays import words_of_nibbles

    stored[:] = words_of_nibbles(q)
    scales, y = placed(np.full((2, 1), 0.5, np.float16)), poisoned(8, 2)
    simulate(
        GEMV["i4", 8], 1, (32, WARPS),
        [*(a.ctypes.data for a in (x, stored, scales, y)), 2, 32], [x, stored, scales, y],
    )  # fmt: skip
    np.testing.assert_array_equal(y, 0.5 * q[:, :8].T)
