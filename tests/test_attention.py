"""Attention over arrays, against softmax(Q K') V in float64 NumPy."""

from __future__ import annotations

from typing import Any

import kernel_oracles as oracles
import numpy as np
import pytest
from kernel_oracles import normal

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.kernels.attention import attention_23, attention_24
from onnxstream_nb.kernels.threads import set_threads

Array = np.ndarray[Any, Any]
LEAST = float(np.finfo(np.float32).min)

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


def assert_close(got: Array, wanted: Array, bound: float = 3e-6) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= bound * max(1, np.abs(wanted).max(initial=0))


def joined(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, H D)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


# -- sizes, layouts, threads -------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 16, 33, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_groups_head_sizes_and_threads(
    group: int, size: int, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    for batch, kv, queries, keys in ((1, 2, 1, 1), (2, 1, 3, 31), (1, 3, 13, 140), (1, 1, 1, 257)):
        q = normal(rng, batch, kv * group, queries, size)
        k, v = normal(rng, batch, kv, keys, size), normal(rng, batch, kv, keys, size)
        assert_close(attention_23(q, k, v), oracles.attention(q, k, v))
        y = attention_23(q, k, v, is_causal=1)
        assert_close(y, oracles.attention(q, k, v, causal=True))


def test_values_of_another_size(rng: np.random.Generator) -> None:
    q, k = normal(rng, 2, 4, 5, 24), normal(rng, 2, 2, 9, 24)
    for value_size in (1, 31, 32, 40, 96):
        v = normal(rng, 2, 2, 9, value_size)
        assert_close(attention_23(q, k, v), oracles.attention(q, k, v))


@pytest.mark.parametrize("threads", [1, 2])
def test_three_dimensional_form(threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)
    q, k, v = normal(rng, 2, 6, 7, 20), normal(rng, 2, 2, 7, 20), normal(rng, 2, 2, 7, 12)
    heads = {"q_num_heads": 6, "kv_num_heads": 2}
    y, key, value = attention_23(joined(q), joined(k), joined(v), **heads, n_outputs=3)
    assert_close(y, joined(oracles.attention(q, k, v)))
    assert np.array_equal(key, k) and np.array_equal(value, v)


def test_inputs_in_any_layout(rng: np.random.Generator) -> None:
    q, k, v = (normal(rng, 5, 8, 2, 33).transpose(2, 0, 1, 3) for _ in range(3))
    wanted = oracles.attention(q, k, v)
    assert_close(attention_23(q, k, v), wanted)
    assert_close(attention_23(q[:, :, ::-1], k, v), wanted[:, :, ::-1])
    wide = [np.repeat(x, 2, axis=3) for x in (q, k, v)]
    assert_close(attention_23(*[x[..., ::2] for x in wide]), wanted)


def test_scale_and_large_scores(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 2, 4, 16), normal(rng, 1, 2, 300, 16), normal(rng, 1, 2, 300, 16)
    for scale in (0.01, 1.0, 3.0):
        y = attention_23(q, k, v, scale=scale)
        # The error of a score, 2**-24 of its size times the terms, is that of its weight.
        assert_close(y, oracles.attention(q, k, v, scale=scale), 2e-5)
    y = attention_23(q * 1e3, k * 1e3, v)  # exp of the difference to the maximum never overflows
    assert_close(y, oracles.attention(q * 1e3, k * 1e3, v), 1e-3)


@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
def test_softcap(softcap: float, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 4, 5, 32), normal(rng, 1, 2, 40, 32), normal(rng, 1, 2, 40, 32)
    mask = normal(rng, 5, 40)
    y = attention_23(q * 5, k, v, mask, softcap=softcap, is_causal=1)
    wanted = oracles.attention(q * 5, k, v, mask, causal=True, softcap=softcap)
    assert_close(y, wanted, 1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_come_back_as_they_went_in(dtype: Any, rng: np.random.Generator) -> None:
    q, k, v = (normal(rng, 1, 2, 4, 16).astype(dtype) for _ in range(3))
    y, key, value = attention_23(q, k, v, is_causal=1, n_outputs=3)
    assert y.dtype == key.dtype == value.dtype == dtype
    assert_close(y.astype(np.float64), oracles.attention(q, k, v, causal=True), 1e-3)
    assert np.array_equal(key, k)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 0, 3), (1, 3, 0), (0, 3, 3), (1, 0, 0)])
