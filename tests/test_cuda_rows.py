"""Norms, softmax, rotation, tables and appending on a GPU, simulated, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array, in_blocks, placed, poisoned

from onnxstream_nb.kernels import cuda_norm, cuda_rope
from onnxstream_nb.kernels.cuda_simulator import ORDERS, simulate


def random(*shape: int) -> Array:
    rng = np.random.default_rng(sum(shape))
    return placed(rng.standard_normal(shape).astype(np.float32))


def launch(
    kernel: Any, grid: Any, arrays: list[Array], numbers: list[Any], order: str = "forwards"
) -> None:
    arguments = [*(a.ctypes.data for a in arrays), *numbers]
    simulate(kernel, grid, kernel.threads, arguments, arrays, order=order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 255, 577])
def test_rms_norm(columns: int, order: str) -> None:
    x, weight, y = random(3, columns), random(columns), poisoned(3, columns)
    launch(cuda_norm.rms_norm, 3, [x, weight, y], [columns, 1e-5], order)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-7)


def test_rms_norm_of_a_sum() -> None:
    x, more, weight = random(2, 300), random(2, 300)[::-1].copy(), random(300)
    more, total, y = placed(more), poisoned(2, 300), poisoned(2, 300)
    launch(cuda_norm.add_rms_norm, 2, [x, more, weight, total, y], [300, 1e-6])
    np.testing.assert_array_equal(total, x + more)
    wide = (x + more).astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(y, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [1, 31, 333])
def test_layer_norm(columns: int, with_bias: bool, order: str) -> None:
    """Of one column nothing but the bias is left; a row that is not finite is none of the others'
    business."""
    x, weight, bias = random(4, columns), random(columns), random(columns)
    y, kernel = poisoned(4, columns), cuda_norm.layer_norm
    x[2] = 7
    addresses = [a.ctypes.data for a in (x, weight, bias, y)]
    addresses[2] *= with_bias
    x[1] = -np.inf
    simulate(
        kernel, 4, kernel.threads, [*addresses, columns, 1e-5], [x, weight, bias, y], order=order
    )
    assert np.isnan(y[1]).all()
    wide = np.delete(x, 1, axis=0).astype(np.float64)
    centred = wide - wide.mean(axis=1, keepdims=True)
    wanted = centred / np.sqrt(wide.var(axis=1, keepdims=True) + 1e-5) * weight + bias * with_bias
    np.testing.assert_allclose(np.delete(y, 1, axis=0), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 31, 259])
def test_softmax(columns: int, order: str) -> None:
    """Also of large numbers, and of rows that begin with, end with, or are -infinity."""
    x, y = random(6, columns), poisoned(6, columns)
    x[1] += 1e4
    x[2] -= 1e4
    x[3] = -np.inf
    x[4, 0] = x[5, columns // 2 :] = -np.inf
    launch(cuda_norm.softmax_rows, 6, [x, y], [columns], order)
    with np.errstate(invalid="ignore"):
        e = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        wanted = np.nan_to_num(e / e.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [4, 10])
def test_rotation(rotated: int, interleaved: int) -> None:
    t, h, d, half = 3, 5, 10, rotated // 2
    x, y = random(t, h, d), poisoned(t, h, d)
    angles = np.random.default_rng(1).uniform(0, 7, (t, half))
    cos, sin = placed(np.cos(angles).astype(np.float32)), placed(np.sin(angles).astype(np.float32))
    numbers = [t, h, d, rotated, interleaved]
    launch(cuda_rope.rotate, 2, [x, y, cos, sin], numbers)
    pairs = np.arange(rotated).reshape((half, 2) if interleaved else (2, half))
    first, second = pairs.T if interleaved else pairs
    wanted = x.astype(np.float64).copy()
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    wanted[..., first] = x[..., first] * c - x[..., second] * s
    wanted[..., second] = x[..., first] * s + x[..., second] * c
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [0, 8])
@pytest.mark.parametrize("past", [2, 6])
def test_rotating_and_appending_to_a_cache(past: int, rotated: int, interleaved: int) -> None:
    """What would lie behind the cache's end is not written."""
    t, h, kv, d, positions = 3, 4, 2, 12, 7
    q, k, v, place = random(t, h, d), random(t, kv, d), random(t, kv, d), placed(np.array([past]))
    v *= 2
    angles = np.random.default_rng(1).uniform(0, 7, (t, rotated // 2))
    cos, sin = placed(np.cos(angles).astype(np.float32)), placed(np.sin(angles).astype(np.float32))
    turned = []
    for x in (q, k):
        turned.append(poisoned(*x.shape))
        numbers = [t, x.shape[1], d, rotated, interleaved]
        launch(cuda_rope.rotate, 1, [x, turned[-1], cos, sin], numbers)
    y = poisoned(t, h, d)
    keys, values = (placed(np.full((kv, positions, d), np.nan, np.float16)) for _ in range(2))
    launch(
        cuda_rope.rotate_append, 1, [q, k, v, cos, sin, y, keys, values, place],
        [t, h, kv, d, rotated, interleaved, positions],
    )  # fmt: skip
    np.testing.assert_array_equal(y, turned[0])
    fits = min(t, positions - past)
    for new, cache in zip((turned[1], v), (keys, values), strict=True):
        wanted = np.full((kv, positions, d), np.nan, np.float16)
        wanted[:, past : past + fits] = new.transpose(1, 0, 2)[:, :fits]
        np.testing.assert_array_equal(cache, wanted)


@pytest.mark.parametrize("encoding", ["f32", "f16", "i8", "i4"])
def test_rows_of_a_table(encoding: str) -> None:
    v, k = 9, 320
    table, ids, y = random(v, k), placed(np.array([3, 0, 8, -1, 3])), poisoned(5, k)
    if encoding in ("i8", "i4"):
        stored, scales, table = in_blocks(table, int(encoding[1:]))
        arrays = [stored, scales]
    else:
        stored = placed(table.astype({"f32": np.float32, "f16": np.float16}[encoding]))
        table, arrays = stored.astype(np.float32), [stored]
    kernel = getattr(cuda_rope, f"rows_{encoding}")
    launch(kernel, (2, 5), [*arrays, ids, y], [v, k])
    np.testing.assert_array_equal(y, table[ids])
