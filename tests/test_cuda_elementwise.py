"""Elementwise functions on a GPU, simulated, against NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array, placed, poisoned

from onnxstream_nb.kernels.cuda_elementwise import (
    BINARY,
    THREADS,
    UNARY,
    from_integers,
    swish_multiply,
    to_half,
)
from onnxstream_nb.kernels.cuda_simulator import simulate
from onnxstream_nb.kernels.mapping import layout

FUNCTIONS: dict[str, Callable[[Array], Any]] = {
    "negative": np.negative, "reciprocal": np.reciprocal, "square": np.square,
    "square_root": np.sqrt, "cube": lambda x: x**3, "relu": lambda x: np.maximum(x, 0),
    "exponential": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-1.5 * x)), "tanh": np.tanh,
    "erf": np.vectorize(math.erf),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "sin": np.sin, "cos": np.cos,
}  # fmt: skip


def run(kernel: Any, arrays: list[Array], numbers: list[Any], count: int) -> Array:
    arguments = [*(a.ctypes.data for a in arrays), *numbers]
    simulate(kernel, -(-count // THREADS), THREADS, arguments, arrays)
    return arrays[-1]


def test_every_function_has_a_reference() -> None:
    assert UNARY.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", UNARY)
def test_a_function_of_one_operand(name: str) -> None:
    x = np.linspace(-9, 9, 263).astype(np.float32)
    x = placed(np.abs(x) + 1e-3 if name in ("square_root", "reciprocal") else x)
    y = run(UNARY[name], [x, poisoned(263)], [263, 1.5], 263)
    np.testing.assert_allclose(y, FUNCTIONS[name](x.astype(np.float64)), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(
    ("left", "right"), [((7, 45), (7, 45)), ((7, 45), (45,)), ((7, 1), (7, 45)), ((3, 5), ())]
)
def test_a_function_of_two_operands(
    name: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(3)
    x, y = (placed(rng.uniform(1, 2, shape).astype(np.float32)) for shape in (left, right))
    wanted = getattr(np, name)(x, y)
    form = layout(wanted.shape, [left, right])
    assert form is not None
    rows, columns, steps = form
    numbers = [rows, columns, *(number for step in steps for number in step)]
    z = run(BINARY[name], [x, y, poisoned(*wanted.shape)], numbers, wanted.size)
    np.testing.assert_allclose(z, wanted, rtol=1e-6)


def test_swish_times_another() -> None:
    x, y = (placed(np.linspace(-8, 8, 300).astype(np.float32)[::s]) for s in (1, -1))
    z = run(swish_multiply, [x, y, poisoned(300)], [300], 300)
    np.testing.assert_allclose(z, x.astype(np.float64) / (1 + np.exp(-x)) * y, rtol=2e-6, atol=1e-6)


def test_rounding_to_halves() -> None:
    x = placed(np.array([0, -0.0, 1 / 3, 65504, 70000, -70000, 1e-8, 6.1e-5], np.float32))
    y = run(to_half, [x, placed(np.full(8, np.nan, np.float16))], [8], 8)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, x.astype(np.float16))


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_angles(name: str) -> None:
    """Up to 1e5, among them those next to multiples of a quarter turn; 1e-7 is a float32's step."""
    rng = np.random.default_rng(7)
    quarters = np.arange(1, 63662, 131) * (np.pi / 2)
    x = np.concatenate([rng.uniform(-1e5, 1e5, 2000), quarters, -quarters, np.arange(600.0) * 166])
    x = placed(x.astype(np.float32))
    y = run(UNARY[name], [x, poisoned(x.size)], [x.size, 0], x.size)
    wanted = FUNCTIONS[name](x.astype(np.float64))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-7)
    np.testing.assert_allclose(y, wanted, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_angles_that_are_not_finite(name: str) -> None:
    x = placed(np.array([np.inf, -np.inf, np.nan, 0], np.float32))
    y = run(UNARY[name], [x, poisoned(4)], [4, 0], 4)
    np.testing.assert_array_equal(y, [np.nan, np.nan, np.nan, float(name == "cos")])


def test_integers_to_floats() -> None:
    x = placed(np.array([0, 1, -1, 2**24 + 1, -(2**24) - 3, 2**62, 123456789012345], np.int64))
    y = run(from_integers, [x, poisoned(7)], [7], 7)
    np.testing.assert_array_equal(y, x.astype(np.float32))
