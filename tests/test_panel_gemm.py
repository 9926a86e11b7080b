"""Fast products of many rows with weights in panels: activations of 8 bits, and nothing else lost.

They are called here whether or not this host profits by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantised_models as quantised
import written_models as written
from kernel_oracles import BLOCKED, normal, random_blocks
from llama_fixtures import write_gguf
from llama_oracle import Tiny, logits
from panel_oracles import Dense, assert_integer_product, packed_weight, random_packed, row_bytes
from tiled_weights import TiledParts

from onnxstream_nb.kernels import panel_gemm
from onnxstream_nb.kernels.lowered import FEW_ROWS
from onnxstream_nb.kernels.matmul import calls, matmul
from onnxstream_nb.kernels.panel_tiles import BEFORE, LIMIT, RECORD, ROWS
from onnxstream_nb.kernels.quads import SCALE, SUM
from onnxstream_nb.kernels.simd import JIT
from onnxstream_nb.kernels.threads import Team, set_precision, set_threads
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.registry import kernels

Array = np.ndarray[Any, Any]
NS = (1, 15, 16, 17, 33, 67)
MS = (9, 10, 64, 65, 131)
THREADS = (1, 2, 5)
MANY = FEW_ROWS + 1
LONG_K = 3200
"""So long that 131 rows of activations are more than one block."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, one_thread_afterwards: None) -> Iterator[None]:
    for name, kernel in kernels().items():
        if name.startswith("gemm_bytes_"):
            monkeypatch.setitem(kernels(), name.replace("bytes", "fast"), kernel)
    set_precision("fast")
    yield
    set_precision("exact")


def lengths(encoding: str) -> tuple[int, ...]:
    return (256, 768) if "_k" in encoding else (32, 64, 288)


def singles(x: Array, weight: Any) -> Array:
    """Each row by itself, which is exact at either precision."""
    return np.concatenate([matmul(row[None], weight) for row in x])


# -- products ------------------------------------------------------------------------------------


def test_every_panel_has_a_fast_product() -> None:
    fast = {n.removeprefix("gemm_bytes_panels_") for n in kernels() if "gemm_bytes" in n}
    assert fast == {*BLOCKED, "affine4", "affine8"}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_products_of_every_size(encoding: str, threads: int, rng: Any) -> None:
    set_threads(threads)
    for k in lengths(encoding):
        x = normal(rng, max(MS), k)
        for n in NS:
            weight, dense = random_packed(encoding, k, n, rng)
            for m in MS:
                assert_integer_product(matmul(x[:m], weight), x[:m], dense, LIMIT)


PARTS: dict[str, Callable[[], quantised.Quantised]] = {
    "int4 zeros": lambda: quantised.dequantised("int4", 96, 35, 32, zeros=True),
    "uint4": lambda: quantised.dequantised("uint4", 64, 32, 64),
    "uint4 turned": lambda: quantised.dequantised("uint4", 64, 19, 64, turned=True),
    "int8 by rows": lambda: quantised.dequantised("int8", 96, 35, per="row"),
    "int4 halves": lambda: quantised.dequantised("int4", 96, 35, 16, zeros=True),
    "uint8 halves": lambda: quantised.dequantised("uint8", 96, 17, 16),
    "8 bits": lambda: quantised.nbits(8, 64, 5, 32),
    "float16 zeros": lambda: written.half_scaled("uint4", 96, 34, 32, zeros=True),
    "float16 halves": lambda: written.half_scaled("uint4", 96, 34, 16, zeros=True),
    "float16 turned": lambda: written.half_scaled("int8", 96, 35, 32, turned=True),
}


