"""A weight in memory: its bytes, encoded as stored, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import numpy as np

from .errors import UnsupportedError
from .graph import ENCODINGS, WeightRef

SHORT_BITS = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4e2m1": 4}
"""Elements of which a byte holds several."""


class Weight:
    """A weight in memory, encoded as stored.

    `shape` is logical; with `transposed` the bytes hold rows of the last-but-one logical axis.
    `row_bytes` is the length of one stored row, of a packed weight that of a panel of 16 rows
    (kernels/panels.py). `buffer` is a flat uint8 array. Of a weight that is left in its
    file, `read_rows` reads rows (M,) as (M, row_bytes) uint8, and the buffer is empty; `read_row`,
    if there is one, reads a row into memory (row_bytes,) uint8 and keeps no other. The bytes
    of a weight in parts lie one part behind the other. A tile of a larger weight holds its stored
    rows from number `first` on. One that is `lasting` stays where it is while its provider is open.
    """

    __slots__ = (
        "address", "buffer", "first", "lasting", "read_row", "read_rows", "ref", "row_bytes",
    )  # fmt: skip
    in_tiles = False

    def __init__(
        self,
        ref: WeightRef,
        buffer: np.ndarray[Any, Any],
        read_rows: Callable[[Iterable[int]], np.ndarray[Any, Any]] | None = None,
        *,
        read_row: Callable[[int, np.ndarray[Any, Any]], None] | None = None,
        lasting: bool = False,
    ) -> None:
        self.ref = ref
        self.buffer = buffer
        self.read_rows, self.read_row = read_rows, read_row
        self.address = int(buffer.ctypes.data)
        rows = 1
        for n in ref.stored_shape[:-1]:
            rows *= n
        self.row_bytes = ref.panel or (ref.nbytes // rows if rows else 0)
        self.first = 0
        self.lasting = lasting

    def tiles(self) -> Iterator[Weight]:
        """The weight as its bytes come, one stretch of stored rows after the other: here, whole."""
        yield self

    def whole(self) -> Weight:
        """The weight with all of its bytes in memory."""
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, as the graph sees it."""
        return self.ref.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The logical element type."""
        return numpy_dtype(self.ref.dtype)

    @property
    def encoding(self) -> str:
        """The storage's name; "float32", "float16" or "bfloat16" for plain elements."""
        return self.ref.dtype if self.ref.encoding == "raw" else self.ref.encoding

    @property
    def transposed(self) -> bool:
        """Whether the stored form has the last two logical axes swapped."""
        return self.ref.transposed

    @property
    def packed(self) -> bool:
        """Whether the bytes are panels."""
        return self.ref.panel > 0

    @property
    def order(self) -> str:
        """How a matrix (K, N) lies in memory: "rows" (N, K), "columns" (K, N) or "panels"."""
        return "panels" if self.packed else "rows" if self.transposed else "columns"

    @property
    def scale(self) -> float:
        """Of a uint8 encoding: value = (q - zero_point) * scale."""
        return self.ref.scale

    @property
    def zero_point(self) -> int:
        """Of a uint8 encoding: the q that stands for 0."""
        return self.ref.zero_point

    @property
    def T(self) -> Weight:  # noqa: N802 - numpy's name
        """The transposed matrix over the same bytes."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return Weight(replace(self.ref, shape=shape, transposed=not self.transposed), self.buffer)

    @property
    def parts(self) -> tuple[Weight, ...]:
        """What a weight in parts is made of, over the same bytes."""
        ends = accumulate(part.nbytes for part in self.ref.parts)
        return tuple(
            Weight(part, self.buffer[end - part.nbytes : end])
            for part, end in zip(self.ref.parts, ends, strict=True)
        )

    def part_rows(self, ids: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Rows ids (M,) of each part of a table (V, ...), as they are stored: (M, ...) each."""
        if self.read_rows is None:
            rows = [part.buffer.reshape(self.shape[0], -1)[ids] for part in self.parts]
        else:
            ends = accumulate(part.nbytes // self.shape[0] for part in self.ref.parts)
            rows = np.split(self.read_rows(ids), [*ends][:-1], axis=1)
        return tuple(
            Weight(
                replace(part, shape=(len(ids), part.shape[1])),
                np.ascontiguousarray(found).reshape(-1),
            ).stored()
            for part, found in zip(self.ref.parts, rows, strict=True)
        )

    def stored(self) -> np.ndarray[Any, Any]:
        """The stored elements of a plain encoding as an array of `ref.stored_shape`; those of
        less than a byte are unpacked, the lower bits first."""
        dtype, shape = numpy_dtype(self.encoding), self.ref.stored_shape
        bits, buffer = SHORT_BITS.get(self.encoding), self.buffer
        if self.read_rows is not None:
            buffer = self.read_rows(range(math.prod(shape[:-1]))).reshape(-1)
        if bits is None:
            return buffer.view(dtype).reshape(shape)
        each = buffer[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)
        elements = (each & (2**bits - 1)).reshape(-1)[: math.prod(shape)].reshape(shape)
        if not self.encoding.startswith("int"):
            return cast("np.ndarray[Any, Any]", elements.view(dtype))
        top = np.int8(1 << (bits - 1))
        return cast("np.ndarray[Any, Any]", ((elements.view(np.int8) ^ top) - top).astype(dtype))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of an element type's name; ml_dtypes gives those that NumPy lacks.

    Raises UnsupportedError for what has no elements of one type, such as a sequence.
    """
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        spelled = name.replace("float8", "float8_").replace("float4e2m1", "float4_e2m1fn")
        known = getattr(ml_dtypes, spelled.replace("e8m0", "e8m0fnu"), None)
        if known is None:
            raise UnsupportedError(f"elements of type {name!r} are not supported") from None
        return cast("np.dtype[Any]", np.dtype(known))


def encoded_bytes(ref: WeightRef) -> int:
    """How many bytes the reference's shape takes in its encoding."""
    elements = 1
    for n in ref.shape:
        elements *= n
    if ref.encoding == "raw":
        bits = SHORT_BITS.get(ref.dtype) or 8 * numpy_dtype(ref.dtype).itemsize
        return -(-elements * bits // 8)
    encoding = ENCODINGS[ref.encoding]
    return elements // encoding.block * encoding.nbytes
