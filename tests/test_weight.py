"""A weight in memory: what its bytes stand for, from either side, and what its rows are."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from kernel_oracles import ORDERS, random_weight

from onnxstream_nb.graph import ENCODINGS, WeightRef
from onnxstream_nb.weights import Weight, encoded_bytes, numpy_dtype


def test_weight_seen_from_both_sides() -> None:
    values = np.arange(15, dtype=np.float16).reshape(5, 3)
    ref = WeightRef("w", (3, 5), "float32", values.tobytes(), 0, 30, "float16", transposed=True)
    weight = Weight(ref, np.frombuffer(ref.source, np.uint8))
    assert weight.shape == (3, 5) and weight.dtype == np.float32
    assert weight.encoding == "float16" and weight.row_bytes == 6
    np.testing.assert_array_equal(weight.stored(), values)
    turned = weight.T
    assert turned.shape == (5, 3) and not turned.transposed and turned.row_bytes == 6
    assert turned.address == weight.address and turned.T.ref == ref
    np.testing.assert_array_equal(turned.stored(), values)


def test_raw_weights_are_named_by_their_type() -> None:
    ref = WeightRef("w", (3,), "float16", bytes(6), 0, 6)
    weight = Weight(ref, np.frombuffer(bytes(6), np.uint8))
    assert weight.encoding == "float16" and weight.stored().dtype == np.float16


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"])
def test_sizes_of_quantised_tensors(name: str) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert (ENCODINGS[name].block, ENCODINGS[name].nbytes) == (block, nbytes)
    ref = WeightRef("w", (3, 5 * block), "float32", b"", encoding=name)
    assert encoded_bytes(ref) == 3 * 5 * nbytes


def test_sizes_of_plain_tensors() -> None:
    for dtype, nbytes in (("int64", 8), ("float16", 2), ("bfloat16", 2), ("bool", 1)):
        assert encoded_bytes(WeightRef("w", (7, 3), dtype, b"")) == 21 * nbytes
        assert numpy_dtype(dtype).itemsize == nbytes
    assert encoded_bytes(WeightRef("w", (7, 3), "float32", b"", encoding="bfloat16")) == 42
    assert encoded_bytes(WeightRef("w", (), "float64", b"")) == 8
    for name in ("float8e4m3fn", "float8e5m2", "int4", "uint4"):
        assert numpy_dtype(name).itemsize == 1


@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_rows_of_a_matrix_are_a_matrix(encoding: str, transposed: bool) -> None:
    """Of the same encoding and order; their bytes are a stretch of the whole one's."""
    from onnxstream_nb.kernels.weight import decode

    k, n = (256, 37) if transposed else (37, 256)
    weight, wanted = random_weight(encoding, k, n, np.random.default_rng(0), transposed)
    dense = decode(weight)
    assert np.allclose(dense, wanted, rtol=1e-6, atol=0)
    whole = replace(weight.ref, source=bytes(weight.buffer))
    assert whole.cut_by_rows
    for start, stop in ((0, 37), (0, 1), (5, 32), (36, 37), (7, 7)):
        ref = whole.rows(start, stop)
        assert ref.nbytes == encoded_bytes(ref) == (stop - start) * weight.row_bytes
        data = np.frombuffer(whole.source, np.uint8, ref.nbytes, ref.offset)
        part = decode(Weight(ref, data))
        assert np.array_equal(part, dense[:, start:stop] if transposed else dense[start:stop])
        assert (ref.scale, ref.zero_point) == (whole.scale, whole.zero_point)
    assert whole.rows(3, 37).rows(4, 9) == whole.rows(7, 12)
    assert whole.rows(0, 37).matrix == whole.matrix != whole.rows(0, 36).matrix


def test_what_cannot_be_cut_by_rows() -> None:
    for shape, dtype in (((6,), "float32"), ((), "float32"), ((2, 3, 4), "float32"),
                         ((0, 4), "float32"), ((4, 3), "uint4")):  # fmt: skip
        ref = WeightRef("w", shape, dtype, b"")
        assert not replace(ref, nbytes=encoded_bytes(ref)).cut_by_rows
    parts = (WeightRef("q", (4, 4), "uint8", b"", 0, 16), WeightRef("s", (1, 4), "float32", b""))
    assert not WeightRef("w", (4, 4), "float32", b"", 0, 32, "affine8", parts=parts).cut_by_rows
