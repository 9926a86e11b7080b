"""Rounding matrices in blocks: against plain Python and onnx's reference, and at ranges' ends."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxstream_nb.convert.quantisation.gptq import factor_of
from onnxstream_nb.convert.quantisation.integer_forms import Grid, Rounded, values
from onnxstream_nb.convert.quantisation.layers import how, nearest
from onnxstream_nb.session import internal

Array = np.ndarray[Any, Any]

GRIDS = [Grid(bits, 32, asymmetric) for bits in (4, 8) for asymmetric in (False, True)]
SHAPES = [(1, 1), (3, 31), (5, 33), (16, 64), (7, 95), (33, 40)]


def matrix(n: int, k: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, n, k)).standard_normal((n, k)).astype(np.float32)


def stored(scale: float, grid: Grid) -> float:
    with np.errstate(over="ignore"):
        kind = np.float16 if grid.scales == "float16" else np.float32
        return float(kind(np.float32(scale))) or 1.0


def oracle(block: list[float], grid: Grid) -> tuple[list[int], float, int]:
    """Integers, scale and zero point that cover a block's range, one number after the other."""
    least, most = min(0.0, *block), max(0.0, *block)
    if least == most:
        return [0] * len(block), 1.0, 0
    first = (most - least) / grid.high if grid.asymmetric else max(-least, most) / grid.high
    zero = round(-least / first) if grid.asymmetric else 0
    scale = stored(first, grid)
    return [min(grid.high, max(grid.low, round(x / scale) + zero)) for x in block], scale, zero


def rounded_plainly(rows: Array, grid: Grid) -> Rounded:
    n, k = rows.shape
    length = grid.length(k)
    found = [
        [oracle([float(x) for x in row[i : i + length]], grid) for i in range(0, k, length)]
        for row in rows
    ]
    integers = [list(itertools.chain(*(block[0] for block in row))) for row in found]
    scales = [[block[1] for block in row] for row in found]
    zeros = np.array([[block[2] for block in row] for row in found])
    return Rounded(
        np.array(integers), np.array(scales, np.float32), zeros if grid.asymmetric else None
    )


def assert_same(got: Rounded, wanted: Rounded) -> None:
    np.testing.assert_array_equal(got.integers, wanted.integers)
    np.testing.assert_array_equal(got.scales, wanted.scales)
    if wanted.zeros is not None:
        assert got.zeros is not None
        np.testing.assert_array_equal(got.zeros, wanted.zeros)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.dtype)
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_as_by_plain_python(grid: Grid, shape: tuple[int, int]) -> None:
    rows = matrix(*shape)
    assert_same(nearest(rows, None, grid, False), rounded_plainly(rows, grid))


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("block", [0, 2, 16, 64])
def test_blocks_of_any_length_and_either_scale(block: int, scales: str) -> None:
    rows, grid = matrix(5, 81), Grid(4, block, False, scales)
    assert_same(nearest(rows, None, grid, False), rounded_plainly(rows, grid))


def awkward() -> Array:
    """Rows: zeros, constants of both signs, tiny, denormal, huge, one outlier, mixed."""
    rows = np.zeros((9, 40), np.float32)
    rows[1], rows[2] = 3.25, -0.7
    rows[3] = np.linspace(-1e-7, 1e-7, 40)
    rows[4] = np.linspace(-1, 1, 40) * 1e-41
    rows[5] = np.linspace(-1, 1, 40) * 4e5
    rows[6, 7] = 1000.0
    rows[7] = np.abs(matrix(1, 40))
    rows[8] = -np.abs(matrix(1, 40))
    return rows


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.dtype)
@pytest.mark.parametrize("search", [False, True])
def test_awkward_rows_stay_within_half_a_step(grid: Grid, search: bool) -> None:
    rows = awkward()
    found = nearest(rows, None, grid, search)
    assert np.isfinite(found.scales).all() and (found.scales != 0).all()
    assert found.integers.min() >= grid.low and found.integers.max() <= grid.high
    error = np.abs(values(found, 32) - rows)
    step = (rows.max(axis=1) - rows.min(axis=1).clip(max=0)) / grid.high
    step = np.maximum(step, np.abs(rows).max(axis=1) / grid.high) + 1e-7
    if search:
        assert (error**2).sum(axis=1)[[0, 3, 4]].max() <= 1e-12
    else:
        assert (error.max(axis=1) <= 1.02 * step).all()
    np.testing.assert_array_equal(values(found, 32)[0], 0)


def test_scales_that_float16_lacks_are_infinite_and_float32_has_them() -> None:
    rows = np.full((1, 32), 1e9, np.float32)
    assert np.isinf(nearest(rows, None, GRIDS[0], False).scales).all()
    wide = nearest(rows, None, Grid(4, 32, False, "float32"), False)
    np.testing.assert_allclose(values(wide, 32), rows, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.dtype)
def test_both_ends_of_the_range_are_used(grid: Grid) -> None:
    low = grid.low if grid.asymmetric else -grid.high
    row = np.linspace(low, grid.high, 32, dtype=np.float32)[None]
    found = nearest(row, None, grid, False)
    assert (found.integers.min(), found.integers.max()) == (low, grid.high)


def test_the_search_finds_the_integer_that_only_the_negative_end_has() -> None:
    row = np.array([[-8, *range(-7, 8), *range(-8, 8)]], np.float32)
    grid = Grid(4, 32, False)
    np.testing.assert_array_equal(values(nearest(row, None, grid, True), 32), row)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("k", [32, 50, 256])
