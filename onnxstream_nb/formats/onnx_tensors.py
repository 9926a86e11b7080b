"""The tensors of an ONNX model: as `WeightRef`s to where their bytes lie, or as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from ..errors import ModelError, UnsupportedError
from ..graph import DTYPES, WeightRef
from .external_data import ExternalFiles
from .protobuf import LENGTH_KEY, OFFSET_KEY
from .sink import Data

_CHUNK = 8 << 20  # bytes that are written at a time
_BITS = {
    "float32": 32, "uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "int32": 32, "int64": 64,
    "bool": 8, "float16": 16, "float64": 64, "uint32": 32, "uint64": 64, "complex64": 64,
    "complex128": 128, "bfloat16": 16, "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8,
    "float8e5m2fnuz": 8, "uint4": 4, "int4": 4, "float4e2m1": 4,
    "float8e8m0": 8, "uint2": 2, "int2": 2,
}  # fmt: skip


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a raw tensor takes; 2- and 4-bit elements are packed."""
    return (math.prod(shape) * _BITS[dtype] + 7) // 8


def raw_data(arrays: Iterable[np.ndarray[Any, Any]], dtype: str) -> Iterator[Data]:
    """The raw_data of a tensor from its elements in C order, in pieces of at most _CHUNK bytes."""
    bits = _BITS[dtype]
    for array in arrays if bits >= 8 else _packed(arrays, bits):
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.nbytes, _CHUNK):
            yield data[start : start + _CHUNK]


def _packed(
    arrays: Iterable[np.ndarray[Any, Any]], bits: int
) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Elements of 4 or 2 bits, several in a byte, the first in the lower bits."""
    each = 8 // bits
    rest = np.empty(0, np.uint8)
    for array in arrays:
        elements = np.concatenate([rest, np.ascontiguousarray(array).reshape(-1).view(np.uint8)])
        whole = len(elements) // each * each
        rest = elements[whole:]
        yield _joined(elements[:whole].reshape(-1, each), bits)
    if len(rest):
        yield _joined(np.pad(rest, (0, each - len(rest)))[None], bits)


def _joined(
    elements: np.ndarray[Any, np.dtype[np.uint8]], bits: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    joined = elements[:, 0] & np.uint8(2**bits - 1)
    for i in range(1, 8 // bits):
        joined |= (elements[:, i] & np.uint8(2**bits - 1)) << np.uint8(i * bits)
    return joined


class Tensors:
    """Makes sense of TensorProtos whose large raw_data `strip_raw_data` has cut out.

    `source` is what embedded weights refer to, `size` its bytes, `name` how errors call it.
    """

    def __init__(self, name: str, source: Path | bytes, size: int) -> None:
        self.name, self.source, self.size = name, source, size
        self._external = ExternalFiles(source) if isinstance(source, Path) else None

    def dtype(self, number: int, tensor: str) -> str:
        """The name of an element type."""
        if number not in DTYPES:
            raise UnsupportedError(
                f"{self.name}: tensor {tensor!r} has element type {number}, which is not supported"
            )
        return DTYPES[number]

    def weight(self, tensor: TensorProto, name: str) -> WeightRef:
        """A reference to a tensor (not of strings), wherever its bytes are."""
        shape = self._shape(tensor, name)
        dtype = self.dtype(tensor.data_type, name)
        nbytes = stored_bytes(dtype, shape)
        entries = {e.key: e.value for e in tensor.external_data}
        offset, source = 0, self.source
        if tensor.data_location == TensorProto.EXTERNAL:
            if self._external is None:
                raise ModelError(
                    f"{self.name}: tensor {name!r} is in an external file; "
                    "load the model from its path instead of its bytes"
                )
            source, offset = self._external.locate(name, entries, nbytes)
        elif OFFSET_KEY in entries:
            offset = self._embedded(entries, name, nbytes)
        else:
            source = self._inline_bytes(tensor, name, nbytes)
        return WeightRef(name, shape, dtype, source, offset, nbytes)

    def _shape(self, tensor: TensorProto, name: str) -> tuple[int, ...]:
        if any(d < 0 for d in tensor.dims):
            raise ModelError(f"{self.name}: tensor {name!r} has shape {list(tensor.dims)}")
        return tuple(tensor.dims)

    def _embedded(self, entries: dict[str, str], name: str, nbytes: int) -> int:
        """The offset of a large raw_data; a hand-made entry is checked like any other."""
        offset, length = (entries.get(k, "") for k in (OFFSET_KEY, LENGTH_KEY))
        if not all(n.isascii() and n.isdigit() and len(n) < 20 for n in (offset, length)):
            raise ModelError(f"{self.name}: tensor {name!r} has a damaged location")
        if int(length) != nbytes or int(offset) + nbytes > self.size:
            raise self._size_error(name, int(length), nbytes)
        return int(offset)

    def _inline_bytes(self, tensor: TensorProto, name: str, nbytes: int) -> bytes:
        """The bytes of a small tensor, or of one whose elements are protobuf fields."""
        data = tensor.raw_data
        if not tensor.HasField("raw_data"):
            data = numpy_helper.from_array(self.array(tensor, name)).raw_data
        if len(data) != nbytes:
            raise self._size_error(name, len(data), nbytes)
        return data

    def _size_error(self, name: str, found: int, nbytes: int) -> ModelError:
        return ModelError(
            f"{self.name}: tensor {name!r} holds {found} bytes; its shape and type need {nbytes}"
        )

    def array(self, tensor: TensorProto, name: str) -> np.ndarray[Any, Any]:
        """A tensor's values, for attributes: read in, if they were cut out or are external."""
        self._shape(tensor, name)
        dtype = self.dtype(tensor.data_type, name)
        elsewhere = tensor.data_location == TensorProto.EXTERNAL
        if dtype != "string" and (
            elsewhere or any(e.key == OFFSET_KEY for e in tensor.external_data)
        ):
            ref = self.weight(tensor, name)
            tensor = TensorProto(
                dims=tensor.dims, data_type=tensor.data_type, raw_data=_bytes_of(ref)
            )
        elif elsewhere:
            # numpy_helper would open the named file itself.
            raise ModelError(f"{self.name}: tensor {name!r}: strings cannot be external")
        try:
            return numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as e:
            raise ModelError(f"{self.name}: tensor {name!r} is malformed: {e}") from e


def _bytes_of(ref: WeightRef) -> bytes:
    if isinstance(ref.source, bytes):
        return ref.source[ref.offset : ref.offset + ref.nbytes]
    with ref.source.open("rb") as file:
        file.seek(ref.offset)
        return file.read(ref.nbytes)
