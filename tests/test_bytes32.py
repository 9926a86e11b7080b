"""Primitives over 32 bytes, through kernels of one call each, against NumPy's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxstream_nb.kernels import bytes32
from onnxstream_nb.kernels.gemv_vnni import quantize
from onnxstream_nb.kernels.jit import arg, kernel
from onnxstream_nb.kernels.threads import Team
from onnxstream_nb.kernels.vector import poke_f32

Array = np.ndarray[Any, Any]


@kernel
def sample_quantize(args: int, thread: int, threads: int) -> None:
    """x (K,) float32 -> (K / 32,) records."""
    quantize(arg(args, 0), arg(args, 1), arg(args, 2))


@kernel
def sample_dots(args: int, thread: int, threads: int) -> None:
    """Weights (32,) bytes by every way of loading, a record -> (5,) float32 sums."""
    p, high, record, out = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    q = bytes32.load_bytes(p)
    poke_f32(out, bytes32.sum8(bytes32.dot32(bytes32.unsigned(q), record)))
    poke_f32(out + 4, bytes32.sum8(bytes32.dot32(bytes32.load_split(p), record)))
    low = bytes32.nibbles(q, 4)
    poke_f32(out + 8, bytes32.sum8(bytes32.dot32(low, record)))
    h = bytes32.load_bytes(high)
    poke_f32(out + 12, bytes32.sum8(bytes32.dot32(bytes32.with_bit(low, h, 5), record)))
    poke_f32(out + 16, bytes32.sum8(bytes32.dot32(bytes32.with_two_bits(low, h, 4), record)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def records(x: Array) -> Array:
    out = np.zeros((len(x) // 32, bytes32.RECORD), np.uint8)
    Team(1).run([(sample_quantize, x.ctypes.data, len(x), out.ctypes.data)])
    return out


def integers(record: Array) -> Array:
    parts = record[:64].view(np.int8).astype(np.int64).reshape(2, 32)
    return 128 * parts[0] + parts[1]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_activations_keep_fifteen_bits_of_their_groups_largest(size: float, rng: Any) -> None:
    x = (rng.standard_normal(320) * size).astype(np.float32)
    x[32:64] *= 1e-3  # each group has a scale of its own
    for group, record in zip(x.reshape(-1, 32), records(x), strict=True):
        scale, total, first, last = record[64:80].view(np.float32)
        whole = integers(record)
        assert np.abs(whole).max() == bytes32.LIMIT
        step = np.abs(group).max() / bytes32.LIMIT
        assert np.abs(whole * np.float64(step) - group).max() <= 0.501 * step
        np.testing.assert_allclose(scale, step, rtol=1e-6)
        sums = np.array([whole.sum(), whole[:16].sum(), whole[16:].sum()]) * np.float64(step)
        slack = 1e-5 * np.abs(group).sum()
        np.testing.assert_allclose([total, first, last], sums, rtol=0, atol=slack)


def test_a_group_of_zeros_is_a_record_of_zeros() -> None:
    assert not records(np.zeros(64, np.float32)).any()


def test_products_are_exact_integers(rng: Any) -> None:
    for _ in range(20):
        x = rng.standard_normal(32).astype(np.float32)
        record = records(x)
        p, h = (rng.integers(0, 256, 32, dtype=np.uint8) for _ in range(2))
        out = np.zeros(5, np.float32)
        where = (p.ctypes.data, h.ctypes.data, record.ctypes.data, out.ctypes.data)
        Team(1).run([(sample_dots, *where)])
        whole = integers(record[0])
        split = np.concatenate([p[:16] & 15, p[:16] >> 4])
        low = p >> 4
        ways = (p ^ 128, split, low, low | (h >> 5 & 1) << 4, low | (h >> 4 & 3) << 4)
        for got, q in zip(out, ways, strict=True):
            lanes = (whole * q.astype(np.int64)).reshape(8, 4).sum(axis=1)
            wanted = lanes.astype(np.float32).sum(dtype=np.float64)
            assert abs(got - wanted) <= 2e-6 * np.abs(lanes).sum() + 1e-6
