"""Matrices stored in integers: DequantizeLinear's and MatMulNBits's, read as they are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_oracles import assert_product
from onnx import helper, numpy_helper
from onnx_models import saved
from quantised_models import (
    INTEGERS,
    Array,
    Quantised,
    activations,
    dequantised,
    nbits,
    onnxruntime_s,
    parts_of,
    weight_of,
)
from weight_files import Reads, closing
from written_models import half_scaled

from onnxstream_nb import packing
from onnxstream_nb.cli.report import encoding_totals
from onnxstream_nb.formats.onnx import read_bytes
from onnxstream_nb.kernels import packing as kernel_packing
from onnxstream_nb.kernels.affine import geometry
from onnxstream_nb.kernels.matmul import lower_matmul, matmul, prepared
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.kernels.weight import decode
from onnxstream_nb.measure import weights_size
from onnxstream_nb.packing import PackedProvider
from onnxstream_nb.passes import with_quantised_weights
from onnxstream_nb.session import Session, decode_constant, internal
from onnxstream_nb.weights import DiskProvider, RamProvider

LOADS = ("auto", "ram", "mmap", "stream")
SIZES = ((64, 16), (96, 37), (320, 33), (128, 5))

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def check(
    found: Quantised, ms: tuple[int, ...] = (1, 5), twice: bool = True, **options: Any
) -> None:
    """Against float64 within what rounded activations may cost, and against onnxruntime too."""
    with Session(found.model, **{"load": "ram", "threads": 1, **options}) as session:
        ref = parts_of(session.graph)
        for m in ms:
            x = activations(m, found.k)
            y = session.run({"x": x})["y"]
            bias = 0 if found.bias is None else found.bias
            assert y.dtype == np.float32
            packed = geometry(ref) is not None
            assert_product(y - bias, x, found.dense, packed=packed)
            wanted = onnxruntime_s(found.model, {"x": x}) if twice else x @ found.dense + bias
            slack = (2e-4 if packed else 2e-6) * (np.abs(x) @ np.abs(found.dense)) + 1e-6
            assert (np.abs(y - wanted) <= slack).all()
    assert type(session.provider) is (PackedProvider if packed else RamProvider)


# -- every form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_blocks(dtype: str, block: int, turned: bool, zeros: bool) -> None:
    for k, n in SIZES:
        check(dequantised(dtype, k, n, block, turned=turned, zeros=zeros))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_one_scale_for_many(dtype: str, per: str, turned: bool, zeros: bool) -> None:
    for k, n in (*SIZES, (77, 19)):
        check(dequantised(dtype, k, n, turned=turned, zeros=zeros, per=per))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("k", "n", "block"), [(100, 7, 32), (33, 3, 16), (192, 9, 48), (5, 1, 4)])
def test_ends_and_blocks_that_no_panel_has(k: int, n: int, block: int, turned: bool) -> None:
    for dtype in INTEGERS:
        check(dequantised(dtype, k, n, block, turned=turned, zeros=True))


@pytest.mark.parametrize("turned", [False, True])
def test_gemm(turned: bool) -> None:
    for dtype in INTEGERS:
        check(dequantised(dtype, 96, 37, 32, turned=turned, zeros=True, gemm=True))


@pytest.mark.parametrize("zeros", ["", "packed", "float"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_nbits(bits: int, block: int, zeros: str) -> None:
    for k, n in (*SIZES, (100, 7)):
        found = nbits(bits, k, n, block, zeros=zeros, bias=n == 37)
        check(found, twice=(bits, zeros) != (8, "float"))  # which onnxruntime has not got


@pytest.mark.parametrize("found", [
    dequantised("int4", 96, 37, 32, kind=np.float16), nbits(4, 96, 37, 32, kind=np.float16),
    dequantised("uint8", 96, 37, kind=np.float16, per="row", turned=True),
    nbits(8, 96, 37, 16, kind=np.float16),
])  # fmt: skip
def test_half_precision(found: Quantised) -> None:
    """The model's floats are float16: its result is one, of a product that is not."""
    with Session(found.model, load="ram") as session:
        for m in (1, 5):
            x = activations(m, found.k, np.float16)
            y = session.run({"x": x})["y"]
            size = np.abs(x).astype(np.float64) @ np.abs(found.dense)
            assert y.dtype == np.float16
            assert (np.abs(y - x.astype(np.float64) @ found.dense) <= 1.5e-3 * size + 1e-3).all()
        graph = session.graph
    w = decode_constant(parts_of(graph))
    assert w.dtype == np.float16
    assert (np.abs(w - found.dense) <= 2.0**-11 * np.abs(found.dense) + 1e-7).all()


