"""Attention of many queries in bfloat16, against float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kernel_oracles as oracles
import numpy as np
import pytest
from kernel_oracles import normal

from onnxstream_nb.kernels.attention import attention_23
from onnxstream_nb.kernels.flash_bf16 import SUPPORTED
from onnxstream_nb.kernels.threads import set_precision, set_threads
from onnxstream_nb.kvcache import KVSlot

Array = np.ndarray[Any, Any]
OFF = 2.0**-8
"""Of the largest value: weights are off by 2 ** -9 of each, before and after they are summed up."""


@pytest.fixture(autouse=True)
def fast(one_thread_afterwards: None) -> Iterator[None]:
    set_precision("fast")
    yield
    set_precision("exact")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(16)


def short(rng: Any, *shape: int) -> Array:
    """Numbers of four bits, which bfloat16 and their products in float32 hold exactly."""
    return rng.integers(-8, 9, shape).astype(np.float32) / 8  # type: ignore[no-any-return]


def assert_close(y: Array, wanted: Array, v: Array) -> None:
    assert y.shape == wanted.shape
    assert np.abs(y - wanted).max(initial=0) <= OFF * np.abs(v).max(initial=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 16, 33, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_only_weights_are_rounded(
    group: int, size: int, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    for batch, kv, queries, keys in (
        (1, 2, 2, 1),
        (2, 1, 3, 31),
        (1, 3, 33, 140),
        (1, 1, 200, 257),
    ):
        q = short(rng, batch, kv * group, queries, size)
        k, v = short(rng, batch, kv, keys, size), short(rng, batch, kv, keys, size)
        for causal in (0, 1):
            y = attention_23(q, k, v, is_causal=causal, scale=1.0)
            assert_close(y, oracles.attention(q, k, v, causal=bool(causal), scale=1.0), v)


@pytest.mark.parametrize("kind", ["bool", "float", "blocks"])
def test_masks_and_soft_cap(kind: str, rng: np.random.Generator) -> None:
    q, k, v = short(rng, 1, 4, 40, 32), short(rng, 1, 2, 300, 32), short(rng, 1, 2, 300, 40)
    mask: Array = normal(rng, 4, 40, 300)
    if kind == "bool":
        mask = mask > 0
        mask[:, 7] = False
    elif kind == "blocks":  # a causal limit and a window written as a mask
        distance = np.arange(300) - 260 - np.arange(40)[:, None]
        mask = np.where((distance <= 0) & (distance > -50), np.float32(0), np.float32(-np.inf))
    for softcap in (0.0, 2.0):
        y = attention_23(q, k, v, mask, scale=1.0, softcap=softcap)
        assert_close(y, oracles.attention(q, k, v, mask, scale=1.0, softcap=softcap), v)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_prompts_over_a_cache(encoding: str, threads: int, rng: np.random.Generator) -> None:
    """In pieces of odd lengths; what int8 makes of keys is rounded once more to bfloat16."""
    set_threads(threads)
    slots = [KVSlot(kind, 3, 64, encoding=encoding) for kind in ("key", "value")]
    for tokens in (31, 100, 2, 129, 33):
        before = slots[0].length
        q = short(rng, 1, 9, tokens, 64)
        k, v = short(rng, 1, 3, tokens, 64), short(rng, 1, 3, tokens, 64)
        y = attention_23(q, k, v, None, *slots, is_causal=1)
        for slot in slots:
            slot.length = before + tokens
        stored = [np.asarray(slot) for slot in slots]
        wanted = oracles.attention(q, *stored, causal=True, before=before)
        bound = OFF if encoding == "f16" else 2 * OFF
        assert np.abs(y - wanted).max() <= bound * np.abs(stored[1]).max()


def test_error_over_normal_numbers(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 8, 64, 128), normal(rng, 1, 2, 1000, 128), normal(rng, 1, 2, 1000, 128)
    y = attention_23(q, k, v, is_causal=1)
    wanted = oracles.attention(q, k, v, causal=True)
    error = np.sqrt(np.square(y - wanted).mean() / np.square(wanted).mean())
    assert error <= (4e-3 if SUPPORTED else 1e-6)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number(odd: float, rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 2, 20, 16), normal(rng, 1, 2, 150, 16), normal(rng, 1, 2, 150, 16)
    v[0, 1, 140, 3] = odd
    y = attention_23(q, k, v)
    assert np.isfinite(y[:, 0]).all() and not np.isfinite(y[:, 1, :, 3]).any()
    assert np.isfinite(np.delete(y[:, 1], 3, axis=2)).all()
