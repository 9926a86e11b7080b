"""Primitives over quads, through kernels of one call each, against NumPy's integers.

The tests of other targets and of uncompiled kernels run this file again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from panel_oracles import records_of

from onnxstream_nb.kernels import quads, six_bits
from onnxstream_nb.kernels.jit import arg, kernel
from onnxstream_nb.kernels.panel_products import LEAST, quantize
from onnxstream_nb.kernels.threads import Team
from onnxstream_nb.kernels.vector import store_f32

Array = np.ndarray[Any, Any]
GUARD = 0x5C


@kernel
def sample_records(args: int, thread: int, threads: int) -> None:
    """args: x, K, records, bytes between them."""
    quantize(arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3))


@kernel
def sample_dots(args: int, thread: int, threads: int) -> None:
    """args: quads (512,) bytes, a record, an int32, out (3, 16): whole, first half, last half."""
    q, record = quads.load_quads(arg(args, 0)), arg(args, 1)
    start, out = arg(args, 2), arg(args, 3)
    store_f32(out, quads.dot(q, record, start))
    store_f32(out + 64, quads.dot_first(q, record, start))
    store_f32(out + 128, quads.dot_last(q, record, start))


@kernel
def sample_loads(args: int, thread: int, threads: int) -> None:
    """args: 512 bytes twice, a record, a zero, two shifts, out (6, 16): every way of loading."""
    p, high, record, zero = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    bit, bits, out = arg(args, 4), arg(args, 5), arg(args, 6)
    store_f32(out, quads.dot(quads.load_quads(p), record, zero))
    store_f32(out + 64, quads.dot(quads.load_split_quads(p), record, zero))
    low, more = quads.lower_nibbles(quads.load_quads(p)), quads.load_quads(high)
    store_f32(out + 128, quads.dot(low, record, zero))
    store_f32(out + 192, quads.dot(quads.upper_nibbles(quads.load_quads(p)), record, zero))
    store_f32(out + 256, quads.dot(quads.with_bit(low, more, bit), record, zero))
    store_f32(out + 320, quads.dot(quads.with_two_bits(low, more, bits), record, zero))


@kernel
def sample_six_bits(args: int, thread: int, threads: int) -> None:
    """args: 48 bytes, out (4, 16)."""
    p, out = arg(args, 0), arg(args, 1)
    store_f32(out, six_bits.six_bits_0(p))
    store_f32(out + 64, six_bits.six_bits_1(p))
    store_f32(out + 128, six_bits.six_bits_2(p))
    store_f32(out + 192, six_bits.six_bits_3(p))


@kernel
def sample_words(args: int, thread: int, threads: int) -> None:
    """args: p, out: what is read at p, written behind one another at 16 bytes."""
    p, out = arg(args, 0), arg(args, 1)
    quads.poke_i32(out, quads.peek_i32(p))
    quads.poke_i32(out + 4, quads.peek_i32(p) ^ 0x80808080)
    quads.poke_u16(out + 8, quads.peek_u16(p))
    quads.poke_u8(out + 10, quads.peek_i32(p))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def records(x: Array, step: int = quads.RECORD) -> Array:
    """x (K,) -> (K / 32, RECORD) bytes; what lies between them stays as it was."""
    out = np.full((len(x) // 32 + 1, step), GUARD, np.uint8)
    Team(1).run([(sample_records, x.ctypes.data, len(x), out.ctypes.data, step)])
    used = 92  # the last four bytes are nobody's
    assert (out[:, used:] == GUARD).all() and (out[-1] == GUARD).all()
    return out[:-1, : quads.RECORD]


def fields(record: Array) -> tuple[float, float, list[int]]:
    """Scale, scale times the sum, and the five starts of a sum."""
    scale, total = record[64:72].view(np.float32)
    return float(scale), float(total), record[72:92].view(np.int32).tolist()


@pytest.mark.parametrize("size", [1e-28, 1e-3, 1.0, 1e4, 1e36])
@pytest.mark.parametrize("step", [quads.RECORD, 5 * quads.RECORD])
def test_activations_keep_fifteen_bits_of_their_groups_largest(
    size: float, step: int, rng: Any
) -> None:
    x = (rng.standard_normal(320) * size).astype(np.float32)
    x[32:64] *= 1e-1  # each group has a scale of its own
    for group, record in zip(x.reshape(-1, 32), records(x, step), strict=True):
        scale, total, starts = fields(record)
        whole = records_of(record)
        assert np.abs(whole).max() == quads.LIMIT
        unit = np.abs(group).max().astype(np.float64) / quads.LIMIT
        assert scale == np.float32(unit)
        assert np.abs(whole * unit - group).max() <= 0.502 * unit
        inverse = np.float32(quads.LIMIT) / np.abs(group).max()
        assert np.array_equal(whole, np.rint(group * inverse))
        np.testing.assert_allclose(total, unit * whole.sum(), rtol=3e-7, atol=0)
        first, last = int(whole[:16].sum()), int(whole[16:].sum())
        every = first + last
        assert starts == [-8 * every, -128 * every, -32 * first, -32 * last, 0]


def test_the_largest_of_either_sign_are_whole(rng: Any) -> None:
    for values in ((1.0, -1.0), (-1.0, -0.0), (3.4e38, -3.4e38), (0.1, 0.1), (-7e-3, -7e-3)):
        x = np.resize(np.array(values, np.float32), 32)
        whole = records_of(records(x)[0])
        wanted = np.rint(x.astype(np.float64) / np.abs(x).max() * quads.LIMIT)
        assert np.array_equal(whole, wanted), values


def test_halves_are_rounded_to_even() -> None:
    x = np.arange(32, dtype=np.float32) - 15.5
    x[0] = quads.LIMIT  # one is one unit
    assert np.array_equal(records_of(records(x)[0]), np.rint(x))


def test_a_group_of_zeros_is_a_record_of_zeros() -> None:
    for zero in (0.0, -0.0):
        assert not records(np.full(64, zero, np.float32))[:, :92].any()


@pytest.mark.parametrize("size", [LEAST, 1e-33, 4e-35, 1e-36, 1e-38, 1e-41, 1.5e-45])
def test_a_group_too_small_for_a_scale_counts_as_zeros(size: float, rng: Any) -> None:
    """Below 4.8e-35 one over the scale is no float32."""
    x = np.concatenate([rng.uniform(-1, 1, 32) * size, np.full(32, 2e-30)]).astype(np.float32)
    x[5], x[6] = size, 0.0
    record, next_one = records(x)
    _, total, starts = fields(record)
    assert not records_of(record).any() and total == 0 and starts == [0] * 5
    assert (records_of(next_one) == quads.LIMIT).all()


def test_what_is_not_finite_makes_the_scale_a_nan(rng: Any) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 15, 16, 31):
            x = rng.standard_normal(96).astype(np.float32)
            x[32 + at] = bad
            with np.errstate(invalid="ignore"):  # uncompiled kernels compute in NumPy
                scales = [fields(record)[:2] for record in records(x)]
            assert np.isnan(scales[1]).all() and np.isfinite([scales[0], scales[2]]).all()


def in_quads(values: Array) -> Array:
    """(512,) bytes in quads -> (16 rows, 32 elements)."""
    return values.reshape(8, 16, 4).swapaxes(0, 1).reshape(16, 32).astype(np.int64)


def extreme_records(rng: Any) -> list[Array]:
    """Records of random integers, and of the largest there are."""
    found = [records(rng.standard_normal(32).astype(np.float32))[0] for _ in range(8)]
    for values in (np.ones(32), -np.ones(32), np.resize([1.0, -1.0], 32)):
        found.append(records(values.astype(np.float32))[0])
    return found


def test_products_are_exact_integers(rng: Any) -> None:
    weights = [rng.integers(0, 256, 512, dtype=np.uint8) for _ in range(4)]
    weights += [np.full(512, 255, np.uint8), np.zeros(512, np.uint8)]
    for record in extreme_records(rng):
        whole = records_of(record)
        for q in weights:
            start = rng.integers(-(2**27), 2**27, 1, dtype=np.int32)
            out = np.zeros((3, 16), np.float32)
            where = (a.ctypes.data for a in (q, record, start, out))
            Team(1).run([(sample_dots, *where)])
            terms = in_quads(q) * whole
            parts = (terms, terms[:, :16], terms[:, 16:])
            for got, part in zip(out, parts, strict=True):
                exact = part.sum(axis=1) + int(start[0])
                assert np.array_equal(got, exact.astype(np.float32))


def test_every_way_of_loading(rng: Any) -> None:
    zero = np.zeros(1, np.int32)
    for record in extreme_records(rng):
        p, high = (rng.integers(0, 256, 512, dtype=np.uint8) for _ in range(2))
        whole = records_of(record)
        for bit in range(8):
            bits = bit & 6
            out = np.zeros((6, 16), np.float32)
            where = [a.ctypes.data for a in (p, high, record, zero)]
            Team(1).run([(sample_loads, *where, bit, bits, out.ctypes.data)])
            split = np.concatenate([p[:256] & 15, p[:256] >> 4])
            low = p & 15
            raised = low | (high >> bit & 1) << 4, low | (high >> bits & 3) << 4
            ways = (p, split, low, p >> 4, *raised)
            for got, q in zip(out, ways, strict=True):
                assert np.array_equal(got, (in_quads(q) * whole).sum(axis=1, dtype=np.int64))


def test_four_numbers_of_six_bits(rng: Any) -> None:
    """Of words w and bytes b: bits 0 to 5 of w, 6 to 11, 0 to 5 of b, and above the upper four of
    w the upper two of b."""
    for _ in range(20):
        p = rng.integers(0, 256, 48, dtype=np.uint8)
        out = np.zeros((4, 16), np.float32)
        Team(1).run([(sample_six_bits, p.ctypes.data, out.ctypes.data)])
        for row in range(16):
            whole = int(p[2 * row]) + 256 * int(p[2 * row + 1])
            byte = int(p[32 + row])
            wanted = [whole % 64, whole // 64 % 64, byte % 64, whole // 4096 + byte // 64 * 16]
            assert out[:, row].tolist() == wanted


def test_words_keep_their_bits(rng: Any) -> None:
    for word in [*rng.integers(0, 256, (20, 4), dtype=np.uint8), np.full(4, 255, np.uint8)]:
        out = np.full(16, GUARD, np.uint8)
        Team(1).run([(sample_words, word.ctypes.data, out.ctypes.data)])
        wanted = [*word, *(word ^ 0x80), *word[:2], word[0], *[GUARD] * 5]
        assert out.tolist() == wanted
