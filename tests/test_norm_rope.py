"""RMSNormalization, LayerNormalization and RotaryEmbedding against float64 NumPy."""

from __future__ import annotations

from typing import Any

import kernel_oracles as oracles
import numpy as np
import pytest
from kernel_oracles import normal

from onnxstream_nb.kernels.norm import layer_normalization, rms_normalization
from onnxstream_nb.kernels.rope import rotary_embedding
from onnxstream_nb.kernels.threads import set_threads

Array = np.ndarray[Any, Any]
SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 48, 77, 128, 2049)

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def assert_close(got: Array, wanted: Array, bound: float = 2e-6) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= bound * max(1, np.abs(wanted).max(initial=0))


# -- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 3, 8])
def test_norms_of_every_size(rows: int, threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)
    for size in SIZES:
        x, scale, bias = normal(rng, rows, size), normal(rng, size), normal(rng, size)
        y = rms_normalization(x, scale, epsilon=1e-5)
        assert_close(y, oracles.rms_norm(x, scale, 1e-5))
        if size > 2:  # with two elements the variance may be all rounding
            y = layer_normalization(x * 3 + 7, scale, bias, epsilon=1e-5)
            assert_close(y, oracles.layer_norm(x * 3 + 7, scale, bias, 1e-5), 5e-6)


def test_norms_over_several_axes(rng: np.random.Generator) -> None:
    x = normal(rng, 2, 3, 5, 7)
    for axis, shape in ((-1, (7,)), (3, (7,)), (-2, (5, 7)), (1, (3, 5, 7)), (0, (2, 3, 5, 7))):
        scale, bias = normal(rng, *shape), normal(rng, *shape)
        axes = tuple(range(4 - len(shape), 4))
        y = rms_normalization(x, scale, axis=axis, epsilon=1e-3)
        assert_close(y, oracles.rms_norm(x, scale, 1e-3, axes))
        y = layer_normalization(x, scale, bias, axis=axis, epsilon=1e-3)
        assert_close(y, oracles.layer_norm(x, scale, bias, 1e-3, axes))


def test_norm_parameters_are_broadcast(rng: np.random.Generator) -> None:
    x = normal(rng, 4, 5, 7)
    for shape in ((), (1,), (7,), (1, 7), (5, 1)):
        scale, bias = np.asarray(normal(rng, *shape)), np.asarray(normal(rng, *shape))
        y = rms_normalization(x, scale, axis=1)
        assert_close(y, oracles.rms_norm(x, scale, 1e-5, (1, 2)))
        y = layer_normalization(x, scale, bias, axis=1)
        assert_close(y, oracles.layer_norm(x, scale, bias, 1e-5, (1, 2)))


def test_norms_without_bias_and_of_other_layouts(rng: np.random.Generator) -> None:
    x, scale = normal(rng, 33, 6).T, normal(rng, 66)[::2]
    assert_close(layer_normalization(x, scale), oracles.layer_norm(x, scale, 0, 1e-5))
    assert_close(rms_normalization(x, scale), oracles.rms_norm(x, scale, 1e-5))
    assert_close(rms_normalization(x[::-1], scale), oracles.rms_norm(x[::-1], scale, 1e-5))


def test_norms_of_float16(rng: np.random.Generator) -> None:
    x, scale = (normal(rng, 3, 40) * 200).astype(np.float16), normal(rng, 40).astype(np.float16)
    y, z = rms_normalization(x, scale), layer_normalization(x, scale, scale)
    assert y.dtype == z.dtype == np.float16
    # Squares above 65504 would be infinite in float16.
    assert_close(y.astype(np.float64), oracles.rms_norm(x, scale, 1e-5), 1e-3)
    assert_close(z.astype(np.float64), oracles.layer_norm(x, scale, scale, 1e-5), 1e-3)


def test_norm_of_zeros_is_governed_by_epsilon() -> None:
    x, one = np.zeros((2, 33), np.float32), np.ones(33, np.float32)
    assert not rms_normalization(x, one, epsilon=1e-6).any()
    assert (layer_normalization(x + 5, one, one * 2) == 2).all()
    tiny = np.full((1, 33), 1e-3, np.float32)
    assert_close(rms_normalization(tiny, one, epsilon=0.25), tiny / np.sqrt(0.25 + 1e-6))


