"""Panels by NumPy alone: their layout undone, and the bounds of products in integers.

Dims: N rows of K elements, panels (N / 16 rounded up, bytes a panel); M rows of X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_oracles import Array, decoded, random_blocks

from onnxstream_nb.graph import ENCODINGS, WeightRef
from onnxstream_nb.kernels.panel_products import LEAST
from onnxstream_nb.kernels.panels import TOKENS
from onnxstream_nb.kernels.quads import LIMIT, RECORD
from onnxstream_nb.kernels.threads import Team
from onnxstream_nb.registry import kernels
from onnxstream_nb.weights import Weight

UNIT = {"q8_0": 1088, "q4_0": 576, "q4_1": 640, "q4_k": 2368, "q5_k": 2880, "q6_k": 3392}
"""Bytes a unit: 64 elements of 16 rows, 256 for the K encodings."""
ROUNDING = 2.0**-24  # half a float32's last place, relatively
CANARY = 0xA5


def packed(encoding: str, raw: Array, k: int, threads: int = 1) -> Array:
    """Rows (N, bytes a row) as panels, by the kernel, between two panels that it must not touch."""
    raw = np.ascontiguousarray(raw)
    count, step = -(-len(raw) // 16), TOKENS[encoding].panel_bytes(k)
    memory = np.zeros((count + 2, step), np.uint8)
    memory[[0, -1]] = CANARY
    where = raw.ctypes.data, raw.shape[1], memory.ctypes.data + step, step
    Team(threads).run([(kernels()[f"pack_{encoding}"], *where, len(raw), k)])
    assert (memory[[0, -1]] == CANARY).all()
    return memory[1:-1]


def packed_weight(encoding: str, raw: Array, k: int) -> Weight:
    """Stored rows as a native weight (K, N) in panels, whether or not the host profits by it."""
    panels = packed(encoding, raw, k)
    ref = WeightRef(
        "w", (k, len(raw)), "float32", b"", nbytes=panels.nbytes, encoding=encoding,
        transposed=True, panel=panels.shape[1],
    )  # fmt: skip
    return Weight(ref, panels.reshape(-1))


def random_packed(encoding: str, k: int, n: int, rng: Any) -> tuple[Weight, Dense]:
    """A random weight (K, N) in panels, and what it stands for."""
    raw = random_blocks(encoding, n, k, rng)
    return packed_weight(encoding, raw, k), Dense.of(encoding, raw)


# -- the layout, undone --------------------------------------------------------------------------


def _words(units: Array, start: int, count: int, size: int = 4) -> Array:
    """From byte `start` of each unit, `count` times `size` bytes of each of 16 rows in turn ->
    (16, units, count size) bytes of each row."""
    part = units[:, start : start + 16 * count * size].reshape(len(units), count, 16, size)
    return np.moveaxis(part, 2, 0).reshape(16, len(units), count * size)


def _halves(units: Array, start: int) -> Array:
    """An fp16 of each row -> (16, units, 2) bytes."""
    return _words(units, start, 1, 2)


def _k_scales(units: Array) -> Array:
    """Eight 6-bit scales and minima, a byte each in panels -> the 12 bytes of a block."""
    scales, minima = _words(units, 64, 8, 1), _words(units, 192, 8, 1)
    assert scales.max() < 64 and minima.max() < 64
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    return np.concatenate([first, second, (scales[..., 4:] & 15) | minima[..., 4:] << 4], axis=-1)


def _blocks(encoding: str, units: Array) -> Array:
    """(units, bytes) -> (16 rows, units, bytes of each row's blocks there)."""
    if encoding == "q6_k":
        assert not units[:, 32:64].any()
        high, scales = _words(units, 2368, 16), _words(units, 64, 16, 1)
        return np.concatenate([_words(units, 320, 32), high, scales, _halves(units, 0)], axis=-1)
    if encoding in ("q4_k", "q5_k"):
        high = [_words(units, 2368, 8)] if encoding == "q5_k" else []
        start = [_halves(units, 0), _halves(units, 32), _k_scales(units)]
        return np.concatenate([*start, *high, _words(units, 320, 32)], axis=-1)
    quads, scales = (8, 1) if encoding == "q8_0" else (4, 2 if encoding == "q4_1" else 1)
    parts = []
    for group in range(2):
        parts += [_halves(units, 64 * i + 32 * group) for i in range(scales)]
        words = _words(units, 64 * scales + 64 * quads * group, quads)
        parts.append(words ^ 128 if encoding == "q8_0" else words)
    return np.concatenate(parts, axis=-1)


def unpacked(encoding: str, panels: Array) -> Array:
    """Every byte of panels (P, bytes) -> rows (16 P, bytes a row of whole units)."""
    assert panels.shape[1] % UNIT[encoding] == 0
    rows = [_blocks(encoding, panel.reshape(-1, UNIT[encoding])) for panel in panels]
    return np.concatenate(rows).reshape(16 * len(panels), -1)


def row_bytes(encoding: str, k: int) -> int:
    return k // ENCODINGS[encoding].block * ENCODINGS[encoding].nbytes


# -- products ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """What stored rows stand for: float32 values (N, K), and for each of them the sum of the
    magnitudes of what a product adds up for it."""

    values: Array
    terms: Array

    @classmethod
    def of(cls, encoding: str, raw: Array) -> Dense:
        return cls(decoded(encoding, raw), _magnitudes(encoding, raw))


def _magnitudes(encoding: str, raw: Array) -> Array:
    """|w|, and with an offset |scale q| + |offset|, which may be far more than the weight."""
    if encoding not in ("q4_1", "q4_k", "q5_k"):
        return np.abs(decoded(encoding, raw))
    nbytes = ENCODINGS[encoding].nbytes
    blocks = raw.reshape(len(raw), -1, nbytes).copy()
    halves = np.abs(np.ascontiguousarray(blocks[..., :4]).view(np.float16))
    if encoding != "q4_1":  # they subtract the second
        halves[..., 1] *= -1
    blocks[..., :4] = halves.view(np.uint8)
    return decoded(encoding, blocks.reshape(raw.shape))


def rounded(x: Array, limit: int = LIMIT) -> Array:
    """X (M, K) float32 as a product in integers sees it: integers up to `limit` for each group's
    largest, of 15 bits or of 8, float64.

    Both quotients are float32 numbers; what is multiplied is rounded to the nearest integer.
    Groups up to LEAST count as zeros.
    """
    groups = x.reshape(-1, 32)
    largest = np.abs(groups).max(axis=1, keepdims=True)
    scale = largest / np.float32(limit)
    inverse = np.where(largest > LEAST, np.float32(limit) / np.maximum(largest, LEAST), 0)
    whole = np.rint(groups * inverse.astype(np.float32))
    result: Array = (whole.astype(np.float64) * scale).reshape(x.shape)
    return result


def assert_integer_product(y: Array, x: Array, dense: Dense, limit: int = LIMIT) -> None:
    """Y is the product of the rounded X with the dequantised rows, within float32's rounding of
    one term a group and of their sum: K / 32 + 8 roundings of the terms' magnitudes at most."""
    seen = rounded(x, limit)
    wanted = seen @ dense.values.astype(np.float64).T
    bound = (x.shape[-1] / 32 + 8) * ROUNDING * (np.abs(seen) @ dense.terms.astype(np.float64).T)
    error = np.abs(y.astype(np.float64) - wanted)
    assert y.shape == wanted.shape
    assert (error <= bound + 1e-37).all(), f"{(error / (bound + 1e-37)).max()} times the bound"


def records_of(memory: Array) -> Array:
    """Records (..., RECORD) uint8 -> integers (..., 32) that stand for 32 activations."""
    assert memory.shape[-1] == RECORD
    parts = memory[..., :64].view(np.int8).astype(np.int64)
    result: Array = 128 * parts[..., :32] + parts[..., 32:]
    return result
