"""Arrays for CUDA kernels: placed as a GPU places them, poisoned, in the kernels' encodings."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def placed(array: Array) -> Array:
    """A copy whose address is a multiple of 256, as those of device memory are."""
    array = np.ascontiguousarray(array)
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    copy: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def poisoned(*shape: int) -> Array:
    """float32 that nothing was written to."""
    return placed(np.full(shape, np.nan, np.float32))


def in_blocks(w: Array, bits: int) -> tuple[Array, Array, Array]:
    """w (N, K), K a multiple of 32 -> integers as the kernels store them, their float16 scales
    (N, K / 32), and what they stand for, (N, K) float32."""
    n, k = w.shape
    most = 2 ** (bits - 1) - 1
    blocks = w.reshape(n, k // 32, 32)
    scales = (np.abs(blocks).max(axis=2, keepdims=True) / most).astype(np.float16)
    scales[scales == 0] = 1
    q = np.clip(np.rint(blocks / scales.astype(np.float32)), -most - 1, most).astype(np.int8)
    meant = (q * scales.astype(np.float32)).reshape(n, k)
    stored = q.reshape(n, k) if bits == 8 else words_of_nibbles(q.reshape(n, k))
    return placed(stored), placed(scales[..., 0]), meant


def words_of_nibbles(q: Array) -> Array:
    """(N, K) in [-8, 7] -> (N, K / 8) words: of eight, 2 j and 2 j + 1 are nibbles j and j + 4."""
    eights = (q + 8).astype(np.uint32).reshape(*q.shape[:-1], -1, 4, 2)
    shifts = np.array([[4 * j, 4 * j + 16] for j in range(4)], np.uint32)
    return np.bitwise_or.reduce(eights << shifts, axis=(-2, -1))
