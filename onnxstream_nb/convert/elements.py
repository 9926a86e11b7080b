"""The elements of a weight in the order that ONNX wants them, a bounded piece at a time.

Dims: a matrix is stored as N rows of K elements; its logical form is that, or (K, N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UsageError
from ..files import aligned
from ..graph import WeightRef
from ..session import decode_constant
from ..weights import DiskProvider, numpy_dtype

Array = np.ndarray[Any, Any]

PIECE = 1 << 22  # elements that are read at a time
STRIP = 1 << 28  # bytes of a matrix that is being transposed
CHUNK = 8 << 20  # bytes that are copied at a time
_PLAIN = ("raw", "float32", "float16", "bfloat16")
_STRIPE = 16  # rows that are transposed at a time: their columns share cache lines
_LARGEST = 65504


def pieces(ref: WeightRef, dtype: str) -> Iterator[Array]:
    """The logical elements in C order, as `dtype`, in arrays of some rows each.

    At most STRIP bytes of a transposed matrix are in memory at a time; what its file has is then
    read as often as that takes. Raises UsageError for a value that float16 cannot hold.
    """
    if not math.prod(ref.shape):
        return
    if not ref.transposed and not ref.parts:
        columns = ref.shape[-1] if ref.shape else 1
        flat = replace(ref, shape=(math.prod(ref.shape) // columns, columns))
        yield from (as_dtype(rows, dtype, ref.name) for _, rows in _rows(flat))
    elif len(ref.shape) == 2 and ref.cut_by_rows and not ref.parts:
        yield from _transposed(ref, dtype)
    else:
        yield as_dtype(np.ascontiguousarray(decode_constant(ref)), dtype, ref.name)


def as_dtype(array: Array, dtype: str, name: str) -> Array:
    """The elements in another type; a float16 that would be infinite is a UsageError."""
    wanted = numpy_dtype(dtype)
    if array.dtype == wanted:
        return array
    with np.errstate(over="ignore"):
        result: Array = array.astype(wanted)
    if dtype == "float16" and ((result.view(np.uint16) & 0x7FFF) == 0x7C00).any():
        worst = np.abs(array.astype(np.float32)).max()
        raise UsageError(
            f"weight {name!r} has a value of {worst:g}, and float16 ends at {_LARGEST}: convert "
            "with --dtype bf16, which has the range of float32"
        )
    return result


def copied(ref: WeightRef) -> Iterator[Array]:
    """The stored bytes as they are, in pieces of uint8."""
    provider = DiskProvider()
    try:
        for start in range(0, ref.nbytes, CHUNK):
            yield provider.read(ref, start, min(start + CHUNK, ref.nbytes))
    finally:
        provider.close()


def _rows(ref: WeightRef) -> Iterator[tuple[int, Array]]:
    """(first row, (R, K) elements) of a matrix's stored rows; block encodings as float32."""
    n, k = ref.stored_shape
    step = max(1, PIECE // k)
    provider = DiskProvider()
    try:
        for start in range(0, n, step):
            part = ref.rows(start, min(start + step, n))
            if ref.encoding in _PLAIN:
                yield start, provider.get(part).stored()
            else:
                rows = decode_constant(part)
                yield start, rows.T if ref.transposed else rows
    finally:
        provider.close()


def _transposed(ref: WeightRef, dtype: str) -> Iterator[Array]:
    """(K, N) of stored (N, K), as strips of whole rows."""
    n, k = ref.stored_shape
    wanted = numpy_dtype(dtype)
    width = min(k, max(1, STRIP // (n * wanted.itemsize)))
    for first in range(0, k, width):
        last = min(first + width, k)
        size = (last - first) * n * wanted.itemsize
        strip = aligned(size)[:size].view(wanted).reshape(last - first, n)
        for row, rows in _rows(ref):
            _turn(as_dtype(rows[:, first:last], dtype, ref.name), strip[:, row : row + len(rows)])
        yield strip


def _turn(rows: Array, columns: Array) -> None:
    """rows (R, K) -> columns (K, R), of elements of any type."""
    plain = np.dtype(f"u{rows.dtype.itemsize}")
    rows, columns = rows.view(plain), columns.view(plain)
    for i in range(0, len(rows), _STRIPE):
        columns[:, i : i + _STRIPE] = rows[i : i + _STRIPE].T
