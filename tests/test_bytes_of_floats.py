"""Activations as bytes and back: the kernels against NumPy, and their rows in tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxstream_nb import registry
from onnxstream_nb.kernels.threads import set_threads

Array = np.ndarray[Any, Any]
SIZES = (1, 15, 16, 17, 255, 576, 20_000)


@pytest.fixture(params=(1, 3), autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    set_threads(request.param)
    yield request.param
    set_threads(1)


def call(op_type: str, *inputs: Any) -> Any:
    operator = registry.lookup(op_type, "", 21)
    assert operator is not None
    return operator.function(*inputs)


def lowered(op_type: str, *inputs: Any) -> Any:
    operator = registry.lookup(op_type, "", 21)
    assert operator is not None and operator.lower is not None
    return operator.lower(*inputs)


def rounded(x: Array, scale: Any, zero: int) -> Array:
    with np.errstate(over="ignore"):
        steps = np.rint(x / np.float32(scale)) + np.float32(zero)
    found: Array = np.clip(steps, 0, 255).astype(np.uint8)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0, 0.3])
def test_ranges_and_steps_are_numpys(size: int, shift: float) -> None:
    x = (np.random.default_rng(size).standard_normal(size) + shift).astype(np.float32)
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32((high - low) / np.float32(255))
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
    q, s, z = call("DynamicQuantizeLinear", x)
    assert (s, z) == (scale, zero) and (s.shape, z.shape) == ((), ())
    np.testing.assert_array_equal(q, rounded(x, scale, int(zero)))
    y = call("DequantizeLinear", q, s, z)
    np.testing.assert_array_equal(y, (q.astype("f4") - z) * s)
    assert np.abs(y - x).max() <= 0.51 * scale


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("zero", [0, 128, 255])
def test_known_ranges_clip_and_halves_go_to_even(size: int, zero: int) -> None:
    x = (np.random.default_rng(size).integers(-600, 600, size) / 2).astype(np.float32)
    x[:3] = np.array([np.inf, -np.inf, 3e38], "f4")[:size]
    q = call("QuantizeLinear", x, np.array(1, "f4"), np.array(zero, np.uint8))
    np.testing.assert_array_equal(q, rounded(x, 1, zero))
    again = call("QuantizeLinear", x, np.array([0.3], "f4"), np.array([zero], np.uint8))
    np.testing.assert_array_equal(again, rounded(x, 0.3, zero))


def test_zeros_and_nothing_have_a_scale() -> None:
    for x in (np.zeros((2, 3), "f4"), np.zeros((0, 3), "f4"), np.full((1, 2), 1e-45, "f4")):
        q, s, z = call("DynamicQuantizeLinear", x)
        assert s == 1 and z == 0 and not q.any() and q.shape == x.shape


def test_a_row_can_be_run_again_on_other_elements() -> None:
    x = np.linspace(-1, 1, 40, dtype=np.float32)
    first = lowered("DynamicQuantizeLinear", x)
    second = lowered("DequantizeLinear", *first.outputs)
    for factor in (1, 3, 0.01):
        x[:] = np.linspace(-1, 2, 40) * factor
        first.run()
        np.testing.assert_allclose(second.run(), x, 0, 0.0061 * factor)


def test_other_types_and_forms_are_left_to_numpy() -> None:
    x, scale = np.zeros((4, 2), "f4"), np.ones(2, "f4")
    zero = np.zeros(2, np.uint8)
    assert lowered("QuantizeLinear", x, scale, zero) is None
    assert lowered("QuantizeLinear", x, scale[0:1], zero[:1].astype(np.int8)) is None
    assert lowered("QuantizeLinear", x[:, ::2], scale[:1], zero[:1]) is None
    assert lowered("DequantizeLinear", x.astype(np.int8), scale[:1], zero[:1]) is None
    assert lowered("DequantizeLinear", x.astype(np.uint8), scale.astype("f2")[:1]) is None
    strided = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    q, s, z = call("DynamicQuantizeLinear", strided)
    np.testing.assert_array_equal(q, rounded(strided, s, int(z)))
