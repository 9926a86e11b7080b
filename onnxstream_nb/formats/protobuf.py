"""Find the weights inside a serialized ONNX model without reading them.

`strip_raw_data` walks protobuf's wire format (https://protobuf.dev/programming-guides/encoding),
descending only into the messages that can hold a tensor, and cuts every large `raw_data` out. In
its place the tensor gets two `external_data` entries that say where in the file the bytes lie. The
result is small, valid protobuf for the onnx package to parse. Every length is checked against
the message around it, and nothing larger than the stripped result is held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from ..errors import ModelError

OFFSET_KEY = "onnxstream_nb.offset"
LENGTH_KEY = "onnxstream_nb.length"

KEEP = 1024  # messages up to this many bytes are copied whole: no large weight fits in them
_MAX_DEPTH = 100  # protobuf's own limit
_MAX_BYTES = 2**31 - 1  # a protobuf message cannot be larger

# Message -> field number -> the message it holds, where that one may hold a tensor (onnx.proto3).
_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {},
}
_TRAINING_INFO = ("model", 20)  # not used in inference, and may be as large as the model
_RAW_DATA = ("tensor", 9)
_EXTERNAL_DATA = 13
_FIXED_SIZE = {1: 8, 5: 4}  # wire type -> bytes
_VARINT, _LENGTH_DELIMITED = 0, 2


def strip_raw_data(file: BinaryIO, size: int, name: str) -> bytes:
    """The serialized ModelProto in `file` (of `size` bytes) with large raw_data cut out.

    `name` is how errors call the file. Raises ModelError when the bytes are no valid protobuf.
    """
    return _Scanner(file, size, name).message("model", 0, size, 0)


class _Scanner:
    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        self.copied = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> bytes:
        """The message of `kind` at [start, end), stripped."""
        if depth > _MAX_DEPTH:
            raise self.error(f"messages are nested more than {_MAX_DEPTH} deep", start)
        parts = []
        position = start
        while position < end:
            tag, body = self.varint(position, end)
            field, wire_type = tag >> 3, tag & 7
            if field == 0:
                raise self.error("field number 0", position)
            body, after = self.extent(wire_type, body, end)
            large = wire_type == _LENGTH_DELIMITED and after - body > KEEP
            if large and (kind, field) == _RAW_DATA:
                parts.append(_location(body, after - body))
            elif large and field in _CHILDREN[kind]:
                child = self.message(_CHILDREN[kind][field], body, after, depth + 1)
                parts.append(_delimited(field, child))
            elif (kind, field) != _TRAINING_INFO:
                parts.append(self.copy(position, after))
            position = after
        return b"".join(parts)

    def extent(self, wire_type: int, position: int, end: int) -> tuple[int, int]:
        """Where the value of a field begins and ends; `position` is just after its tag."""
        if wire_type == _VARINT:
            return position, self.varint(position, end)[1]
        if wire_type == _LENGTH_DELIMITED:
            length, position = self.varint(position, end)
            after = position + length
        elif wire_type in _FIXED_SIZE:
            after = position + _FIXED_SIZE[wire_type]
        else:
            raise self.error(f"wire type {wire_type}", position)
        if after > self.size:
            raise self.error(
                f"truncated: a field there ends at byte {after}, the file has {self.size}", position
            )
        if after > end:
            raise self.error("a field passes the end of its message", position)
        return position, after

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """The base-128 number at `position`, and the position after it."""
        self.file.seek(position)
        value = 0
        for i, byte in enumerate(self.file.read(min(10, end - position))):
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return value, position + i + 1
        raise self.error("truncated or malformed number", position)

    def copy(self, start: int, end: int) -> bytes:
        self.copied += end - start
        if self.copied > _MAX_BYTES:
            raise self.error("more than 2 GiB beside the weights' raw_data", start)
        self.file.seek(start)
        data = self.file.read(end - start)
        if len(data) != end - start:
            raise self.error("the file became shorter while it was read", start)
        return data

    def error(self, what: str, position: int) -> ModelError:
        return ModelError(
            f"{self.name}: not an intact ONNX model (at byte {position}: {what}); "
            "fetch or export it again"
        )


def _location(offset: int, length: int) -> bytes:
    entries = ((OFFSET_KEY, offset), (LENGTH_KEY, length))
    return b"".join(
        _delimited(_EXTERNAL_DATA, _delimited(1, key.encode()) + _delimited(2, str(value).encode()))
        for key, value in entries
    )


def _delimited(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
