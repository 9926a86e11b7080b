"""Attention over caches that grow in place, for one token and for many, in float16 and in int8."""

from __future__ import annotations

from typing import Any

import kernel_oracles as oracles
import numpy as np
import pytest
from kernel_oracles import normal

from onnxstream_nb.kernels.attention import attention_23, attention_24, lower_attention
from onnxstream_nb.kernels.lowered import Table
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.kvcache import KVSlot

Array = np.ndarray[Any, Any]
ENCODINGS = pytest.mark.parametrize("encoding", ["f16", "q8"])

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


def assert_stored(got: Array, new: Array, encoding: str) -> None:
    """(1, KV, T, D) is what the encoding makes of `new`: half a step of int8 off at most."""
    if encoding == "f16":
        assert np.array_equal(got, new.astype(np.float16))
    else:
        step = np.abs(new).max(axis=-1, keepdims=True, initial=0) / 127
        assert (np.abs(got - new) <= 0.5001 * step).all()


class Cached:
    """A pair of slots, and beside it what they should hold."""

    def __init__(self, heads: int, size: int, value_size: int, encoding: str = "f16") -> None:
        self.encoding = encoding
        self.keys = KVSlot("key", heads, size, encoding=encoding)
        self.values = KVSlot("value", heads, value_size, encoding=encoding)
        self.k = np.zeros((1, heads, 0, size), np.float32)
        self.v = np.zeros((1, heads, 0, value_size), np.float32)

    def rewind(self, length: int) -> None:
        self.keys.length = self.values.length = length
        self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]

    def take_in(self, k: Array, v: Array) -> None:
        """What was written counts from now on: it is `k` and `v`, and nothing before has moved."""
        before, after = self.k.shape[2], self.k.shape[2] + k.shape[2]
        self.keys.length = self.values.length = after
        keys, values = np.asarray(self.keys), np.asarray(self.values)
        assert_stored(keys[:, :, before:], k, self.encoding)
        assert_stored(values[:, :, before:], v, self.encoding)
        assert np.array_equal(keys[:, :, :before], self.k)
        assert np.array_equal(values[:, :, :before], self.v)
        self.k, self.v = keys, values

    def step(
        self, rng: Any, queries: int, group: int, mask: Array | None = None, **attributes: Any
    ) -> Array:
        """Append `queries` tokens and compare; causal when there is no mask."""
        heads, size, value_size = self.keys.heads, self.k.shape[3], self.v.shape[3]
        q = normal(rng, 1, heads * group, queries, size)
        k, v = normal(rng, 1, heads, queries, size), normal(rng, 1, heads, queries, value_size)
        before, causal = self.k.shape[2], mask is None
        y, keys, values = attention_23(
            joined(q), joined(k), joined(v), mask, self.keys, self.values, n_outputs=3,
            q_num_heads=heads * group, kv_num_heads=heads, is_causal=int(causal), **attributes,
        )  # fmt: skip
        assert keys.array is self.keys.array and values.array is self.values.array
        assert self.keys.length == self.values.length == before
        self.take_in(k, v)
        assert keys.shape == self.k.shape and values.shape == self.v.shape
        wanted = oracles.attention(
            q, self.k, self.v, mask, causal=causal, before=before, **attributes
        )
        assert_close(y, joined(wanted))
        return np.asarray(y)