def test_empty_axes(batch: int, queries: int, keys: int) -> None:
    q = np.ones((batch, 4, queries, 16), np.float32)
    k = np.ones((batch, 2, keys, 16), np.float32)
    y, key, _ = attention_23(q, k, k, is_causal=1, n_outputs=3)
    assert y.shape == q.shape and (y == (1 if keys else 0)).all() and key.shape == k.shape


def test_three_dimensional_form_needs_its_heads() -> None:
    x = np.zeros((1, 2, 10), np.float32)
    for heads in ({}, {"q_num_heads": 3, "kv_num_heads": 3}):
        with pytest.raises(ShapeError, match="q_num_heads and kv_num_heads"):
            attention_23(x, x, x, **heads)


# -- masks -------------------------------------------------------------------------------------

MASK_SHAPES = [
    (6, 150), (1, 150), (4, 6, 150), (1, 6, 150), (4, 1, 150), (2, 4, 6, 150), (2, 1, 6, 150),
    (1, 4, 6, 150), (2, 1, 1, 150), (1, 1, 1, 150),
]  # fmt: skip


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("kind", ["bool", "float", "minus infinity"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(shape: tuple[int, ...], kind: str, causal: int, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 2, 4, 6, 32), normal(rng, 2, 2, 150, 32), normal(rng, 2, 2, 150, 32)
    mask: Array = normal(rng, *shape)
    if kind == "bool":
        mask = mask > 0
    elif kind == "minus infinity":
        mask = np.where(mask > 0, np.float32(0), np.float32(-np.inf))
    y = attention_23(q, k, v, mask, is_causal=causal)
    assert_close(y, oracles.attention(q, k, v, mask, causal=bool(causal)))


@pytest.mark.parametrize("layout", ["transposed", "every other", "broadcast", "float16", "float64"])
def test_masks_in_any_layout(layout: str, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 2, 5, 16), normal(rng, 1, 2, 40, 16), normal(rng, 1, 2, 40, 16)
    masks: dict[str, Array] = {
        "transposed": normal(rng, 40, 5).T,
        "every other": normal(rng, 5, 80)[:, ::2],
        "broadcast": np.broadcast_to(normal(rng, 5, 1), (5, 40)),
        "float16": normal(rng, 5, 40).astype(np.float16),
        "float64": normal(rng, 5, 40).astype(np.float64),
    }
    mask = masks[layout]
    assert_close(attention_23(q, k, v, mask), oracles.attention(q, k, v, mask))


@pytest.mark.parametrize("boolean", [True, False])
def test_short_masks_are_closed(boolean: bool, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 2, 5, 16), normal(rng, 1, 2, 140, 16), normal(rng, 1, 2, 140, 16)
    for length in (2, 33, 129):
        mask: Array = normal(rng, 5, length)
        mask = mask > 0 if boolean else mask
        y = attention_24(q, k, v, mask)
        assert_close(y, oracles.attention(q, k, v, mask))


def test_rows_that_see_no_key_are_zero(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 3, 4, 33), normal(rng, 1, 1, 300, 33), normal(rng, 1, 1, 300, 33)
    mask = np.ones((4, 300), bool)
    mask[1] = False
    mask[2, :290] = False  # two whole blocks of keys without one that is seen
    y, _, _, weights = attention_23(q, k, v, mask, qk_matmul_output_mode=3, n_outputs=4)
    assert not y[:, :, 1].any() and not weights[:, :, 1].any()
    assert_close(y, oracles.attention(q, k, v, mask))
    assert_close(attention_23(q, k, v, mask, is_causal=1)[:, :, 2], np.zeros((1, 3, 33)))
    assert not attention_23(q, k, v, np.zeros((4, 300), bool)).any()


def test_masks_of_the_least_float(rng: np.random.Generator) -> None:
    # Exports add finfo.min where a key is hidden; a row of nothing else is a plain average.
    q, k, v = normal(rng, 1, 2, 3, 16), normal(rng, 1, 2, 140, 16), normal(rng, 1, 2, 140, 16)
    mask = np.where(normal(rng, 3, 140) > 0, np.float32(0), np.float32(LEAST))
    assert_close(attention_23(q, k, v, mask), oracles.attention(q, k, v, mask))
    mask[1] = LEAST
    y = attention_23(q, k, v, mask)
    assert_close(y[:, :, 1], v.mean(axis=2))


# -- past and present --------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("past", [0, 1, 129])
def test_past_arrays(past: int, causal: int, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 2, 6, 5, 16), normal(rng, 2, 2, 5, 16), normal(rng, 2, 2, 5, 24)
    pk, pv = normal(rng, 2, 2, past, 16), normal(rng, 2, 2, past, 24)
    mask = normal(rng, 5, past + 5)
    y, key, value = attention_23(q, k, v, mask, pk, pv, is_causal=causal, n_outputs=3)
    keys, values = np.concatenate([pk, k], 2), np.concatenate([pv, v], 2)
    assert np.array_equal(key, keys) and np.array_equal(value, values)
    wanted = oracles.attention(q, keys, values, mask, causal=bool(causal), before=past)
    assert_close(y, wanted)


# -- version 24, windows, scores ---------------------------------------------------------------


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("with_mask", [False, True])
def test_valid_lengths(causal: int, with_mask: bool, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 4, 4, 3, 16), normal(rng, 4, 2, 140, 16), normal(rng, 4, 2, 140, 16)
    lengths = np.array([140, 7, 3, 1], np.int64)  # the last is shorter than the queries
    mask = normal(rng, 3, 140) if with_mask else None
    y = attention_24(q, k, v, mask, None, None, lengths, is_causal=causal)
    wanted = oracles.attention(
        q, k, v, mask, causal=bool(causal), before=lengths - 3 if causal else 0, lengths=lengths
    )
    assert_close(y, wanted)
    if causal:
        assert not y[3, :, :2].any()


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize(("left", "right"), [(0, -1), (2, 0), (-1, 3), (5, 1), (140, 140), (0, 0)])
def test_windows(left: int, right: int, causal: int, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 2, 4, 6, 16), normal(rng, 2, 2, 6, 16), normal(rng, 2, 2, 6, 16)
    sizes = {"left_window_size": left, "right_window_size": right}
    for past in (0, 140):
        pk, pv = normal(rng, 2, 2, past, 16), normal(rng, 2, 2, past, 16)
        y, key, _ = attention_24(q, k, v, None, pk, pv, **sizes, is_causal=causal, n_outputs=3)
        assert key.shape[2] == past + 6
        keys, values = np.concatenate([pk, k], 2), np.concatenate([pv, v], 2)
        wanted = oracles.attention(
            q, keys, values, causal=bool(causal), before=past, left=left, right=right
        )
        assert_close(y, wanted)


def test_windows_count_from_the_valid_length(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 2, 2, 3, 16), normal(rng, 2, 2, 40, 16), normal(rng, 2, 2, 40, 16)
    lengths = np.array([40, 20])
    y = attention_24(q, k, v, None, None, None, lengths, left_window_size=4, right_window_size=0)
    wanted = oracles.attention(q, k, v, before=lengths - 3, lengths=lengths, left=4, right=0)
    assert_close(y, wanted)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_scores_as_fourth_output(mode: int, softcap: float, rng: np.random.Generator) -> None:
    """0: the product; 1: after the soft cap; 2: and with mask and limits; 3: after softmax."""
    q, k, v = normal(rng, 2, 4, 3, 16), normal(rng, 2, 2, 9, 16), normal(rng, 2, 2, 9, 16)
    mask = rng.random((3, 9)) > 0.4
    mask[1] = False
    y, _, _, scores = attention_23(
        q, k, v, mask, is_causal=1, softcap=softcap, qk_matmul_output_mode=mode, n_outputs=4
    )
    wanted = oracles.attention_scores(q, k, mask, True, 0, 0.25, softcap)[mode]
    assert np.array_equal(np.isneginf(scores), np.isneginf(wanted))
    finite = np.isfinite(wanted)
    assert_close(scores[finite], wanted[finite])
    assert_close(y, oracles.attention(q, k, v, mask, causal=True, softcap=softcap))
