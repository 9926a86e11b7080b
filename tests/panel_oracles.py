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


def _words(panel: Array, start: int, count: int, size: int = 4) -> Array:
    """From byte `start` of a panel, `count` times `size` bytes of each of 16 rows in turn ->
    (16, count size) bytes of each row."""
    part = panel[start : start + 16 * count * size].reshape(count, 16, size)
    return np.moveaxis(part, 1, 0).reshape(16, count * size)


def _bits(numbers: Array, width: int) -> Array:
    """(rows, n) integers of `width` bits -> (rows, n width) bits, the lowest of each first."""
    each = numbers[..., None].astype(np.int64) >> np.arange(width) & 1
    return each.reshape(len(numbers), -1)


def _k_scales(panel: Array, start: int) -> Array:
    """Four times 48 bytes: an uint16 of each row, then a byte, that hold the scales and minima of
    two groups -> the 12 bytes of each row's block."""
    numbers = np.empty((16, 2, 8), np.uint8)  # scales and minima
    for pair in range(4):
        at = start + 48 * pair
        words = _words(panel, at, 1, 2).view(np.uint16)
        bits = np.concatenate([_bits(words, 16), _bits(_words(panel, at + 32, 1, 1), 8)], axis=1)
        places = range(6), range(6, 12), range(16, 22), (*range(12, 16), 22, 23)
        values = [bits[:, list(place)] @ (1 << np.arange(6)) for place in places]
        numbers[:, 0, 2 * pair : 2 * pair + 2] = np.stack(values[:2], axis=1)
        numbers[:, 1, 2 * pair : 2 * pair + 2] = np.stack(values[2:], axis=1)
    scales, minima = numbers[:, 0], numbers[:, 1]
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | minima[:, 4:] << 4], axis=1)


def _block(encoding: str, panel: Array, i: int) -> Array:
    """Block i of the 16 rows of a panel, as it is stored: (16, bytes a block)."""
    nbytes = 16 * ENCODINGS[encoding].nbytes
    start = nbytes * i
    if encoding == "q4_1":
        return np.concatenate([_words(panel, start, 2, 2), _words(panel, start + 64, 4)], axis=1)
    if encoding in ("q4_k", "q5_k"):
        high = [_words(panel, start + 2304, 8)] if encoding == "q5_k" else []
        head = _words(panel, start, 2, 2), _k_scales(panel, start + 64)
        return np.concatenate([*head, *high, _words(panel, start + 256, 32)], axis=1)
    # Of two blocks, the first has its scales behind it and the second before it.
    scale = _words(panel, start + (0 if i % 2 else nbytes - 32), 1, 2)
    start += 32 * (i % 2)
    if encoding == "q6_k":
        low, high = _words(panel, start + 256, 32), _words(panel, start + 2304, 16)
        return np.concatenate([low, high, _words(panel, start, 16, 1), scale], axis=1)
    words = _words(panel, start, nbytes // 64)
    return np.concatenate([scale, words ^ 128 if encoding == "q8_0" else words], axis=1)


def unpacked(encoding: str, panels: Array) -> Array:
    """Every byte of panels (P, bytes) -> rows (16 P, bytes a row)."""
    count, rest = divmod(panels.shape[1], 16 * ENCODINGS[encoding].nbytes)
    assert not rest
    rows = [[_block(encoding, panel, i) for i in range(count)] for panel in panels]
    return np.concatenate([np.concatenate(blocks, axis=1) for blocks in rows])


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