def test_the_search_never_does_worse_and_by_importance_better(asymmetric: bool, k: int) -> None:
    rows, grid = matrix(40, k), Grid(4, 32, asymmetric)
    importance = np.exp(np.random.default_rng(k).standard_normal(k)).astype(np.float32)

    def error(found: Rounded, weights: Array) -> Array:
        squares: Array = (weights * (values(found, 32) - rows) ** 2).sum(axis=1)
        return squares

    plain, searched = nearest(rows, None, grid, False), nearest(rows, None, grid, True)
    weighted = nearest(rows, importance, grid, True)
    ones = np.ones(k, np.float32)
    assert (error(searched, ones) <= 1.0001 * error(plain, ones)).all()
    assert error(searched, ones).sum() < 0.95 * error(plain, ones).sum()
    assert error(weighted, importance).sum() < error(searched, importance).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.dtype)
def test_values_are_those_of_onnx_s_reference(grid: Grid) -> None:
    rows = matrix(6, 70)
    found = nearest(rows, None, grid, True)
    kind = np.dtype(getattr(ml_dtypes, grid.dtype, grid.dtype))
    feeds = {"q": found.integers.astype(kind), "s": found.scales}
    if found.zeros is not None:
        feeds["z"] = found.zeros.astype(kind)
    node = helper.make_node("DequantizeLinear", list(feeds), ["y"], axis=1, block_size=32)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    padded = 96  # the reference has no shorter last block
    feeds["q"] = np.pad(feeds["q"].astype(np.int16), ((0, 0), (0, padded - 70))).astype(kind)
    graph = helper.make_graph([node], "g", infos, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (wanted,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_array_equal(values(found, 32), wanted[:, :70])


# -- feedback ------------------------------------------------------------------------------------


def correlated(count: int, k: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, k)) @ rng.standard_normal((k, k)) / np.sqrt(k)
    return (mixed * np.exp(rng.standard_normal(k))).astype(np.float32)


def with_feedback(rows: Array, factor: Array, grid: Grid, search: bool = False) -> Rounded:
    found = internal("RoundWithFeedback")(rows, factor, None, *how(rows, grid, search))
    return Rounded(found.integers, found.scales, found.zeros)


def column_by_column(rows: Array, factor: Array, grid: Grid) -> Rounded:
    """GPTQ as the paper's algorithm has it, without any blocking of the updates."""
    work, (n, k) = rows.astype(np.float64), rows.shape
    length = grid.length(k)
    integers = np.zeros((n, k), int)
    blocks = [np.zeros(n)] * -(-k // length)
    scales, zeros = np.array(blocks).T, np.array(blocks).T
    for i in range(k):
        for row in range(n):
            if i % length == 0:
                block = [float(np.float32(x)) for x in work[row, i : i + length]]
                _, scales[row, i // length], zeros[row, i // length] = oracle(block, grid)
            scale, zero = scales[row, i // length], zeros[row, i // length]
            q = min(grid.high, max(grid.low, round(work[row, i] / scale) + zero))
            error = (work[row, i] - scale * (q - zero)) / factor[i, i]
            work[row, i + 1 :] -= error * factor[i, i + 1 :]
            integers[row, i] = q
    return Rounded(integers, scales, zeros if grid.asymmetric else None)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("k", "block"), [(24, 8), (70, 32), (300, 128), (300, 32), (48, 0)])
def test_feedback_is_that_of_a_naive_loop(k: int, block: int, asymmetric: bool) -> None:
    x, rows = correlated(4 * k, k), matrix(6, k)
    factor, grid = factor_of(x.T @ x / len(x)), Grid(4, block, asymmetric, "float32")
    got, wanted = with_feedback(rows, factor, grid), column_by_column(rows, factor, grid)
    same = (got.integers == wanted.integers).mean()
    assert same > 0.99  # float32 may round a tie otherwise, and the rest of the row follows
    first = got.integers[:, : min(k, block or k)]
    assert (first == wanted.integers[:, : first.shape[1]]).mean() > 0.99


@pytest.mark.parametrize("block", [0, 32, 512])
def test_feedback_reduces_the_error_of_outputs(block: int) -> None:
    x, rows = correlated(2000, 320), matrix(24, 320)
    grid = Grid(4, block, False)
    factor = factor_of(x.T @ x / len(x))
    length = grid.length(320)

    def error(found: Rounded) -> float:
        return float(np.square(x @ (values(found, length) - rows).T).sum())

    assert error(with_feedback(rows, factor, grid, True)) < 0.6 * error(
        nearest(rows, None, grid, True)
    )


@pytest.mark.parametrize("k", [1, 7, 96, 97, 250])
def test_the_factor_is_that_of_the_damped_inverse(k: int) -> None:
    x = correlated(2 * k, k).astype(np.float64)
    hessian = x.T @ x / len(x)
    factor = factor_of(hessian).astype(np.float64)
    hessian += 0.01 * hessian.diagonal().mean() * np.eye(k)
    np.testing.assert_array_equal(np.tril(factor, -1), 0)
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(k), atol=1e-4)


def test_channels_without_inputs_and_few_inputs_are_no_obstacle() -> None:
    x = correlated(10, 64)  # a Hessian of rank 10
    x[:, 5] = 0
    factor = factor_of(x.T @ x / len(x))
    assert np.isfinite(factor).all() and (factor.diagonal() > 0).all()
    np.testing.assert_array_equal(np.tril(factor, -1), 0)
    found = with_feedback(matrix(4, 64), factor, Grid(4, 32, False))
    assert np.isfinite(values(found, 32)).all()


def test_a_hessian_of_zeros_leaves_rounding_as_it_is() -> None:
    rows, grid = matrix(4, 64), Grid(4, 32, False)
    found = with_feedback(rows, factor_of(np.zeros((64, 64), np.float32)), grid)
    assert_same(found, nearest(rows, None, grid, False))
