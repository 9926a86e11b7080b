"""Matrices on a GPU beside those of the CPU, on a device that acts late and may fail."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice
from llama_fixtures import random_blocks

from onnxstream_nb.gpu.lanes import Pending
from onnxstream_nb.gpu.provider import CudaProvider, chosen
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.registry import lookup
from onnxstream_nb.weights import DiskProvider

ENCODINGS = {"float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1", "float32": "F32"}


def weight(encoding: str, k: int, n: int, seed: int = 0) -> tuple[WeightRef, Array]:
    """A matrix (K, N), stored by rows of N, and what it stands for."""
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    kind = getattr(gguf.GGMLQuantizationType, ENCODINGS[encoding])
    stored = gguf.quants.quantize(w, kind)
    data = stored.tobytes()
    meant = gguf.quants.dequantize(stored, kind)
    ref = WeightRef(
        f"{encoding}{seed}", (k, n), "float32", data, 0, len(data), encoding, transposed=True
    )
    return ref, meant.T.astype(np.float32)


def opened(
    device: FakeDevice, refs: list[WeightRef], told: list[str] | None = None
) -> CudaProvider:
    lines = [] if told is None else told
    return CudaProvider(DiskProvider(), device, refs, lines.append)


def product(x: Array, matrix: Any) -> Any:
    operator = lookup("MatMul", "", 13, "offload")
    assert operator is not None and operator.device == "offload"
    return operator.function(x, matrix)


def close(found: Any, x: Array, w: Array, error: float = 2e-6) -> None:
    wanted = x.astype(np.float64) @ w
    np.testing.assert_allclose(found, wanted, rtol=0, atol=error * np.abs(wanted).max())


@pytest.mark.parametrize("rows", [1, 3, 11])
@pytest.mark.parametrize("encoding", ["float16", "q8_0", "q4_0", "q4_1"])
def test_products_with_stored_matrices(encoding: str, rows: int) -> None:
    """Exactly as stored: one row, several, and more than one launch takes."""
    ref, w = weight(encoding, 96, 21)
    provider = opened(FakeDevice(), [ref])
    x = np.random.default_rng(rows).standard_normal((1, rows, 96)).astype(np.float32)
    # Rows for tensor cores are rounded to halves.
    close(product(x, provider.get(ref)), x, w, 1e-3 if rows > 8 else 2e-6)


@pytest.mark.parametrize("rows", [1, 11])
def test_products_with_k_quants(rows: int) -> None:
    """Their blocks' scales are products, which are rounded to halves."""
    stored = random_blocks("Q4_K", 21, 512, np.random.default_rng(2))
    w = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_K).T.astype(np.float32)
    data = stored.tobytes()
    ref = WeightRef("k", (512, 21), "float32", data, 0, len(data), "q4_k", transposed=True)
    provider = opened(FakeDevice(), [ref])
    assert provider.get(ref).encoding == "i4m" and provider.nbytes == 21 * 512 * 20 // 32
    x = np.random.default_rng(rows).standard_normal((1, rows, 512)).astype(np.float32)
    close(product(x, provider.get(ref)), x, w, 1e-3)


