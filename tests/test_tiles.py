"""Products with a weight in tiles: what the whole weight gives, to the last bit where that is
promised, and few rows of X as each of them alone.

Tiles of stored rows (N, K), "rows", are exact always. Of rows (K, N), "columns", the few rows' are;
those of many rows at cuts that are multiples of 32, of 256 when factors are split in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from kernel_oracles import (
    BLOCKED,
    ORDERS,
    PLAIN,
    Array,
    assert_product,
    normal,
    random_weight,
)  # fmt: skip
from panel_oracles import packed_weight
from tiled_weights import Tiled

from onnxstream_nb.kernels import matmul as matmul_module
from onnxstream_nb.kernels.lowered import FEW_ROWS
from onnxstream_nb.kernels.matmul import Kept, gemm, matmul
from onnxstream_nb.kernels.threads import set_precision, set_threads
from onnxstream_nb.kernels.tile_bf16 import AMX, SUPPORTED
from onnxstream_nb.registry import kernels
from onnxstream_nb.weights import Weight

MS = (1, 2, FEW_ROWS, FEW_ROWS + 1, 40)
COLUMNS = [encoding for encoding, transposed in ORDERS if not transposed]
SPLIT = [name for name in PLAIN] if AMX else []
"""Encodings whose exact products of many rows are split."""

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Behind the arrays that products make there is what nobody may write."""
    made: list[Array] = []

    def empty(shape: Any, dtype: Any = np.float32) -> Array:
        count = int(np.prod(shape))
        memory = np.full(count * np.dtype(dtype).itemsize + 1024, 0x5A, np.uint8)
        made.append(memory[-1024:])
        return memory[:-1024].view(dtype).reshape(shape)

    monkeypatch.setattr(matmul_module, "empty", empty)
    yield
    assert all((guard == 0x5A).all() for guard in made)


def assert_as_whole(x: Array, weight: Weight, *cuts: tuple[int, ...]) -> None:
    for m in MS:
        wanted = matmul(x[:m], weight)
        for cut in cuts:
            assert np.array_equal(matmul(x[:m], Tiled(weight, cut)), wanted), (m, cut)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("encoding", [*PLAIN, *BLOCKED])
