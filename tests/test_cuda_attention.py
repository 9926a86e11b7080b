"""Attention on a GPU, simulated, against NumPy in double precision."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import Array, placed, poisoned

from onnxstream_nb.kernels.cuda_attention import (
    combine_splits,
    decode_attention,
    partial_bytes,
    queries_of_block,
)
from onnxstream_nb.kernels.cuda_flash import prefill_attention
from onnxstream_nb.kernels.cuda_simulator import ORDERS, simulate


def cache_of(kv: int, positions: int, size: int, used: int, seed: int) -> Array:
    """Halves; what no token has written yet is NaN."""
    values = np.random.default_rng(seed).standard_normal((kv, positions, size)).astype(np.float16)
    values[:, used:] = np.nan
    return placed(values)


def attention(
    q: Array, keys: Array, values: Array, past: int, scale: float, window: int = 0, cap: float = 0
) -> Array:
    """q (T, H, D), keys and values (KV, P, D) -> (T, H, D), each token seeing itself and before."""
    tokens, heads, _ = q.shape
    out = np.zeros(q.shape)
    for t in range(tokens):
        stop = past + t + 1
        start = max(0, stop - window) if window else 0
        for h in range(heads):
            kv = h * len(keys) // heads
            k, v = (a[kv, start:stop].astype(np.float64) for a in (keys, values))
            scores = k @ q[t, h] * scale
            scores = cap * np.tanh(scores / cap) if cap else scores
            e = np.exp(scores - scores.max())
            out[t, h] = e @ v / e.sum()
    return out


def decoded(
    q: Array, keys: Array, values: Array, past: int, splits: int, scale: float,
    window: int = 0, cap: float = 0, order: str = "forwards",
) -> Array:  # fmt: skip
    tokens, heads, size = q.shape
    kv, positions, _ = keys.shape
    queries = heads // kv
    group = queries_of_block(queries)
    kernel, place = decode_attention(size, group), placed(np.array([past]))
    parts = poisoned(partial_bytes(tokens, heads, size, splits) // 4)
    arguments = [a.ctypes.data for a in (q, keys, values, place, parts)]
    simulate(
        kernel, (splits, tokens, heads // group), kernel.threads,
        [*arguments, heads, queries, positions, splits, window, scale, cap],
        [q, keys, values, place, parts], order=order,
    )  # fmt: skip
    y = poisoned(*q.shape)
    simulate(
        combine_splits, tokens * heads, 128,
        [parts.ctypes.data, y.ctypes.data, splits, size], [parts, y],
    )  # fmt: skip
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv", "size", "past", "splits"),
    [
        (1, 3, 1, 64, 37, 2),
        (2, 2, 2, 128, 0, 3),
        (3, 4, 2, 24, 70, 1),
        (1, 1, 1, 8, 300, 4),
        (1, 12, 2, 16, 21, 2),
    ],
)
def test_few_tokens_over_a_cache(
    tokens: int, heads: int, kv: int, size: int, past: int, splits: int, order: str
) -> None:
    """Fewer keys than splits, more than turns; heads that lanes do not divide."""
    rng = np.random.default_rng(size)
    q = placed(rng.standard_normal((tokens, heads, size)).astype(np.float32))
    keys, values = (cache_of(kv, past + 9, size, past + tokens, seed) for seed in (1, 2))
    y = decoded(q, keys, values, past, splits, size**-0.5, order=order)
    wanted = attention(q, keys, values, past, size**-0.5)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("window", "cap"), [(5, 0.0), (0, 2.0), (64, 5.0)])
def test_windows_and_capped_scores(window: int, cap: float) -> None:
    rng = np.random.default_rng(window)
    q = placed(3 * rng.standard_normal((2, 2, 16)).astype(np.float32))
    keys, values = (cache_of(1, 60, 16, 52, seed) for seed in (1, 2))
    y = decoded(q, keys, values, 50, 2, 0.5, window, cap)
    wanted = attention(q, keys, values, 50, 0.5, window, cap)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=3e-6)


def test_huge_scores_do_not_overflow() -> None:
    q = placed(np.full((1, 1, 8), 3e4, np.float32))
    keys, values = (cache_of(1, 40, 8, 40, seed) for seed in (1, 2))
    y = decoded(q, keys, values, 39, 2, 1.0)
    np.testing.assert_allclose(y, attention(q, keys, values, 39, 1.0), rtol=0, atol=1e-5)


# -- many tokens


def read(
    q: Array, keys: Array, values: Array, past: int, scale: float, window: int = 0, cap: float = 0,
    *, since: tuple[int, int] = (8, 0), eager: bool = False, order: str = "forwards",
) -> Array:  # fmt: skip
    tokens, heads, size = q.shape
    kv, positions, _ = keys.shape
    kernel = prefill_attention(size, 2, 32, since)
    place, y = placed(np.array([past])), poisoned(*q.shape)
    arrays = [q, keys, values, place, y]
    addresses = [a.ctypes.data for a in arrays]
    simulate(
        kernel, (-(-tokens // 32), heads), kernel.threads,
        [*addresses, tokens, heads, heads // kv, positions, window, scale, cap],
        arrays, eager=eager, order=order,
    )  # fmt: skip
    return y


@pytest.mark.parametrize(("eager", "order"), [(False, "forwards"), (True, "backwards")])
@pytest.mark.parametrize("since", [(8, 0), (7, 5)])
@pytest.mark.parametrize(("tokens", "heads", "past", "size"), [(35, 2, 0, 32), (5, 1, 40, 16)])
def test_many_tokens_over_a_cache(
    tokens: int, heads: int, past: int, size: int, since: tuple[int, int], eager: bool, order: str
) -> None:
    """Tokens and keys that no tile divides, a cache with room behind them that nobody wrote."""
    rng = np.random.default_rng(size)
    q = placed(rng.standard_normal((tokens, heads, size)).astype(np.float32))
    keys, values = (cache_of(1, past + tokens + 3, size, past + tokens, s) for s in (1, 2))
    y = read(q, keys, values, past, size**-0.5, since=since, eager=eager, order=order)
    wanted = attention(q, keys, values, past, size**-0.5)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-3)  # weights and queries are halves


@pytest.mark.parametrize(("window", "cap"), [(7, 0.0), (0, 2.0), (40, 5.0)])
def test_windows_and_capped_scores_of_many_tokens(window: int, cap: float) -> None:
    rng = np.random.default_rng(window)
    q = placed(3 * rng.standard_normal((34, 1, 16)).astype(np.float32))
    keys, values = (cache_of(1, 90, 16, 84, seed) for seed in (1, 2))
    y = read(q, keys, values, 50, 0.25, window, cap)
    wanted = attention(q, keys, values, 50, 0.25, window, cap)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=4e-3)
