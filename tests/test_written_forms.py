"""The forms that a conversion writes are read as they are stored, once, by every way of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_oracles import assert_product
from onnx_models import run, saved
from quantised_models import Array, activations, onnxruntime_s, parts_of, rewritten
from written_models import (
    HALVES,
    Written,
    half_scaled,
    scaled,
    tied_floats,
    tied_integers,
    widened,
)

from onnxstream_nb.cli.report import encoding_totals
from onnxstream_nb.formats.onnx import read_bytes
from onnxstream_nb.kernels.affine import geometry
from onnxstream_nb.session import Session, decode_constant

LOADS = ("auto", "ram", "mmap", "stream")
LEFT = {"Cast", "Transpose", "DequantizeLinear"}

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def operators(model: Any) -> list[str]:
    return [node.op_type for node in rewritten(model).nodes]


def is_counted_once(found: Written, encoding: str) -> None:
    """`inspect` reports the stored bytes under the name of their encoding."""
    (total,) = encoding_totals(read_bytes(found.model.SerializeToString()))
    assert (total.encoding, total.size_bytes) == (encoding, found.nbytes)
    assert total.parameters == found.dense.size


def sessions(model: Any, path: Path) -> Any:
    """A session for every way of loading and number of threads."""
    path = saved(model, path)
    for load in LOADS:
        for threads in (1, 2):
            with Session(path, load=load, threads=threads) as session:
                yield session
    with Session(path, load="stream", ram="4GB") as session:
        yield session


# -- half floats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", ["", "before", "after"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_widened_factor_is_multiplied_as_it_is_stored(
    dtype: str, turned: str, tmp_path: Path
) -> None:
    found = widened(dtype, 323, 131, turned=turned)
    is_counted_once(found, dtype)
    assert operators(found.model) == ["MatMul"]
    x = activations(5, 323)
    (wanted,) = run(found.model, {"x": x}).values() if dtype == "float16" else (x @ found.dense,)
    for session in sessions(found.model, tmp_path / "model.onnx"):
        (ref,) = session.plan.weights
        assert (ref.dtype, ref.encoding, ref.transposed) == ("float32", dtype, bool(turned))
        assert session.plan.weight_bytes == found.nbytes
        for m in (1, 5):
            y = session.run({"x": x[:m]})["y"]
            assert y.dtype == np.float32
            assert_product(y, x[:m], found.dense)
            assert np.allclose(y, wanted[:m], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_other_readers_of_widened_weights(dtype: str) -> None:
    product, vector = widened(dtype, 320, 131, gemm=True), scaled(dtype, 70_001)
    x = activations(3, 320)
    with Session(product.model) as session:
        assert_product(session.run({"x": x})["y"], x, product.dense)
    x = activations(3, 70_001)
    with Session(vector.model) as session:
        assert [node.op_type for node in session.graph.nodes] == ["Mul"]
        assert np.array_equal(session.run({"x": x})["y"], x * vector.dense.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_a_tied_table_of_floats_is_stored_and_read_once(dtype: str, tmp_path: Path) -> None:
    found = tied_floats(dtype, 1003, 67)
    is_counted_once(found, dtype)
    ids = np.array([[5, 1002, 0], [-1, 5, 7]])
    rows = found.dense[ids].astype(np.float32)
    for session in sessions(found.model, tmp_path / "model.onnx"):
        assert [node.op_type for node in session.graph.nodes] == ["Gather", "MatMul"]
        table, head = session.plan.weights
        assert table.key == head.key and head.shape == table.shape[::-1]
        assert session.plan.weight_bytes == found.nbytes
        result = session.run({"ids": ids})
        assert np.array_equal(result["e"], rows)
        assert_product(result["y"][0], rows[0], found.dense.T)


def test_what_narrows_or_stays_half_is_left() -> None:
    """Only a widening keeps every number: one to float16 rounds, and one to float64 is not ours."""
    for to, name in ((10, "float16"), (11, "float64")):
        model = scaled("bfloat16", 70_001).model
        model.graph.node[0].attribute[0].i = to
        for inout in (*model.graph.input, *model.graph.output):
            inout.type.tensor_type.elem_type = to
        x = activations(2, 70_001, np.dtype(name))
        with Session(model) as session:
            assert [node.op_type for node in session.graph.nodes] == ["Cast", "Mul"]
            w = scaled("bfloat16", 70_001).dense.astype(name)
            assert np.array_equal(session.run({"x": x})["y"], x * w)


# -- integers with scales of half floats ---------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
def test_blocks_with_half_scales(dtype: str, block: int, zeros: bool) -> None:
    for k, n in ((64, 16), (352, 37), (130, 5), (257, 33)):
        found = half_scaled(dtype, k, n, block, zeros=zeros)
        x = activations(5, k)
        wanted = onnxruntime_s(found.model, {"x": x})
        with Session(found.model, load="ram", threads=1) as session:
            assert [node.op_type for node in session.graph.nodes] == ["MatMul"]
            ref = parts_of(session.graph)
            assert (ref.dtype, ref.parts[1].dtype, ref.nbytes) == (
                "float32",
                "float16",
                found.nbytes,
            )
            packed = geometry(ref) is not None
            for m in (1, 5):
                y = session.run({"x": x[:m]})["y"]
                assert y.dtype == np.float32
                assert_product(y, x[:m], found.dense, packed=packed)
            slack = 2e-4 * (np.abs(x) @ np.abs(found.dense)) + 1e-6
            assert (np.abs(y - wanted) <= slack).all()


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_a_half_scale_a_column(dtype: str) -> None:
    for k, n in ((352, 37), (131, 5)):
        found = half_scaled(dtype, k, n, per="row")
        x = activations(3, k)
        with Session(found.model, load="ram") as session:
            ref = parts_of(session.graph)
            assert (ref.dtype, ref.nbytes) == ("float32", found.nbytes)
            y = session.run({"x": x})["y"]
        assert_product(y, x, found.dense, packed=geometry(ref) is not None)


def test_ways_of_loading_half_scales(tmp_path: Path) -> None:
    found = half_scaled("int4", 320, 33, 32)
    x = activations(40, 320)
    results = []
    for session in sessions(found.model, tmp_path / "model.onnx"):
        assert session.plan.weight_bytes == found.nbytes
        results.append(session.run({"x": x})["y"])
        assert np.array_equal(session.run({"x": x[:1]})["y"], results[-1][:1])
    assert all(np.array_equal(y, results[0]) for y in results)
    assert_product(results[0], x, found.dense, packed=True)


# -- a tied table of integers --------------------------------------------------------------------

TIED = {
    "int8": tied_integers("int8", 1003, 96, 32),
    "float32 scales": tied_integers("int8", 517, 64, 64, half=False),
    "uint8 with zero points": tied_integers("uint8", 77, 160, 32, zeros=True),
    "a shorter last block": tied_integers("int8", 131, 80, 32),
    "no panels": tied_integers("int8", 131, 67, 16),
    "dequantised before": tied_integers("int8", 131, 96, 32, late=True),
    "nibbles": tied_integers("uint4", 131, 96, 32, zeros=False, late=True),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_table_of_integers_is_stored_and_read_once(name: str, tmp_path: Path) -> None:
    found = TIED[name]
    v, d = found.dense.shape
    is_counted_once(found, "affine4" if name == "nibbles" else "affine8")
    ids = np.array([[5, v - 1, 0], [-1, 5, 7]])
    logits = None if name == "nibbles" else onnxruntime_s(found.model, {"ids": ids}, "y")
    for session in sessions(found.model, tmp_path / "model.onnx"):
        assert [node.op_type for node in session.graph.nodes] == ["Gather", "MatMul"]
        table, head = session.plan.weights
        assert table.key == head.key and head.shape == table.shape[::-1] == (d, v)
        assert session.plan.weight_bytes == found.nbytes
        result = session.run({"ids": ids})
        assert result["e"].dtype == np.float32
        assert np.array_equal(result["e"], found.dense[ids].astype(np.float32))
        packed = geometry(head) is not None
        for rows, y in zip(found.dense[ids], result["y"], strict=True):
            assert_product(y, rows.astype(np.float32), found.dense.T, packed=packed)
        if logits is not None:  # onnxruntime looks up no nibbles
            slack = 2e-4 * (np.abs(found.dense[ids]) @ np.abs(found.dense.T)) + 1e-6
            assert (np.abs(result["y"] - logits) <= slack).all()


def test_only_rows_of_a_table_are_read(tmp_path: Path) -> None:
    found = TIED["int8"]
    path = saved(found.model, tmp_path / "model.onnx")
    with Session(path, load="ram") as session:
        provider: Any = session.provider
        assert provider.bytes_read == found.nbytes  # the head's, which are packed
        session.run({"ids": np.array([[3, 3, 9]])})
        assert provider.bytes_read == found.nbytes + 2 * (96 + 3 * 2)


def test_all_of_a_table_is_decoded_for_who_wants_it() -> None:
    found = TIED["uint8 with zero points"]
    table, _ = Session(found.model).plan.weights
    assert np.array_equal(decode_constant(table), found.dense.astype(np.float32))


def test_tables_that_are_no_matrix_in_parts_stay() -> None:
    """Blocks down the table, ids that differ, rows of nibbles that end within a byte."""
    ids = np.array([[1, 2]])
    odd = tied_integers("uint4", 32, 33, 11, late=True).model
    assert "DequantizeLinear" in operators(odd)
    result: Array = Session(odd).run({"ids": ids})["e"]
    assert result.shape == (1, 2, 33)
    other = tied_integers("int8", 32, 64, 32).model
    other.graph.input.append(other.graph.input[0])
    other.graph.input[1].name = "more"
    next(n for n in other.graph.node if n.output[0] == "sr").input[1] = "more"
    assert operators(other)[:2] == ["Gather", "Gather"]
    with Session(other) as session:
        assert session.run({"ids": ids, "more": ids})["e"].shape == (1, 2, 64)
