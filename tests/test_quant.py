"""Every GGUF encoding decodes exactly as the `gguf` package does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_oracles import BLOCKED, PLAIN, decoded, random_blocks, stored_matrix

from onnxstream_nb.graph import ENCODINGS
from onnxstream_nb.kernels.threads import Team
from onnxstream_nb.registry import kernels

Array = np.ndarray[Any, Any]
SCALES = {
    "zero": (0.0, 0.0),
    "negative zero": (-0.0, -0.0),
    "least denormal": (6e-8, -6e-8),
    "denormal": (3.1e-5, 5.9e-5),
    "largest": (65504.0, -65504.0),
    "only a minimum": (0.0, -1.25),
    "only a scale": (-0.75, 0.0),
}


def decode(encoding: str, raw: Array, k: int, ids: Array | None = None, threads: int = 1) -> Array:
    """The kernel's float32 rows, between rows of canaries."""
    n = len(raw) if ids is None else ids.size
    out = np.full((n + 2, k), 1234.5, np.float32)
    raw = np.ascontiguousarray(raw)
    row_bytes, where = raw.nbytes // max(1, len(raw)), 0 if ids is None else ids.ctypes.data
    kernel = kernels()[f"decode_{encoding}"]
    target = out.ctypes.data + 4 * k
    Team(threads).run([(kernel, raw.ctypes.data, row_bytes, target, n, k, where)])
    assert (out[[0, -1]] == 1234.5).all()
    return out[1:-1]


@pytest.mark.parametrize("encoding", BLOCKED)
def test_random_blocks_decode_exactly(encoding: str) -> None:
    rng = np.random.default_rng(1)
    for rows, blocks in ((1, 1), (97, 3), (5, 8)):
        k = blocks * ENCODINGS[encoding].block
        raw = random_blocks(encoding, rows, k, rng)
        assert np.array_equal(decode(encoding, raw, k), decoded(encoding, raw))


@pytest.mark.parametrize("encoding", BLOCKED)
def test_scales_of_every_magnitude_decode_exactly(encoding: str) -> None:
    rng = np.random.default_rng(2)
    block = ENCODINGS[encoding].block
    bits = rng.integers(0, 0x7C00, (2000, 1, 2), dtype=np.uint16)  # every finite magnitude
    bits |= rng.integers(0, 2, bits.shape, dtype=np.uint16) << 15
    raw = random_blocks(encoding, 2000, block, rng, bits.view(np.float16))
    assert np.array_equal(decode(encoding, raw, block), decoded(encoding, raw))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_special_scales_decode_exactly(encoding: str, scales: str) -> None:
    k = 2 * ENCODINGS[encoding].block
    raw = random_blocks(encoding, 9, k, np.random.default_rng(3), SCALES[scales])
    wanted = decoded(encoding, raw)
    assert np.isfinite(wanted).all()
    assert np.array_equal(decode(encoding, raw, k), wanted)


@pytest.mark.parametrize("encoding", BLOCKED)
def test_uniform_bytes_decode_exactly(encoding: str) -> None:
    k = ENCODINGS[encoding].block
    wide = encoding in ("q4_1", "q4_k", "q5_k")
    scales = slice(-2, None) if encoding == "q6_k" else slice(0, 4 if wide else 2)
    for byte in (0x00, 0xFF, 0x55, 0xAA, 0x0F, 0xF0):
        raw = np.full((1, ENCODINGS[encoding].nbytes), byte, np.uint8)
        raw[:, scales] = np.array([0.5, 0.25][: 1 + wide], np.float16).view(np.uint8)
        assert np.array_equal(decode(encoding, raw, k), decoded(encoding, raw)), hex(byte)


@pytest.mark.parametrize("encoding", [*PLAIN, "uint8"])
def test_plain_elements_decode_exactly_with_tails(encoding: str) -> None:
    rng = np.random.default_rng(6)
    for k in (1, 15, 31, 32, 33, 64, 77):
        raw, values = stored_matrix(encoding, 5, k, rng)
        wanted = raw.astype(np.float32) if encoding == "uint8" else values
        assert np.array_equal(decode(encoding, raw, k), wanted), k


@pytest.mark.parametrize("encoding", [*PLAIN, *BLOCKED])
def test_chosen_rows_decode_in_the_order_asked_for(encoding: str) -> None:
    raw, values = stored_matrix(encoding, 11, 256, np.random.default_rng(7))
    ids = np.array([10, 0, 3, 3, 7, 1, 10], np.int64)
    for threads in (1, 2, 5, 11):
        assert np.array_equal(decode(encoding, raw, 256, ids, threads), values[ids])
        assert np.array_equal(decode(encoding, raw, 256, None, threads), values)
    assert decode(encoding, raw, 256, ids[:0]).shape == (0, 256)
