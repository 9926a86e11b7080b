"""A small bounded reader of GGUF headers: metadata and where the tensors lie.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ModelError, UnsupportedError
from ..graph import ENCODINGS

MAX_HEADER = 256 * 2**20
"""Bytes of metadata and tensor descriptions that are read at most."""

TYPES: Mapping[int, tuple[str, str]] = {
    0: ("F32", "float32"), 1: ("F16", "float16"), 30: ("BF16", "bfloat16"),
    2: ("Q4_0", "q4_0"), 3: ("Q4_1", "q4_1"), 8: ("Q8_0", "q8_0"),
    12: ("Q4_K", "q4_k"), 13: ("Q5_K", "q5_k"), 14: ("Q6_K", "q6_k"),
}  # fmt: skip
"""ggml's number of a tensor type -> (its name, the encoding of `graph.ENCODINGS`)."""

_OTHER_TYPES: Mapping[int, str] = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its shape in C order (rows, columns), ggml type name, and bytes in `path`."""

    name: str
    shape: tuple[int, ...]
    type: str
    encoding: str
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself. `metadata` holds Python scalars, strings and lists."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Reader:
    """A cursor over the head of a file that reads ahead as needed and never past its bounds."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.position = 0
        self.buffer = b""

    def take(self, count: int) -> int:
        """Advance over `count` bytes, which `buffer` then holds; returns where they begin."""
        start, end = self.position, self.position + count
        if end > len(self.buffer):
            self._fill(end)
        self.position = end
        return start

    def _fill(self, end: int) -> None:
        if end > self.size:
            raise self.error("the header runs past the end of the file")
        if end > MAX_HEADER:
            raise self.error(f"the header is larger than {MAX_HEADER} bytes")
        target = min(max(end, 2 * len(self.buffer), 2**20), self.size)
        self.buffer += self._file.read(target - len(self.buffer))
        if len(self.buffer) < end:
            raise self.error("the file shrank while it was read")

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}; it is damaged or incomplete, download it again")

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize(code))
        return struct.unpack_from("<" + code, self.buffer, start)[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """So many strings, in one loop: a vocabulary has hundreds of thousands."""
        found, buffer, end = [], self.buffer, self.position
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            start = end + 8
            if start > len(buffer):
                self._fill(start)
                buffer = self.buffer
            end = start + unpack(buffer, end)[0]
            if end > len(buffer):
                self._fill(end)
                buffer = self.buffer
            try:
                found.append(buffer[start:end].decode())
            except UnicodeDecodeError as problem:
                raise self.error(f"the string at byte {start} is not UTF-8") from problem
        self.position = end
        return found

    def count(self, smallest: int) -> int:
        """A number of items of at least `smallest` bytes each, checked against what is left."""
        count = int(self.scalar("Q"))
        if count * smallest > min(self.size, MAX_HEADER) - self.position:
            raise self.error(f"{count} items are announced at byte {self.position - 8}, too many")
        return count

    def value(self, kind: int, nesting: int = 0) -> Any:
        """One metadata value of GGUF's type number `kind`."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or nesting > _MAX_NESTING:
            raise self.error(f"metadata type {kind} at byte {self.position} is not valid")
        return self._array(int(self.scalar("I")), nesting + 1)

    def _array(self, kind: int, nesting: int) -> list[Any]:
        if kind == _STRING:
            return self.strings(self.count(8))
        if kind not in _SCALARS:
            return [self.value(kind, nesting) for _ in range(self.count(12))]
        width = struct.calcsize(_SCALARS[kind])
        count = self.count(width)
        start = self.take(count * width)
        return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.buffer, start))


def header(path: str | Path) -> Header:
    """The metadata and tensor descriptions of one GGUF file (version 2 or 3, little-endian).

    Every count, length, size and offset is checked against the file. Raises ModelError for a
    file that is missing, damaged or no GGUF, UnsupportedError for a tensor type we do not read.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        reader = _Reader(path, file)
        version = _version(reader)
        n_tensors, n_fields = reader.count(24), reader.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(n_fields):
            key = reader.string()
            if key in metadata:
                raise reader.error(f"the metadata key '{key}' appears twice")
            metadata[key] = reader.value(reader.scalar("I"))
        tensors: dict[str, TensorInfo] = {}
        described = [_describe(reader) for _ in range(n_tensors)]
        alignment = _alignment(path, metadata)
        data = -(-reader.position // alignment) * alignment
        for name, shape, kind, offset in described:
            if name in tensors:
                raise reader.error(f"the tensor '{name}' appears twice")
            if offset % alignment:
                raise reader.error(f"tensor '{name}' is not aligned to {alignment} bytes")
            tensors[name] = _locate(reader, name, shape, kind, data + offset)
    return Header(path, version, metadata, tensors)


def _version(reader: _Reader) -> int:
    if reader.size < 24 or reader.scalar("I") != int.from_bytes(b"GGUF", "little"):
        raise ModelError(f"{reader.path}: not a GGUF file (its first four bytes are not 'GGUF')")
    version = int(reader.scalar("I"))
    if version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{reader.path}: big-endian GGUF is not supported; use a little-endian file"
        )
    if version not in (2, 3):
        raise UnsupportedError(
            f"{reader.path}: GGUF version {version} is not supported (2 and 3 are); "
            "convert the model again with a current converter"
        )
    return version


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment.bit_count() != 1:
        raise ModelError(f"{path}: general.alignment = {alignment!r} is not a power of two")
    return alignment


def _describe(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's name, shape in C order, type number and offset from the data's beginning."""
    name = reader.string()
    rank = reader.scalar("I")
    if rank > 4:
        raise reader.error(f"tensor '{name}' has {rank} dimensions")
    shape = tuple(reader.scalar("Q") for _ in range(rank))[::-1]
    return name, shape, reader.scalar("I"), reader.scalar("Q")


def _locate(
    reader: _Reader, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> TensorInfo:
    if kind not in TYPES:
        raise UnsupportedError(
            f"{reader.path}: tensor '{name}' has type {_OTHER_TYPES.get(kind, kind)}, which is not "
            f"supported; choose a file of {', '.join(t for t, _ in TYPES.values())}"
        )
    type_name, encoding = TYPES[kind]
    storage = ENCODINGS[encoding]
    elements = 1
    for size in shape:
        elements *= size
    if elements == 0 or (shape[-1] if shape else 1) % storage.block:
        raise reader.error(f"tensor '{name}' of type {type_name} has shape {list(shape)}")
    nbytes = elements // storage.block * storage.nbytes
    if offset + nbytes > reader.size:
        raise reader.error(
            f"tensor '{name}' ends at byte {offset + nbytes}, but the file has {reader.size} bytes"
        )
    return TensorInfo(name, shape, type_name, encoding, reader.path, offset, nbytes)