# -- one token ---------------------------------------------------------------------------------


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 3), (4, 8)])
def test_a_token_after_so_many(
    heads: int, group: int, size: int, threads: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    cache = Cached(heads, size, size, encoding)
    for length in (1, 31, 32, 33, 127, 1000, 2049):
        if missing := length - 1 - cache.k.shape[2]:
            append(cache, rng, missing)
        cache.step(rng, 1, group)


def append(cache: Cached, rng: np.random.Generator, tokens: int) -> None:
    """Tokens whose attention is of no interest."""
    heads, size, value_size = cache.keys.heads, cache.k.shape[3], cache.v.shape[3]
    k, v = normal(rng, 1, heads, tokens, size), normal(rng, 1, heads, tokens, value_size)
    q = np.zeros((1, heads, 0, size), np.float32)
    attention_23(q, k, v, None, cache.keys, cache.values, n_outputs=3)
    cache.take_in(k, v)


@ENCODINGS
@pytest.mark.parametrize("group", [2, 4, 5, 7, 11, 19])
def test_groups_that_take_several_tiles(
    group: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(2)
    cache = Cached(1, 24, 40, encoding)
    append(cache, rng, 150)
    for _ in range(3):
        cache.step(rng, 1, group)


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_with_mask_soft_cap_and_scale(
    threads: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    cache = Cached(2, 48, 33, encoding)
    append(cache, rng, 299)
    cache.step(rng, 1, 3, softcap=2.0)
    cache.step(rng, 1, 3, normal(rng, 6, 1, 301), scale=0.5)
    mask = np.zeros((1, 302), bool)
    mask[0, 7:9] = True  # all other blocks have none that is seen
    cache.step(rng, 1, 3, mask, softcap=3.0)
    assert not cache.step(rng, 1, 3, np.zeros((1, 303), bool)).any()


@ENCODINGS
def test_scores_that_grow_along_the_keys(encoding: str, rng: np.random.Generator) -> None:
    """Every block has a larger maximum than the one before, and the last takes it all."""
    set_threads(2)
    slots = [KVSlot(kind, 1, 16, encoding=encoding) for kind in ("key", "value")]
    rising = np.linspace(0, 80, 600, dtype=np.float32)[None, None, :, None]
    k, v = np.repeat(rising, 16, 3), normal(rng, 1, 1, 600, 16)
    q = np.ones((1, 2, 1, 16), np.float32)
    attention_23(q[:, :, :0], k[:, :, :-1], v[:, :, :-1], None, *slots, n_outputs=3)
    for slot in slots:
        slot.length = 599
    y = attention_23(q, k[:, :, -1:], v[:, :, -1:], None, *slots)
    for slot in slots:
        slot.length = 600
    assert_close(y, oracles.attention(q, *map(np.asarray, slots)), 1e-5)


@ENCODINGS
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number_spoils_what_sees_it(
    odd: float, queries: int, encoding: str, rng: np.random.Generator
) -> None:
    """A key or a value that is infinite or a NaN: its head's rows are no numbers, others are."""
    set_threads(2)
    for position in (3, 140):
        for name in ("k", "v"):
            cache = Cached(2, 16, 16, encoding)
            new = {n: normal(rng, 1, 2, 200, 16) for n in ("k", "v")}
            new[name][0, 1, position, 5] = odd
            q = normal(rng, 1, 4, queries, 16)
            cut = 200 - queries
            first = (x[:, :, :cut] for x in new.values())
            attention_23(q[:, :, :0], *first, None, cache.keys, cache.values, n_outputs=3)
            cache.keys.length = cache.values.length = cut
            last = (x[:, :, cut:] for x in new.values())
            y = attention_23(q, *last, None, cache.keys, cache.values)
            assert np.isfinite(y[:, :2]).all()
            # A score of -inf is a key that is not seen.
            hidden = q[:, 2:, :, 5] < 0 if (name, odd, encoding) == ("k", np.inf, "f16") else False
            finite = np.isfinite(y[:, 2:]).all(axis=-1)
            assert np.array_equal(finite, np.broadcast_to(hidden, finite.shape))


# -- growth, rewinding -------------------------------------------------------------------------


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("heads", "group", "size"), [(1, 1, 64), (2, 3, 33), (3, 2, 80), (1, 8, 128)]
)
def test_slots_fill_in_place(
    heads: int, group: int, size: int, threads: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    cache = Cached(heads, size, size, encoding)
    before = cache.keys.address, cache.values.address
    for tokens in (7, 1, 1, 130, 1, 115, 1, 1, 2, 1, 1):
        cache.step(rng, tokens, group)
    assert cache.keys.length == 261
    assert (cache.keys.address, cache.values.address) == before


@ENCODINGS
def test_slots_set_back_forget_what_followed(encoding: str, rng: np.random.Generator) -> None:
    cache = Cached(2, 48, 40, encoding)
    cache.step(rng, 200, 2)
    for length in (150, 3, 0, 5):
        cache.rewind(min(length, cache.k.shape[2]))
        cache.step(rng, 9, 2)
        cache.step(rng, 1, 2)
    cache.rewind(4)
    cache.step(rng, 263, 2)  # further than it was before


@ENCODINGS
def test_slots_with_masks(encoding: str, rng: np.random.Generator) -> None:
    cache = Cached(2, 32, 32, encoding)
    cache.step(rng, 5, 2, rng.random((5, 5)) > 0.3)
    cache.step(rng, 2, 2, normal(rng, 1, 4, 2, 7))
    cache.step(rng, 1, 2, rng.random((1, 1, 1, 8)) > 0.3)
    cache.step(rng, 0, 2, np.zeros((0, 8), bool))
    cache.step(rng, 3, 2)


def test_slots_and_arrays_agree_about_every_output(rng: np.random.Generator) -> None:
    q, k, v = normal(rng, 1, 4, 3, 16), normal(rng, 1, 2, 3, 16), normal(rng, 1, 2, 3, 16)
    slots = [KVSlot("key", 2, 16), KVSlot("value", 2, 16)]
    _, *slots = attention_23(q, k, v, None, *slots, n_outputs=3)
    past = [np.asarray(s) for s in slots]
    wanted = attention_23(q, k, v, None, *past, is_causal=1, qk_matmul_output_mode=3, n_outputs=4)
    got = attention_23(q, k, v, None, *slots, is_causal=1, qk_matmul_output_mode=3, n_outputs=4)
    for x, y in zip(got, wanted, strict=True):
        assert_close(np.asarray(x), np.asarray(y), 1e-3)


def test_slots_with_windows_grow_too(rng: np.random.Generator) -> None:
    slots = [KVSlot("key", 1, 16), KVSlot("value", 1, 16)]
    k, v = np.zeros((2, 1, 1, 0, 16), np.float32)
    for tokens in (4, 1, 3):
        before, q = k.shape[2], normal(rng, 1, 1, tokens, 16)
        new = normal(rng, 1, 1, tokens, 16), normal(rng, 1, 1, tokens, 16)
        y, *present = attention_24(
            q, *new, None, *slots, left_window_size=3, right_window_size=1, n_outputs=3
        )
        k = np.concatenate([k, new[0].astype(np.float16)], 2)
        v = np.concatenate([v, new[1].astype(np.float16)], 2)
        assert_close(y, oracles.attention(q, k, v, before=before, left=3, right=1))
        assert present[0].array is slots[0].array and present[0].shape == k.shape
        slots = present


@ENCODINGS
@pytest.mark.parametrize("queries", [1, 64])
def test_error_of_each_encoding(queries: int, encoding: str, rng: np.random.Generator) -> None:
    """Against attention over what was never rounded: normal keys and values of 128, 1000 keys."""
    k, v = normal(rng, 1, 2, 1000, 128), normal(rng, 1, 2, 1000, 128)
    q = normal(rng, 1, 8, queries, 128)
    slots = [KVSlot(kind, 2, 128, encoding=encoding) for kind in ("key", "value")]
    cut = 1000 - queries
    attention_23(q[:, :, :0], k[:, :, :cut], v[:, :, :cut], None, *slots, n_outputs=3)
    for slot in slots:
        slot.length = cut
    y = attention_23(q, k[:, :, cut:], v[:, :, cut:], None, *slots, is_causal=1)
    wanted = oracles.attention(q, k, v, causal=True, before=cut)
    error = np.sqrt(np.square(y - wanted).mean() / np.square(wanted).mean())
    assert error <= {"f16": 5e-4, "q8": 1.5e-2}[encoding]


# -- rows of a table ---------------------------------------------------------------------------


@ENCODINGS
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("causal", [0, 1])
def test_lowered_rows_are_replayed_at_the_next_positions(
    causal: int, threads: int, encoding: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    cache = Cached(2, 33, 40, encoding)
    cache.step(rng, 120, 3)
    q, k, v = (
        np.zeros((1, 1, 6 * 33), np.float32),
        *(np.zeros((1, 1, n), np.float32) for n in (66, 80)),
    )
    rows = lower_attention(
        q, k, v, None, cache.keys, cache.values, is_causal=causal, q_num_heads=6, kv_num_heads=2,
        n_outputs=3,
    )  # fmt: skip
    assert cache.keys.length == 120  # what is lowered has not run
    table, (y, *present) = Table([rows]), rows.outputs
    assert [p.shape[2] for p in present] == [121, 121]
    assert present[0].array is cache.keys.array and present[1].array is cache.values.array
    for offset in range(12):  # over the end of a block of keys
        for array in (q, k, v):
            array[:] = normal(rng, *array.shape)
        table.run(offset)
        cache.take_in(*(x.reshape(1, 1, 2, -1).transpose(0, 2, 1, 3) for x in (k, v)))
        wanted = oracles.attention(q.reshape(1, 6, 1, 33), cache.k, cache.v)
        assert_close(y, joined(wanted))


def test_what_rows_cannot_do_is_not_lowered(rng: np.random.Generator) -> None:
    slots, x = (KVSlot("key", 1, 16), KVSlot("value", 1, 16)), normal(rng, 1, 1, 16)
    heads = {"q_num_heads": 1, "kv_num_heads": 1}
    assert lower_attention(x, x, x, None, *slots, **heads) is not None
    for refused in (
        lower_attention(x, x, x, None, None, None, **heads),
        lower_attention(x, x, x, np.zeros((1, 1), np.float32), *slots, **heads),
        lower_attention(x.astype(np.float16), x, x, None, *slots, **heads),
        lower_attention(np.repeat(x, 2, axis=1), x, x, None, *slots, **heads),
        lower_attention(x, x, x, None, *slots, **heads, n_outputs=4),
    ):
        assert refused is None
