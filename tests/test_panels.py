"""Weights in panels: packing loses no byte, and products are those of the dequantised weights.

The kernels run on every host; where they pay (quads.SUPPORTED) is another question.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_oracles import BLOCKED, assert_product, normal, random_blocks
from panel_oracles import (
    Dense,
    assert_integer_product,
    packed,
    packed_weight,
    random_packed,
    row_bytes,
    unpacked,
)  # fmt: skip

from onnxstream_nb.graph import ENCODINGS
from onnxstream_nb.kernels.matmul import calls, lower_matmul, matmul
from onnxstream_nb.kernels.panel_products import block_rows
from onnxstream_nb.kernels.panels import TOKENS
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.registry import kernels
from onnxstream_nb.weights import Weight

Array = np.ndarray[Any, Any]
NS = (1, 5, 15, 16, 17, 33, 67)
MS = (1, 2, 3, 64, 65, 67, 130)
THREADS = (1, 2, 5)
LONG_K = 2048
"""So long that 130 rows of activations are more than one block (block_rows)."""

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def lengths(encoding: str) -> tuple[int, ...]:
    return (256, 512, 768) if "_k" in encoding else (32, 64, 96, 256, 288)


# -- packing -------------------------------------------------------------------------------------


def test_every_block_encoding_has_panels() -> None:
    assert set(TOKENS) == set(BLOCKED)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_panels_hold_every_byte_of_the_rows(encoding: str, threads: int, rng: Any) -> None:
    for k in lengths(encoding):
        for n in NS:
            raw = rng.integers(0, 256, (n, row_bytes(encoding, k)), dtype=np.uint8)
            found = unpacked(encoding, packed(encoding, raw, k, threads))
            assert len(found) == -(-n // 16) * 16
            assert np.array_equal(found[:n, : raw.shape[1]], raw)


@pytest.mark.parametrize("encoding", BLOCKED)
def test_what_no_row_fills_stays_zero(encoding: str, rng: Any) -> None:
    nothing = unpacked(encoding, np.zeros((1, 16 * ENCODINGS[encoding].nbytes), np.uint8))
    for k in lengths(encoding):
        raw = rng.integers(0, 256, (19, row_bytes(encoding, k)), dtype=np.uint8)
        found = unpacked(encoding, packed(encoding, raw, k))
        blank = np.tile(nothing[0], found.shape[1] // nothing.shape[1])
        assert (found[19:] == blank).all()


@pytest.mark.parametrize("encoding", BLOCKED)
def test_panels_are_no_larger_than_their_blocks(encoding: str) -> None:
    for k in (*lengths(encoding), 10 * ENCODINGS[encoding].block):
        assert TOKENS[encoding].panel_bytes(k) == 16 * row_bytes(encoding, k)


@pytest.mark.parametrize("encoding", ["q4_k", "q5_k"])
def test_every_scale_and_minimum_of_six_bits(encoding: str, rng: Any) -> None:
    """Each of a block's sixteen takes all of its 64 values, in panels as in products."""
    n, k = 128, 512
    each = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1) % 64
    numbers = rng.permuted(np.broadcast_to(each, (n, 2, 2, 8)), axis=0)
    assert all(len(np.unique(column)) == 64 for column in numbers.reshape(n, -1).T)
    scales, minima = numbers[:, :, 0], numbers[:, :, 1]
    raw = random_blocks(encoding, n, k, rng)
    head = raw.reshape(n, 2, -1)[..., 4:16]
    head[..., :4] = scales[..., :4] | scales[..., 4:] >> 4 << 6
    head[..., 4:8] = minima[..., :4] | minima[..., 4:] >> 4 << 6
    head[..., 8:] = scales[..., 4:] & 15 | minima[..., 4:] << 4
    assert np.array_equal(unpacked(encoding, packed(encoding, raw, k)), raw)
    weight, dense = packed_weight(encoding, raw, k), Dense.of(encoding, raw)
    for m in (1, 3):
        check(normal(rng, m, k), weight, dense)
    for group in range(k // 32):  # alone, so that no other hides it
        x = np.zeros((1, k), np.float32)
        x[:, 32 * group : 32 * group + 32] = normal(rng, 1, 32)
        check(x, weight, dense)


@pytest.mark.parametrize("encoding", BLOCKED)
def test_sources_may_lie_anywhere(encoding: str, rng: Any) -> None:
    k = lengths(encoding)[1]
    memory = rng.integers(0, 256, 17 * row_bytes(encoding, k) + 3, dtype=np.uint8)
    raw = memory[3:].reshape(17, -1)
    assert raw.ctypes.data % 2
    assert np.array_equal(unpacked(encoding, packed(encoding, raw, k))[:17], raw)


# -- products ------------------------------------------------------------------------------------


def check(x: Array, weight: Weight, dense: Dense) -> None:
    """Against the dequantised weights, and far closer against what the rounded X makes of them."""
    y = matmul(x, weight)
    assert y.dtype == np.float32
    assert_product(y, x, dense.values.T, packed=True)
    assert_integer_product(y, x, dense)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_products_of_every_size(encoding: str, threads: int, rng: Any) -> None:
    set_threads(threads)
    for k in lengths(encoding):
        x = normal(rng, max(MS), k)
        for n in NS:
            weight, dense = random_packed(encoding, k, n, rng)
            for m in MS:
                check(x[:m], weight, dense)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_more_rows_than_a_block_holds(encoding: str, threads: int, rng: Any) -> None:
    set_threads(threads)
    assert block_rows(130, LONG_K) == 65 and block_rows(130, 9728) < 14
    for k, n, rows in ((LONG_K, 33, (64, 65, 66, 130, 131)), (9728, 17, (14, 67))):
        weight, dense = random_packed(encoding, k, n, rng)
        x = normal(rng, max(rows), k)
        for m in rows:
            check(x[:m], weight, dense)


def test_a_block_is_never_empty() -> None:
    assert block_rows(1, 32) == block_rows(1, 10**8) == block_rows(7, 10**8) == 1
    assert block_rows(7, 32) == 7


@pytest.mark.parametrize("encoding", BLOCKED)
def test_rows_do_not_depend_on_what_they_are_multiplied_with(encoding: str, rng: Any) -> None:
    """Bit by bit: one row by the product of one, of a block, of the next block, by any threads."""
    weight, _ = random_packed(encoding, LONG_K, 67, rng)
    x = normal(rng, 131, LONG_K)
    alone = np.concatenate([matmul(row[None], weight) for row in x])
    for threads in THREADS:
        set_threads(threads)
        assert np.array_equal(matmul(x, weight), alone)
        assert np.array_equal(matmul(x[66:67], weight)[0], alone[66])


@pytest.mark.parametrize("encoding", BLOCKED)
def test_a_lowered_product_is_the_same(encoding: str, rng: Any) -> None:
    weight, dense = random_packed(encoding, 512, 37, rng)
    x = normal(rng, 1, 1, 512)
    rows = lower_matmul(x, weight)
    assert rows is not None
    for _ in range(2):
        x[:] = normal(rng, 1, 1, 512)
        y = rows.run()
        assert np.array_equal(y, matmul(x, weight))
        assert_integer_product(y[0], x[0], dense)


def test_nothing_is_written_beside_the_outputs(rng: Any) -> None:
    for n in (1, 15, 16, 17, 33):
        weight, _ = random_packed("q4_0", 64, n, rng)
        for m in (1, 3):
            x, out = normal(rng, m, 64), np.full((m + 2, n), 1234.5, np.float32)
            calls(x, weight, out[1:-1]).run()
            assert (out[[0, -1]] == 1234.5).all()
            assert np.array_equal(out[1:-1], matmul(x, weight))


@pytest.mark.parametrize("encoding", BLOCKED)
def test_leading_axes_layouts_and_types(encoding: str, rng: Any) -> None:
    weight, known = random_packed(encoding, 256, 21, rng)
    dense = known.values.T
    for shape in ((256,), (2, 3, 256), (1, 1, 256), (0, 256), (2, 0, 256)):
        x = normal(rng, *shape)
        assert_product(matmul(x, weight), x, dense, packed=True)
    x = normal(rng, 256, 14)
    for view in (x.T, x.T[::2], x.T[::-1], np.broadcast_to(x.T[:1], (5, 256)), x[:, 3]):
        assert_product(matmul(view, weight), view, dense, packed=True)
    short = normal(rng, 3, 256).astype(np.float16)
    y = matmul(short, weight)
    assert y.dtype == np.float16
    assert np.array_equal(y, matmul(short.astype(np.float32), weight).astype(np.float16))


# -- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_groups_of_zeros(encoding: str, m: int, rng: Any) -> None:
    k = 512
    weight, dense = random_packed(encoding, k, 33, rng)
    assert not matmul(np.zeros((m, k), np.float32), weight).any()
    assert not matmul(np.full((m, k), -0.0, np.float32), weight).any()
    x = normal(rng, m, k)
    x[:, 32:96] = 0
    x[:, -32:] = -0.0
    check(x, weight, dense)
    lone = np.zeros((m, k), np.float32)
    lone[:, 77] = 1  # one weight of each row, to float32's rounding
    assert_integer_product(matmul(lone, weight), lone, dense)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_powers_of_two_scale_products_exactly(encoding: str, m: int, rng: Any) -> None:
    """As long as nothing leaves float32's range: from 1e-27 to 1e33, with weights around one."""
    k = 512
    raw = random_blocks(encoding, 33, k, rng, rng.uniform(0.01, 0.1, (33, 1, 2)))
    weight = packed_weight(encoding, raw, k)
    x = normal(rng, m, k)
    y = matmul(x, weight)
    for power in (-90, -40, 40, 108):
        assert np.array_equal(matmul(np.ldexp(x, power), weight), np.ldexp(y, power)), power


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_groups_of_very_different_sizes(encoding: str, m: int, rng: Any) -> None:
    """A scale for each group: a huge one beside it costs a group none of its bits."""
    k = 1024
    weight, dense = random_packed(encoding, k, 33, rng)
    sizes = np.repeat(10.0 ** rng.uniform(-30, 30, k // 32), 32)
    check((normal(rng, m, k) * sizes).astype(np.float32), weight, dense)
    for size in (1e-42, 1e-36, 1e-34, 1e-30):
        tiny = (normal(rng, m, k) * size).astype(np.float32)
        terms = np.abs(tiny).astype(np.float64).max() * dense.terms.sum(axis=1)
        assert (np.abs(matmul(tiny, weight)) <= 1.1 * terms + 1e-43).all(), size


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_activations_that_are_not_finite_reach_their_row(
    encoding: str, bad: float, m: int, rng: Any
) -> None:
    weight, _ = random_packed(encoding, 512, 33, rng)
    x = normal(rng, m, 512)
    whole = matmul(x, weight)
    for at in (0, 15, 16, 31, 32, 511):
        broken = x.copy()
        broken[m // 2, at] = bad
        y = matmul(broken, weight)
        assert not np.isfinite(y[m // 2]).any()
        others = np.arange(m) != m // 2
        assert np.array_equal(y[others], whole[others])
    # The same beside weights of nothing: 0 times what is not finite is not a number.
    nothing = packed_weight(encoding, np.zeros((33, row_bytes(encoding, 512)), np.uint8), 512)
    assert np.isnan(matmul(broken, nothing)[m // 2]).all()


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_a_weight_that_is_not_finite_reaches_its_column(
    encoding: str, bad: float, m: int, rng: Any
) -> None:
    k, nbytes = 512, ENCODINGS[encoding].nbytes
    raw = random_blocks(encoding, 35, k, rng)
    x = normal(rng, m, k)
    whole = matmul(x, packed_weight(encoding, raw, k))
    where = -2 if encoding == "q6_k" else 0
    for column in (0, 16, 34):
        broken = raw.reshape(35, -1, nbytes).copy()
        broken[column, 1, where : where + 2 or None] = np.array([bad], np.float16).view(np.uint8)
        y = matmul(x, packed_weight(encoding, broken.reshape(35, -1), k))
        assert not np.isfinite(y[:, column]).any()
        others = np.arange(35) != column
        assert np.array_equal(y[:, others], whole[:, others])


@pytest.mark.parametrize("encoding", BLOCKED)
def test_extreme_elements_and_scales(encoding: str, rng: Any) -> None:
    """All bits set or none, scales from the least to the largest, of either sign."""
    k, m = 512, 3
    x = np.concatenate([normal(rng, m, k), np.ones((1, k), np.float32)])
    pairs = ((6e-8, -6e-8), (65504.0, -65504.0), (-65504.0, 65504.0), (0.0, -1.25), (-0.75, 0.0))
    for byte in (0x00, 0xFF, 0x55, 0x80, 0x7F):
        for scales in pairs:
            raw = random_blocks(encoding, 17, k, rng, scales).reshape(17, -1)
            header = {"q6_k": slice(-2, None), "q8_0": slice(2), "q4_0": slice(2)}
            blocks = raw.reshape(17, -1, ENCODINGS[encoding].nbytes)
            kept = blocks[..., header.get(encoding, slice(4))].copy()
            blocks[...] = byte
            blocks[..., header.get(encoding, slice(4))] = kept
            weight, dense = packed_weight(encoding, raw, k), Dense.of(encoding, raw)
            for rows in (x, x[:1], x[3:]):
                assert_integer_product(matmul(rows, weight), rows, dense)


def test_kernels_are_named_after_their_encodings() -> None:
    for encoding in BLOCKED:
        for name in ("gemv_panels_{}", "gemm_panels_{}", "pack_{}"):
            assert name.format(encoding) in kernels()
