"""Kernels of products in bfloat16 against ml_dtypes' rounding and float64 sums.

With NUMBA_DISABLE_JIT=1 these test the NumPy twins, on any processor and in fewer sizes.
"""

from __future__ import annotations

from itertools import product as product_of
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bf16_oracles import SMALLEST, assert_rounded, assert_split
from kernel_oracles import as_weight
from numba import njit

from onnxstream_nb.kernels import gemm_bf16, tile_bf16
from onnxstream_nb.kernels.simd import JIT
from onnxstream_nb.kernels.threads import team_of
from onnxstream_nb.kernels.vector import load_f32, store_f32
from onnxstream_nb.registry import kernels

Array = np.ndarray[Any, Any]

KINDS = ("bf16", "split")
KERNELS = [
    (kind, order, encoding)
    for kind in KINDS
    for order in ("rows", "columns")
    for encoding in ("float32", "float16", "bfloat16")
]
MS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 64, 70) if JIT else (9, 33)
NS = (1, 15, 16, 17, 31, 32, 33, 67) if JIT else (1, 33)
KS = (1, 2, 31, 32, 33, 255, 256, 257, 515) if JIT else (33, 257)
THREADS = (1, 2, 5) if JIT else (2,)

GUARD = 0xC1
OVERFLOW = np.array([0x7F7F8000], np.uint32).view(np.float32)[0]
"""Halfway from the largest bfloat16 to 2 ** 128: from here on, rounding gives infinity."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def guarded(nbytes: int, fill: int = 0xFF) -> Array:
    """Room for `nbytes`, full of NaN, and 256 bytes behind it that nobody may write."""
    memory = np.full(nbytes + 256, fill, np.uint8)
    memory[nbytes:] = GUARD
    return memory


def before_nan(values: Array) -> Array:
    """The same values with NaN behind them, which shows wherever it is multiplied."""
    memory = np.concatenate([values.ravel(), np.full(64, np.nan, values.dtype)])
    return memory[: values.size].reshape(values.shape)


def weight_of(values: Array, order: str, encoding: str) -> Any:
    """Values (K, N) that the encoding holds exactly, as a native weight."""
    stored = values.T if order == "rows" else values
    raw = stored.astype(ml_dtypes.bfloat16 if encoding == "bfloat16" else encoding)
    raw = before_nan(np.ascontiguousarray(raw))
    assert np.array_equal(raw.astype(np.float32), stored, equal_nan=True)
    bits = raw.view(np.uint16) if encoding == "bfloat16" else raw
    return as_weight(encoding, bits, values.shape, order == "rows")


def product(kind: str, x: Array, weight: Any, threads: int = 1) -> Array:
    """x (M, K) times a weight (K, N), by the kernels themselves, in no more room than they ask."""
    (m, k), n, team = x.shape, weight.shape[1], team_of(threads)
    size = (2 if kind == "split" else 1) * gemm_bf16.packed_bytes(m, k)
    each = gemm_bf16.scratch_bytes(m)
    packed, scratch = guarded(size), guarded(each * team.shares)
    out = np.full((m + 1, n + 3), np.pi, np.float32)
    row = 4 * (n + 3)
    pack = kernels()[f"gemm_{kind}_pack"]
    gemm = kernels()[f"gemm_{kind}_{weight.order}_{weight.encoding}"]
    source = pack, x.ctypes.data, 4 * k, packed.ctypes.data, m, k
    where = weight.address, weight.row_bytes, packed.ctypes.data, out.ctypes.data, row
    with np.errstate(invalid="ignore", over="ignore"):  # uncompiled kernels compute in NumPy
        team.run([source, (gemm, *where, m, n, k, 0, scratch.ctypes.data, each)])
    assert (packed[size:] == GUARD).all() and (scratch[each * team.shares :] == GUARD).all()
    assert (out[m:] == np.float32(np.pi)).all() and (out[:, n:] == np.float32(np.pi)).all()
    return out[:m, :n]


BOUNDS = {"bf16": assert_rounded, "split": assert_split}


def whole(rng: Any, largest: int, *shape: int) -> Array:
    return rng.integers(-largest, largest + 1, shape).astype(np.float32)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "order", "encoding"), KERNELS)
def test_whole_numbers_are_exact(kind: str, order: str, encoding: str, rng: Any) -> None:
    """Every sum stays below 2 ** 24. Numbers above 255 take both parts."""
    most = {"float32": 4095, "float16": 2047, "bfloat16": 255}[encoding]
    ways = [(63, 255)] if kind == "bf16" else [(7, most), (4095, 7)]
    for i, k in enumerate(KS):
        largest_x, largest_w = ways[i % len(ways)]
        x = before_nan(whole(rng, largest_x, max(MS), k))
        for n in NS:
            w = whole(rng, largest_w, k, n)
            wanted, weight = x.astype(np.float64) @ w, weight_of(w, order, encoding)
            for threads, m in product_of(THREADS, MS):
                y = product(kind, before_nan(x[:m]), weight, threads)
                assert np.array_equal(y, wanted[:m]), (m, k, n, threads)


@pytest.mark.parametrize(("kind", "order", "encoding"), KERNELS)
def test_error(kind: str, order: str, encoding: str, rng: Any) -> None:
    for m, k, n in ((1, 1, 1), (16, 1, 16), (5, 2, 7), (17, 33, 31), (3, 257, 35), (19, 515, 5)):
        for spread in (0, 30) if encoding != "float16" else (0, 3):
            x = rng.standard_normal((m, k)) * 2.0 ** rng.uniform(-spread, spread, (m, k))
            w = rng.standard_normal((k, n)) * 2.0 ** rng.uniform(-spread, spread, (k, n))
            x = before_nan(x.astype(np.float32))
            w = w.astype(ml_dtypes.bfloat16 if encoding == "bfloat16" else encoding)
            w = w.astype(np.float32)
            y = product(kind, x, weight_of(w, order, encoding), 2)
            BOUNDS[kind](y, x, w)


def test_what_two_parts_leave_out() -> None:
    """The worst: 1 + 2 ** -8 less 1.5 units of the second part's last place."""
    worst = np.float32(1 + 2.0**-8 - 1.5 * 2.0**-16)
    x, w = np.full((2, 1), worst), np.full((1, 3), worst)
    y = product("split", x, weight_of(w, "rows", "float32"))
    error = np.abs(y / np.float64(worst) ** 2 - 1)
    assert (error > 1.9 * 2.0**-16).all() and (error < 2.0**-15).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_where_it_belongs(
    bad: float, order: str, kind: str, rng: Any
) -> None:
    x = rng.standard_normal((18, 67)).astype(np.float32)
    w = rng.standard_normal((67, 35)).astype(np.float32)
    clean = product(kind, x, weight_of(w, order, "float32"))
    for row, at, column in ((0, 0, 0), (15, 31, 31), (16, 32, 32), (17, 66, 34)):
        other = w.copy()
        other[at, column] = bad
        y = product(kind, x, weight_of(other, order, "float32"))
        assert np.array_equal(np.delete(y, column, 1), np.delete(clean, column, 1))
        assert not np.isfinite(y[:, column]).any()
        if kind == "bf16":  # infinity times the other factor's second part may be no number
            assert np.array_equal(y[:, column], np.sign(x[:, at]) * bad, equal_nan=True)
        other = x.copy()
        other[row, at] = bad
        y = product(kind, other, weight_of(w, order, "float32"))
        assert np.array_equal(np.delete(y, row, 0), np.delete(clean, row, 0))
        assert not np.isfinite(y[row]).any()
        if kind == "bf16":
            assert np.array_equal(y[row], np.sign(w[at]) * bad, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_and_tiny_numbers(kind: str, rng: Any) -> None:
    below = np.nextafter(OVERFLOW, np.float32(0))
    sizes = [1e-45, 1e-41, 1.1e-38, 1.2e-38, 3e-38, 1e-36, 1e-30, 1e-20, 1e-3, 1.0, 1e18]
    x = np.array([[s, -s / 3] for s in [*sizes, 1e37, below / 2]], np.float32)
    w = np.array([[1, 1e-3, 1e-19, 1e-37, 1e-40, 0], [-1, 1e-3, 1e-19, 3e-38, 0, 0]], np.float32)
    for order in ("rows", "columns"):
        y = product(kind, x, weight_of(w, order, "float32"))
        BOUNDS[kind](y, x, w)
        assert not y[:, -1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_overflow(kind: str) -> None:
    below = np.nextafter(OVERFLOW, np.float32(0))
    x = np.array([[below], [OVERFLOW], [np.finfo(np.float32).max], [-OVERFLOW], [1e30]], np.float32)
    y = product(kind, x, weight_of(np.array([[1, 1e9]], np.float32), "rows", "float32"))
    assert np.isfinite(y[[0, 4], [0, 0]]).all()
    if kind == "split":  # infinity times the other factor's second part, 0, is no number
        assert not np.isfinite(y[1:4]).any()
    else:
        assert y[1:4, 0].tolist() == [np.inf, np.inf, -np.inf]
    assert np.isposinf(y[[0, 4], 1]).all()


# -- primitives


@njit
def sample_roundings(x: int, out: int, count: int) -> None:
    """x (count, 32) float32 -> out: 32 bfloat16, 16 pairs, (32,) rests; 256 bytes each."""
    for i in range(count):
        p, q = x + 128 * i, out + 256 * i
        low, high = load_f32(p), load_f32(p + 64)
        tile_bf16.store_bf16(q, low, high)
        tile_bf16.store_bf16_pairs(q + 64, low, high)
        store_f32(q + 128, tile_bf16.rest_bf16(low))
        store_f32(q + 192, tile_bf16.rest_bf16(high))


def test_rounding_of_every_upper_half() -> None:
    """All signs, exponents, infinities and NaN, just beside, on and between bfloat16's numbers."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    upper = np.arange(0, 2**16, 1 if JIT else 7, dtype=np.uint32)
    bits = np.resize((upper[:, None] << 16 | lower).ravel(), (len(upper) * 6 // 32 + 1) * 32)
    x, count = bits.view(np.float32), len(bits) // 32
    out = np.zeros((count, 256), np.uint8)
    sample_roundings(x.ctypes.data, out.ctypes.data, count)
    got = out[:, :64].view(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        if JIT and tile_bf16.NATIVE:  # which takes what is below the normal numbers for 0
            wanted = np.where(np.abs(x) < SMALLEST, bits >> 16 & 0x8000, wanted)
        wanted = np.where(np.isnan(x), bits >> 16 | 0x40, wanted).astype(np.uint16)
        assert np.array_equal(got.ravel(), wanted)
        pairs = out[:, 64:128].view(np.uint16).reshape(count, 16, 2).swapaxes(1, 2)
        assert np.array_equal(pairs.reshape(count, 32), got)
        values = (wanted.astype(np.uint32) << 16).view(np.float32)
        rests = np.where(np.isfinite(values), x - values, 0)
    assert np.array_equal(out[:, 128:].view(np.float32).ravel(), rests)


@njit
def sample_tile(x: int, pairs: int, out: int, k: int) -> None:
    tile_bf16.tile8(x, pairs, out, k)


@njit
def sample_tiles(x: int, apart: int, pairs: int, out: int, k: int) -> None:
    """Panels 0 and 1, then panel 2 behind them."""
    tile_bf16.tiles_begin()
    tile_bf16.tiles_two(x, apart, pairs, out, k)
    tile_bf16.tiles_one(x + 2 * apart, apart, pairs, out + 2 * 128 * tile_bf16.PANEL, k)
    tile_bf16.tiles_end()


def tile_operands(rng: Any, panels: int, k: int, gap: int) -> tuple[Array, Array, Array, Array]:
    """Panels of A, `gap` blocks of NaN behind each; pairs of B; C; and C + A B."""
    a, b = whole(rng, 63, panels, 16, k), whole(rng, 255, k, 32)
    c = whole(rng, 9, 16 * panels, 32)
    left = np.full((panels, k // 32 + gap, 16, 32), np.nan, ml_dtypes.bfloat16)
    left[:, : k // 32] = a.reshape(panels, 16, k // 32, 32).swapaxes(1, 2)
    right = b.reshape(k // 2, 2, 32).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
    return left, np.ascontiguousarray(right), c, c + a.reshape(-1, k) @ b


@pytest.mark.parametrize("k", [32, 64, 256])
def test_tile_of_eight_rows(k: int, rng: Any) -> None:
    left, right, c, wanted = tile_operands(rng, 1, k, 0)
    for first in (0, 8):
        out = c.copy()
        where = left.ctypes.data + 64 * first, right.ctypes.data, out.ctypes.data + 128 * first
        sample_tile(*where, k)
        assert np.array_equal(out[first : first + 8], wanted[first : first + 8])
        assert np.array_equal(np.delete(out, slice(first, first + 8), 0), c[8 - first :][:8])


@pytest.mark.skipif(JIT and not tile_bf16.AMX, reason="this processor has no tiles")
@pytest.mark.parametrize("k", [32, 64, 256])
def test_tiles_of_sixteen_rows(k: int, rng: Any) -> None:
    for gap in (0, 3):
        left, right, c, wanted = tile_operands(rng, 3, k, gap)
        apart = tile_bf16.BLOCK_BYTES * (k // 32 + gap)
        sample_tiles(left.ctypes.data, apart, right.ctypes.data, c.ctypes.data, k)
        assert np.array_equal(c, wanted)


@pytest.mark.skipif(JIT, reason="which tiles a kernel runs is compiled into it")
@pytest.mark.parametrize("amx", [False, True])
def test_rows_of_panels_through_either_tile(
    amx: bool, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_bf16, "AMX", amx)
    x, w = whole(rng, 63, 70, 33), whole(rng, 255, 33, 5)
    weight = weight_of(w, "rows", "float32")
    for m in range(1, 71, 1 if amx else 5):
        assert np.array_equal(product("bf16", x[:m], weight), x[:m] @ w), m
