"""Positions as floats, their cosines and sines, and rows picked by number: against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxstream_nb import registry
from onnxstream_nb.errors import ShapeError
from onnxstream_nb.kernels.indexing import gather, lower_gather
from onnxstream_nb.kernels.threads import set_threads

Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def operator(name: str, version: int) -> Any:
    found = registry.lookup(name, "", version)
    assert found is not None
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["Cos", "Sin"])
def test_angles_are_rounded_once_however_large(name: str, threads: int) -> None:
    set_threads(threads)
    rng, function = np.random.default_rng(5), {"Cos": np.cos, "Sin": np.sin}[name]
    for size in (0, 1, 17, 8192 + 33):
        x = (rng.standard_normal(size) * 10.0 ** rng.integers(-30, 31, size)).astype(np.float32)
        wanted = function(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(operator(name, 20).function(x), wanted)
        np.testing.assert_array_equal(operator(name, 20).lower(x).run(), wanted)
    odd = np.array([np.inf, -np.inf, np.nan, -0.0, 3.4e38], np.float32)
    with np.errstate(invalid="ignore"):
        wanted = function(odd.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(operator(name, 20).function(odd), wanted)


@pytest.mark.parametrize("version", [9, 19])
def test_positions_become_floats_as_numpy_rounds_them(version: int) -> None:
    x = np.array([[0, -1, 2**24 + 1, 2**24 + 3, 2**53 + 1, 2**63 - 1, -(2**63)]], np.int64)
    cast = operator("Cast", version)
    rows = cast.lower(x, to=1)
    np.testing.assert_array_equal(rows.run(), x.astype(np.float32))
    np.testing.assert_array_equal(rows.run(), cast.function(x, to=1))
    assert cast.lower(x, to=11) is None and cast.lower(x[:, ::2], to=1) is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("shape", "axis"), [((7, 5), 0), ((1, 9, 33), 1), ((1, 1, 4), -1)])
@pytest.mark.parametrize("indices", [[2], [-1], [[0, 3], [-4, 1]], []])
def test_rows_are_picked_as_numpy_picks_them(
    shape: tuple[int, ...], axis: int, indices: Any, threads: int
) -> None:
    set_threads(threads)
    data = np.random.default_rng(1).standard_normal(shape, np.float32)
    wanted = np.take(data, np.array(indices, np.int64), axis)
    rows = lower_gather(data, np.array(indices, np.int64), axis=axis)
    assert rows is not None
    np.testing.assert_array_equal(rows.run(), wanted)
    np.testing.assert_array_equal(gather(data, np.array(indices, np.int64), axis=axis), wanted)


@pytest.mark.parametrize("index", [3, -4, 2**62])
def test_a_row_out_of_range_is_named_whenever_the_calls_are_run(index: int) -> None:
    data, indices = np.ones((1, 3, 2), np.float32), np.array([1], np.int64)
    rows = lower_gather(data, indices, axis=1)
    assert rows is not None
    rows.run()
    indices[0] = index
    with pytest.raises(ShapeError, match=f"index {index} is out of range for axis 1 of size 3"):
        rows.run()


def test_what_is_no_row_is_left_to_numpy() -> None:
    ids = np.array([0], np.int64)
    assert lower_gather(np.ones((2, 3), np.float32), ids, axis=1) is None  # columns
    assert lower_gather(np.ones((2, 3), np.float64), ids) is None
    assert lower_gather(np.ones((0, 3), np.float32), np.empty(0, np.int64)) is None
    assert lower_gather(np.ones((2, 3), np.float32), ids.astype(np.int32)) is None