def affine(
    integers: str, scale: str, k: int, n: int, block: int, zeros: bool
) -> tuple[WeightRef, Array]:
    """A matrix (K, N) of integers, scales and zero points, and what it stands for."""
    rng, blocks = np.random.default_rng(k), -(-k // block)
    values = 16 if "4" in integers else 256
    low = 0 if integers.startswith("u") else -values // 2
    high = low + values
    q = rng.integers(low, high, (k, n))
    scales = rng.uniform(0.01, 0.02, (blocks, n)).astype(np.float16).astype(scale)
    parts = [(q, integers), (scales, scale)]
    meant, zero = q.astype(np.float64), rng.integers(low, high, (blocks, n))
    if zeros:
        parts.append((zero, integers))
        meant -= np.repeat(zero, block, axis=0)[:k]
    data, refs = b"", []
    for i, (values, kind) in enumerate(parts):
        if kind in ("int4", "uint4"):
            pairs = (values & 15).astype(np.uint8).reshape(-1, 2)
            raw = (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
        else:
            raw = values.astype(kind).tobytes()
        refs.append(WeightRef(f"part{i}", values.shape, kind, raw, 0, len(raw)))
        data += raw
    ref = WeightRef(
        "affine", (k, n), "float32", data, 0, len(data), f"affine{4 if '4' in integers else 8}",
        parts=tuple(refs), block=block,
    )  # fmt: skip
    return ref, (meant * np.repeat(scales.astype(np.float64), block, axis=0)[:k]).astype(np.float32)


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize(
    ("integers", "scale", "k", "block", "zeros", "kernel"),
    [
        ("uint4", "float16", 96, 32, True, "i4z"),
        ("int4", "float32", 96, 32, False, "i4"),
        ("uint4", "float16", 128, 64, False, "i4z"),
        ("uint8", "float32", 96, 32, True, "i8z"),
        ("int8", "float16", 70, 128, False, "i8"),
    ],
)
def test_integers_with_zero_points(
    integers: str, scale: str, k: int, block: int, zeros: bool, kernel: str, rows: int
) -> None:
    ref, w = affine(integers, scale, k, 6, block, zeros)
    device = FakeDevice()
    provider = opened(device, [ref])
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    close(product(x, provider.get(ref)), x, w, 1e-3 if rows > 8 else 5e-6)
    assert (f"widen_{kernel}" if rows > 8 else f"gemv_{kernel}_{rows}") in device.launched


def test_strips_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows, and a matrix that becomes halves in three goes, the last one shorter."""
    monkeypatch.setattr("onnxstream_nb.kernels.cuda_matrix.STRIP", 0)
    ref, w = weight("q8_0", 32, 300)
    device = FakeDevice()
    x = np.random.default_rng(1).standard_normal((9, 32)).astype(np.float32)
    close(product(x, opened(device, [ref]).get(ref)), x, w, 1e-3)
    assert device.launched.count("widen_i8") == 3


@pytest.mark.parametrize(("encoding", "k"), [("float32", 37)])
def test_other_matrices_become_halves(encoding: str, k: int) -> None:
    ref, w = weight(encoding, k, 5)
    provider = opened(FakeDevice(), [ref])
    x = np.random.default_rng(1).standard_normal((2, k)).astype(np.float32)
    close(product(x, provider.get(ref)), x, w.astype(np.float16).astype(np.float32))


def test_products_are_done_when_somebody_looks() -> None:
    device, refs = FakeDevice(), [weight("float16", 64, 9, seed) for seed in range(3)]
    provider = opened(device, [ref for ref, _ in refs])
    x = np.ones((1, 64), np.float32)
    found = [product(x, provider.get(ref)) for ref, _ in refs]
    assert not device.launched and all(isinstance(each, Pending) for each in found)
    for each, (_, w) in zip(found[::-1], refs[::-1], strict=True):
        close(each, x, w)
    assert len(device.launched) == 3
    close(found[0], x, refs[0][1])  # looked at again, it is what it was


def test_more_products_than_lanes() -> None:
    device = FakeDevice()
    ref, w = weight("float16", 32, 4)
    provider = opened(device, [ref])
    xs = [np.full((1, 32), i, np.float32) for i in range(11)]
    found = [product(x, provider.get(ref)) for x in xs]
    for x, each in zip(xs, found, strict=True):
        close(each, x, w)


@pytest.mark.parametrize("shape", [(0, 64), (1, 0, 64), (2, 3, 64)])
def test_shapes_of_inputs(shape: tuple[int, ...]) -> None:
    ref, w = weight("float16", 64, 3)
    x = np.ones(shape, np.float32)
    found = np.asarray(product(x, opened(FakeDevice(), [ref]).get(ref)))
    assert found.shape == (*shape[:-1], 3)
    np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-4)


# -- what has no room, and what fails


def test_the_largest_are_placed_and_a_refused_one_blocks_no_smaller() -> None:
    refs = [weight("float16", 64, n, n)[0] for n in (10, 400, 30, 100)]
    assert [r.shape[1] for r in chosen(refs, 10**6)] == [400, 100, 30, 10]
    assert [r.shape[1] for r in chosen(refs, 19_000)] == [100, 30]
    assert chosen(refs, 0) == []


def test_a_matrix_twice_is_placed_once() -> None:
    ref, _ = weight("float16", 64, 10)
    assert len(chosen([ref, ref], 10**6)) == 1


def test_what_the_device_has_no_memory_for_stays_with_the_cpu() -> None:
    (large, w), (small, v) = weight("float16", 64, 400, 1), weight("float16", 64, 8, 2)
    told: list[str] = []
    device = FakeDevice(memory=20_000)
    provider = opened(device, [large, small], told)
    assert len(told) == 1 and told[0].endswith(
        "out of memory; 1 of 2 matrices that were to lie there stay with the CPU"
    )
    x = np.ones((1, 64), np.float32)
    close(product(x, provider.get(large)), x, w, 1e-5)
    close(product(x, provider.get(small)), x, v)
    assert device.launched == ["gemv_f16_1"] and provider.nbytes == 64 * 8 * 2


def test_rows_that_do_not_fit_are_computed_by_the_cpu() -> None:
    ref, w = weight("float16", 64, 8)
    told: list[str] = []
    provider = opened(FakeDevice(), [ref], told)
    provider.lanes.most = 4000
    for rows in (20, 30, 2):
        x = np.ones((rows, 64), np.float32)
        close(product(x, provider.get(ref)), x, w, 1e-5)
    assert len(told) == 1 and "the CPU computes what does not fit" in told[0]


def test_a_device_that_fails_at_any_time_is_replaced_by_the_cpu() -> None:
    """After each number of calls, once: a product is right whatever happens, one line is told."""
    ref, w = weight("float16", 64, 9)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    whole = FakeDevice()
    provider = opened(whole, [ref])
    placed = whole.calls
    for _ in range(6):
        np.asarray(product(x, provider.get(ref)))
    for after in range(whole.calls - placed):
        device, told = FakeDevice(), []
        provider = opened(device, [ref], told)
        device.fail_after = device.calls + after
        results = [product(x, provider.get(ref)) for _ in range(6)]
        for result in results:
            close(result, x, w, 1e-5)
        assert len(told) == 1 and told[0].endswith("fell off the bus; the CPU goes on alone")


def test_closing_gives_everything_back() -> None:
    ref, _ = weight("float16", 64, 9)
    device = FakeDevice()
    provider = opened(device, [ref])
    np.asarray(product(np.ones((1, 64), np.float32), provider.get(ref)))
    provider.close()
    assert device.closed