def test_tiles_of_rows(
    encoding: str, threads: int, precision: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    set_precision(precision)
    for k, n in ((256, 67), (512, 5), *([(77, 130)] if encoding in PLAIN else [])):
        weight, _ = random_weight(encoding, k, n, rng, True)
        x = normal(rng, max(MS), k)
        cuts = [(n // 2,), (1, 2, n - 1), (), tuple(range(1, min(n, 9)))]
        assert_as_whole(x, weight, *cuts, *([(32, 64)] if n > 64 else []))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("encoding", COLUMNS)
def test_tiles_of_columns(
    encoding: str, threads: int, precision: str, rng: np.random.Generator
) -> None:
    """Rising, falling and equal heights, a last tile of one row, parts that a tile ends in."""
    set_threads(threads)
    set_precision(precision)
    step = 256 if precision == "exact" and encoding in SPLIT else 32
    for k, n in ((9 * step + 1, 35), (4 * step, 64), (2 * step + 7, 3)):
        weight, _ = random_weight(encoding, k, n, rng, False)
        x = normal(rng, max(MS), k)
        last = k // step * step
        assert_as_whole(x, weight, (step,), (last - step, last), tuple(range(step, last + 1, step)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", COLUMNS)
def test_few_rows_of_columns_are_exact_at_any_cut(
    encoding: str, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    weight, dense = random_weight(encoding, 213, 35, rng, False)
    x = normal(rng, 40, 213)
    for cuts in ((1,), (3, 5, 100), (212,), tuple(range(7, 213, 7)), (13, 14, 15)):
        tiled = Tiled(weight, cuts)
        for m in (1, 2, FEW_ROWS):
            assert np.array_equal(matmul(x[:m], tiled), matmul(x[:m], weight))
        assert_product(matmul(x, tiled), x, dense, encoding)


@pytest.mark.skipif(not SUPPORTED, reason="this processor has no products in bfloat16")
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("encoding", PLAIN)
def test_factors_that_are_split(
    encoding: str, order: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact products are where the processor multiplies in tiles of its own."""
    name = f"{order}_{encoding}"
    monkeypatch.setitem(kernels(), f"gemm_exact_{name}", kernels()[f"gemm_split_{name}"])
    set_threads(2)
    k, n = (300, 131) if order == "rows" else (773, 35)
    weight, _ = random_weight(encoding, k, n, rng, order == "rows")
    cuts = [(32,), (64, 96)] if order == "rows" else [(256,), (512,), (256, 512, 768)]
    assert_as_whole(normal(rng, max(MS), k), weight, *cuts)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_panels_and_tiles(encoding: str, threads: int, rng: np.random.Generator) -> None:
    """The first rows are held as panels, the others come as they are stored: each as it would."""
    set_threads(threads)
    k, n = 256, 139
    weight, dense = random_weight(encoding, k, n, rng, True)
    raw = weight.buffer.reshape(n, -1)
    x = normal(rng, max(MS), k)
    for held in (32, 96):
        panels = packed_weight(encoding, raw[:held], k)
        for cuts in ((held,), (held, held + 1), (held, held + 32)):
            for m in MS:
                y = matmul(x[:m], Tiled(weight, cuts, in_panels=True))
                assert_product(y, x[:m], dense, packed=True)
                assert_product(y[:, held:], x[:m], dense[:, held:], encoding)
                assert np.array_equal(y[:, :held], matmul(x[:m], panels))
                assert np.array_equal(y[:, held:], matmul(x[:m], weight)[:, held:])


# -- few rows ------------------------------------------------------------------------------------


def assert_each_alone(x: Array, weight: Any) -> None:
    alone = np.concatenate([matmul(row[None], weight) for row in x])
    for m in range(2, FEW_ROWS + 1):
        assert np.array_equal(matmul(x[:m], weight), alone[:m]), m
    last = matmul(x[-FEW_ROWS:], weight)
    assert np.array_equal(last, alone[-FEW_ROWS:])


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_few_rows_are_each_as_alone(
    encoding: str, transposed: bool, threads: int, precision: str, rng: np.random.Generator
) -> None:
    set_threads(threads)
    set_precision(precision)
    sizes = ((256, 37), (512, 130), *([] if encoding in BLOCKED else [(77, 5), (1, 1), (133, 64)]))
    for k, n in sizes:
        weight, dense = random_weight(encoding, k, n, rng, transposed)
        x = normal(rng, FEW_ROWS + 3, k)
        assert_each_alone(x, weight)
        assert_each_alone(x, Tiled(weight, (len(Tiled(weight, ()).rows) // 3,)))
        assert_product(matmul(x[:FEW_ROWS], weight), x[:FEW_ROWS], dense, encoding)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_few_rows_times_panels(encoding: str, threads: int, rng: np.random.Generator) -> None:
    set_threads(threads)
    for k, n in ((256, 37), (512, 16)):
        weight, _ = random_weight(encoding, k, n, rng, True)
        raw, x = weight.buffer.reshape(n, -1), normal(rng, FEW_ROWS + 3, k)
        assert_each_alone(x, packed_weight(encoding, raw, k))
        if n > 32:
            assert_each_alone(x, Tiled(weight, (32,), in_panels=True))


@pytest.mark.parametrize("shape", [(2, 3, 256), (1, 8, 256), (4, 1, 256), (256,), (0, 256)])
def test_leading_axes(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    for encoding, transposed in (("float16", True), ("q8_0", True), ("float32", False)):
        weight, _ = random_weight(encoding, 256, 37, rng, transposed)
        x = normal(rng, *shape)
        y = matmul(x, Tiled(weight, (32,)))
        assert y.shape == (*shape[:-1], 37) and np.array_equal(y, matmul(x, weight))
        assert np.array_equal(y.reshape(-1, 37), matmul(x.reshape(-1, 256), weight))


@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8"])
def test_gemm_of_a_gathered_weight(encoding: str, rng: np.random.Generator) -> None:
    weight, _ = random_weight(encoding, 96, 35, rng, False)
    a, bias = normal(rng, 5, 96), normal(rng, 35)
    wanted = gemm(a, weight, bias, alpha=0.5, beta=2.0)
    assert np.array_equal(gemm(a, Tiled(weight, (32,)).whole(), bias, alpha=0.5, beta=2.0), wanted)
    assert np.array_equal(gemm(a, Tiled(weight, (32,)), bias, alpha=0.5, beta=2.0), wanted)


def test_what_tiles_share_is_filled_once_and_large_enough() -> None:
    kept, other = Kept(), object()
    for purpose, nbytes, wanted in (
        (self_ := object(), 100, True), (self_, 100, False), (self_, 5000, True),
        (self_, 4000, False), (other, 64, True), (self_, 100, True),
    ):  # fmt: skip
        address, memory, fresh = kept.room(nbytes, purpose)
        assert address % 64 == 0 and fresh == wanted
        assert memory.ctypes.data <= address
        assert address + nbytes <= memory.ctypes.data + memory.nbytes