def test_half_scales_beside_full_activations() -> None:
    """Of DequantizeLinear's: float16 weights are made float32 by a Cast, which stays."""
    found = dequantised("int8", 64, 9, 32)
    x = activations(3, 64)
    for proto in found.model.graph.initializer:
        if proto.name == "s":
            s = numpy_helper.to_array(proto).astype(np.float16)
            proto.CopyFrom(numpy_helper.from_array(s, "s"))
    nodes = found.model.graph.node
    nodes[1].input[1] = "c"
    nodes.insert(1, helper.make_node("Cast", ["w"], ["c"], to=1))
    with Session(found.model) as session:
        wanted = onnxruntime_s(found.model, {"x": x})
        assert np.allclose(session.run({"x": x})["y"], wanted, rtol=1e-4, atol=1e-4)


# -- where they come from, and who multiplies ----------------------------------------------------

SHIPPED = {
    "columns of nibbles": dequantised("int4", 320, 48, 64, zeros=True),
    "odd columns of nibbles": dequantised("uint4", 320, 33, 32, zeros=True),
    "rows of nibbles": dequantised("uint4", 320, 33, 32, zeros=True, turned=True),
    "columns of bytes": dequantised("int8", 320, 50, per="row", zeros=True),
    "rows of bytes": dequantised("uint8", 320, 50, 128, turned=True),
    "4 bits": nbits(4, 320, 50, 64, zeros="packed"),
    "short blocks": dequantised("int4", 320, 34, 16),
    "short blocks of rows": half_scaled("uint8", 320, 34, 16, zeros=True, turned=True),
    "blocks of three groups": dequantised("int8", 320, 34, 96, zeros=True),
    "half scales": half_scaled("uint4", 320, 34, 32, zeros=True),
    "half scales of bytes": half_scaled("int8", 320, 33, 64, turned=True),
    "8 bits": nbits(8, 320, 33, 32),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_ways_of_loading_and_threads_make_no_difference(name: str, tmp_path: Path) -> None:
    found = SHIPPED[name]
    path = saved(found.model, tmp_path / "model.onnx")
    x = activations(131, found.k)
    results: list[Array] = []
    for load in LOADS:
        for threads in (1, 2):
            with Session(path, load=load, threads=threads) as session:
                many = session.run({"x": x})["y"]
                assert np.array_equal(session.run({"x": x[:1]})["y"], many[:1])
                assert np.array_equal(session.run({"x": x[7:9]})["y"], many[7:9])
                results.append(many)
    assert all(np.array_equal(y, results[0]) for y in results)
    assert_product(results[0], x, found.dense, packed=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_budget_streams_them(name: str, tmp_path: Path) -> None:
    found = SHIPPED[name]
    path = saved(found.model, tmp_path / "model.onnx")
    x = activations(3, found.k)
    with Session(path, load="stream", ram="4GB") as session:
        assert_product(session.run({"x": x})["y"], x, found.dense, packed=True)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_precisions(precision: str) -> None:
    check(SHIPPED["columns of nibbles"], precision=precision)


def panel_values(weight: Any) -> tuple[Array, Array, Array]:
    """Panels undone by NumPy: integers (N, K), scales and zero points (N, units), all unsigned."""
    k, n = weight.shape
    memory = np.ctypeslib.as_array(
        (np.ctypeslib.ctypes.c_uint8 * (-(-n // 16) * weight.row_bytes)).from_address(
            weight.address
        )
    ).reshape(-1, weight.row_bytes)
    rows = []
    for panel in memory:
        _, groups, size, at, flags = panel[:20].view(np.int32).tolist()
        half, own, halves = flags & 1, flags & 2, flags // 4
        units = -(-(k // 32) // groups)
        inner = panel[64 : 64 + units * size].reshape(units, size)
        quads = inner[:, at:].reshape(units, groups, -1, 16, 4)
        if weight.encoding == "affine4":
            quads = np.concatenate([quads & 15, quads >> 4], axis=2)
        q = np.moveaxis(quads, 3, 0).reshape(16, -1)[:, :k]
        s = np.ascontiguousarray(inner[:, : (32 if half else 64) << halves])
        s = s.view(np.float16 if half else np.float32).reshape(-1, 16)
        z = np.ascontiguousarray(inner[:, at - (16 << halves) : at]).reshape(-1, 16)
        rows.append((q, s.T, z.T if own else np.tile(panel[32:48], (len(s), 1)).T))
    return tuple(np.concatenate(part)[:n] for part in zip(*rows, strict=True))  # type: ignore


@pytest.mark.parametrize("name", SHIPPED)
def test_panels_hold_what_the_parts_do(name: str) -> None:
    found = SHIPPED[name]
    weight = weight_of(found)
    for threads in (1, 2, 5):
        set_threads(threads)
        q, s, z = panel_values(prepared(weight))
        each = np.arange(found.k) // weight.ref.block
        values = (q.astype(np.int64) - z.astype(np.int64)[:, each]) * s.astype(np.float64)[:, each]
        assert np.array_equal(values.T, found.dense)


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
@pytest.mark.parametrize("name", SHIPPED)
def test_panels_are_the_same_whatever_is_read_at_a_time(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = saved(SHIPPED[name].model, tmp_path / "model.onnx"), SHIPPED[name]
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    with Session(path, load="ram") as session:
        ref = parts_of(session.graph)
        packed = session.provider.get(ref)
        assert packed.packed and packed.address % 64 == 0
        wanted = panel_values(prepared(DiskProvider().get(ref)))
        for got, known in zip(panel_values(packed), wanted, strict=True):
            assert np.array_equal(got, known)
        x = activations(3, found.k)
        assert_product(session.run({"x": x})["y"], x, found.dense, packed=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_weight_is_read_once_and_counted_whole(name: str, tmp_path: Path) -> None:
    found = SHIPPED[name]
    path = saved(found.model, tmp_path / "model.onnx")
    own = sum(part.name == "middle" for part in parts_of(Session(path).graph).parts)
    for load in LOADS:
        with Session(path, load=load) as session:
            assert session.plan.weight_bytes == found.nbytes + own
            x = activations(1, found.k)
            for _ in range(3):
                session.run({"x": x})
            if load == "ram":
                files = [p for p in parts_of(session.graph).parts if isinstance(p.source, Path)]
                provider: Any = session.provider
                assert provider.bytes_read == sum(p.nbytes for p in files)


def test_pieces_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dequantised("int8", 1024, 64, 32)
    path = saved(found.model, tmp_path / "model.onnx")
    monkeypatch.setattr(packing, "CHUNK_BYTES", 8192)
    reads = Reads(monkeypatch)
    with Session(path, load="ram"):
        assert 0 < reads.most <= 2 * 8192 and reads.alive == 0
        assert reads.names.count("q") == 8


def test_what_a_file_holds_is_reported() -> None:
    for found in SHIPPED.values():
        graph = read_bytes(found.model.SerializeToString())
        (total,) = encoding_totals(graph)
        ref = parts_of(with_quantised_weights(graph))
        assert total.encoding == ref.encoding and total.size_bytes == ref.nbytes
        assert total.parameters == found.dense.size
        assert weights_size(graph) == (ref.nbytes, found.dense.size)
        assert ref.nbytes == found.nbytes + sum(p.name == "middle" for p in ref.parts)


def test_hosts_without_the_instruction_pack_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_packing, "SUPPORTED", False)
    for found in SHIPPED.values():
        check(found, ms=(1,))


def test_what_is_not_packed_yet_is_not_lowered() -> None:
    found = SHIPPED["4 bits"]
    weight, x = weight_of(found), activations(1, found.k)
    assert lower_matmul(x, weight) is None
    y = matmul(x, weight)
    assert_product(y, x, found.dense, packed=True)
    with closing(PackedProvider(RamProvider(), [weight.ref], internal("Panels")())) as provider:
        rows = lower_matmul(x, provider.get(weight.ref))
        assert rows is not None and np.array_equal(rows.run(), y)


@pytest.mark.parametrize("name", SHIPPED)
def test_decoded(name: str) -> None:
    w = decode(weight_of(SHIPPED[name]))
    assert w.dtype == np.float32 and np.allclose(w, SHIPPED[name].dense, rtol=3e-7, atol=0)


@pytest.mark.parametrize("zeros", ["", "packed", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_nbits_as_an_operator(bits: int, zeros: str) -> None:
    found = nbits(bits, 100, 7, 32, zeros=zeros, bias=True)
    x = activations(3, 100)
    with Session(found.model, optimize=False) as session:
        assert session.graph.nodes[0].op_type == "MatMulNBits"
        y = session.run({"x": x})["y"]
    assert_product(y - found.bias, x, found.dense)