def test_norms_of_nothing() -> None:
    none = np.zeros(0, np.float32)
    for shape in ((3, 0), (0, 0), (2, 0, 0)):
        x = np.zeros(shape, np.float32)
        assert rms_normalization(x, none).shape == layer_normalization(x, none).shape == shape


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_norm_s_mean_and_spread(axis: int, rng: np.random.Generator) -> None:
    x = normal(rng, 4, 5, 33) + 2
    shape = x.shape[axis % 3 :]
    scale, bias = normal(rng, *shape), normal(rng, *shape)
    axes = tuple(range(axis % 3, 3))
    y, mean, spread = layer_normalization(x, scale, bias, axis=axis, n_outputs=3)
    wide = x.astype(np.float64)
    assert_close(y, oracles.layer_norm(x, scale, bias, 1e-5, axes))
    assert_close(mean, wide.mean(axis=axes, keepdims=True))
    assert_close(spread, 1 / np.sqrt(wide.var(axis=axes, keepdims=True) + 1e-5))
    assert mean.dtype == spread.dtype == np.float32


# -- rotary embedding --------------------------------------------------------------------------


def angles(rng: Any, *shape: int) -> tuple[Array, Array]:
    turn = rng.random(shape) * 7
    return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


def joined(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, H D)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("size", [2, 18, 32, 34, 64, 80, 128])
def test_rotary(size: int, interleaved: int, threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)
    for batch, heads, tokens in ((1, 1, 1), (2, 3, 5), (1, 9, 2), (2, 2, 0)):
        x = normal(rng, batch, heads, tokens, size)
        cos, sin = angles(rng, batch, tokens, size // 2)
        wanted = oracles.rotary(x, cos, sin, bool(interleaved))
        assert_close(rotary_embedding(x, cos, sin, interleaved=interleaved), wanted)
        y = rotary_embedding(joined(x), cos, sin, interleaved=interleaved, num_heads=heads)
        assert_close(y, joined(wanted))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [2, 16, 34, 40])
def test_rotary_of_a_part_leaves_the_rest(
    rotated: int, interleaved: int, rng: np.random.Generator
) -> None:
    x = normal(rng, 2, 3, 5, 40)
    cos, sin = angles(rng, 2, 5, rotated // 2)
    options = {"interleaved": interleaved, "rotary_embedding_dim": rotated}
    wanted = oracles.rotary(x, cos, sin, bool(interleaved))
    y = rotary_embedding(x, cos, sin, **options)
    assert_close(y, wanted)
    assert np.array_equal(y[..., rotated:], x[..., rotated:])
    y = rotary_embedding(joined(x), cos, sin, num_heads=3, **options)
    assert_close(y, joined(wanted))


def test_rotary_by_positions(rng: np.random.Generator) -> None:
    x, positions = normal(rng, 2, 3, 5, 32), rng.integers(0, 50, (2, 5))
    cos, sin = angles(rng, 50, 16)
    wanted = oracles.rotary(x, cos[positions], sin[positions], False)
    assert_close(rotary_embedding(x, cos, sin, positions), wanted)


def test_rotary_of_other_layouts_and_types(rng: np.random.Generator) -> None:
    x = normal(rng, 2, 5, 3, 32).transpose(0, 2, 1, 3)
    cos, sin = angles(rng, 1, 5, 16)  # one for all of the batch
    wanted = oracles.rotary(x, np.repeat(cos, 2, 0), np.repeat(sin, 2, 0), False)
    before = x.copy()
    assert_close(rotary_embedding(x, cos, sin), wanted)
    assert np.array_equal(x, before)
    short = [a.astype(np.float16) for a in (x, cos, sin)]
    y = rotary_embedding(*short)
    assert y.dtype == np.float16
    assert_close(y.astype(np.float64), wanted, 2e-3)