@pytest.mark.parametrize("name", PARTS)
def test_products_with_weights_in_parts(name: str, rng: Any) -> None:
    found = PARTS[name]()
    weight, dense = quantised.weight_of(found), Dense(found.dense.T, np.abs(found.dense.T))
    x = normal(rng, 40, found.k)
    for threads in THREADS:
        set_threads(threads)
        for m in (MANY, 40):
            y = matmul(x[:m], weight)
            assert_integer_product(y, x[:m], dense, LIMIT)
            if weight.ref.cut_by_rows:
                assert np.array_equal(matmul(x[:m], TiledParts(weight)), y)


@pytest.mark.parametrize("encoding", BLOCKED)
def test_more_rows_than_a_block_holds(encoding: str, rng: Any) -> None:
    k = LONG_K if "_k" not in encoding else 3328
    most = panel_gemm.block_rows(k)
    assert ROWS < most < 131 and most % ROWS == 0
    weight, dense = random_packed(encoding, k, 33, rng)
    x = normal(rng, 131, k)
    for m in (most - 1, most, most + 1, 131):
        assert_integer_product(matmul(x[:m], weight), x[:m], dense, LIMIT)


def test_blocks_are_whole_tiles() -> None:
    assert panel_gemm.block_rows(10**8) == ROWS
    assert panel_gemm.block_rows(32) == panel_gemm.MOST_ROWS and panel_gemm.MOST_ROWS % ROWS == 0


@pytest.mark.parametrize("encoding", BLOCKED)
def test_rows_do_not_depend_on_what_they_are_multiplied_with(encoding: str, rng: Any) -> None:
    """Bit by bit, as long as there are many."""
    k = LONG_K if "_k" not in encoding else 3328
    weight, _ = random_packed(encoding, k, 67, rng)
    x = normal(rng, 131, k)
    whole = matmul(x, weight)
    for threads in THREADS:
        set_threads(threads)
        for start in (0, 1, 60, 131 - MANY):
            for stop in (start + MANY, 131):
                assert np.array_equal(matmul(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("encoding", BLOCKED)
def test_a_few_rows_are_exact(encoding: str, rng: Any) -> None:
    """To the last bit what each of them is alone, and what it is at the other precision."""
    weight, _ = random_packed(encoding, 512, 67, rng)
    x = normal(rng, MANY, 512)
    alone = singles(x, weight)
    for m in (2, 3, FEW_ROWS):
        assert np.array_equal(matmul(x[:m], weight), alone[:m])
    y = matmul(x, weight)
    assert not np.array_equal(y, alone)
    set_precision("exact")
    assert np.array_equal(matmul(x, weight), alone)
    assert np.abs(y - alone).max() <= 0.03 * np.abs(alone).max()


def test_nothing_is_written_beside_the_outputs(rng: Any) -> None:
    for n in (1, 15, 16, 17, 33):
        weight, _ = random_packed("q4_0", 64, n, rng)
        for m in (MANY, 10, 12):
            x, out = normal(rng, m, 64), np.full((m + 2, n), 1234.5, np.float32)
            rows = calls(x, weight, out[1:-1])
            rows.run()
            assert rows.keep and (out[[0, -1]] == 1234.5).all()
            assert np.array_equal(out[1:-1], matmul(x, weight))


# -- extremes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", BLOCKED)
def test_groups_of_zeros_and_of_different_sizes(encoding: str, rng: Any) -> None:
    k = 512
    weight, dense = random_packed(encoding, k, 33, rng)
    assert not matmul(np.zeros((MANY, k), np.float32), weight).any()
    x = normal(rng, MANY, k)
    x[:, 32:96] = 0
    x[:, -32:] = -0.0
    assert_integer_product(matmul(x, weight), x, dense, LIMIT)
    sizes = np.repeat(10.0 ** rng.uniform(-30, 30, k // 32), 32)
    x = (normal(rng, MANY, k) * sizes).astype(np.float32)
    assert_integer_product(matmul(x, weight), x, dense, LIMIT)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_activations_that_are_not_finite_reach_their_row(
    encoding: str, bad: float, rng: Any
) -> None:
    weight, _ = random_packed(encoding, 512, 33, rng)
    x = normal(rng, MANY, 512)
    whole = matmul(x, weight)
    others = np.arange(MANY) != 5
    for at in (0, 15, 16, 31, 32, 511):
        broken = x.copy()
        broken[5, at] = bad
        y = matmul(broken, weight)
        assert not np.isfinite(y[5]).any()
        assert np.array_equal(y[others], whole[others])
    nothing = packed_weight(encoding, np.zeros((33, row_bytes(encoding, 512)), np.uint8), 512)
    assert np.isnan(matmul(broken, nothing)[5]).all()


@pytest.mark.parametrize("encoding", BLOCKED)
def test_extreme_elements(encoding: str, rng: Any) -> None:
    k = 512
    x = np.concatenate([normal(rng, MANY, k), np.ones((2, k)), -np.ones((1, k))])
    x = x.astype(np.float32)
    for scales in ((6e-8, -6e-8), (65504.0, -65504.0), (0.0, -1.25)):
        raw = random_blocks(encoding, 17, k, rng, scales)
        weight, dense = packed_weight(encoding, raw, k), Dense.of(encoding, raw)
        assert_integer_product(matmul(x, weight), x, dense, LIMIT)


# -- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("m", [MANY, 12, 17])
def test_records_hold_eight_bits(m: int, threads: int, rng: Any) -> None:
    k, most = 96, 8
    x = normal(rng, m, k)
    memory = np.full(panel_gemm.record_bytes(m, k) + 64, 0x5C, np.uint8)
    where = x.ctypes.data, 4 * k, memory.ctypes.data, m, k, most
    Team(threads).run([(kernels()["quantize_bytes"], *where)])
    assert (memory[-64:] == 0x5C).all()
    found, whole = memory[:-64].reshape(-1, RECORD), -(-m // ROWS) * ROWS
    for i in range(whole):
        first = i // most * most
        rows = min(most, whole - first)
        for g in range(k // 32):
            record = found[first * (k // 32) + rows * g + i - first]
            if i >= m:
                assert not record.any()
                continue
            group = x[i, 32 * g : 32 * g + 32]
            integers = np.rint(group * (np.float32(LIMIT) / np.abs(group).max()))
            assert np.array_equal(record[:32].view(np.int8), integers)
            scale, total = (record[BEFORE + f :][:4].view(np.float32)[0] for f in (SCALE, SUM))
            assert scale == np.abs(group).max() / np.float32(LIMIT)
            np.testing.assert_allclose(total, scale * integers.sum(), rtol=3e-7, atol=0)


# -- models --------------------------------------------------------------------------------------


@pytest.mark.skipif(not JIT, reason="takes long uncompiled")
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0", "Q4_1"])
def test_a_prompt_is_near_and_a_token_exact(
    encoding: str, tmp_path: Path, panels_pay: None
) -> None:
    tiny = Tiny(hidden=64, head_dim=16, intermediate=96, context=400)
    path = tmp_path / "tiny.gguf"
    wanted = logits(tiny, write_gguf(path, tiny, encoding), list(range(3, 43)))
    ids = list(range(3, 43))
    models = {
        name: LanguageModel(path, load="ram", threads=2, precision=name)
        for name in ("exact", "fast", "auto")
    }
    rows = {name: model.feed(ids).copy() for name, model in models.items()}
    assert np.array_equal(rows["auto"], rows["exact"])
    assert not np.array_equal(rows["fast"], rows["exact"])
    assert np.abs(rows["fast"] - wanted[-1]).max() <= 0.05 * np.abs(wanted[-1]).max()
    for model in models.values():
        model.rewind(0)
    for token in ids[:FEW_ROWS]:
        last = models["exact"].feed([token]).copy()
        assert np.array_equal(models["fast"].feed([token]), last)
    models["fast"].rewind(0)
    assert np.array_equal(models["fast"].feed(ids[:FEW_ROWS]), last)
    for model in models.values():
        model.close()
