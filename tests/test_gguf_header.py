"""The GGUF header reader against the `gguf` package's, and headers that are damaged or hostile."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb.errors import ModelError, OnnxstreamError
from onnxstream_nb.formats.gguf import header, read
from onnxstream_nb.formats.gguf_header import MAX_HEADER


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def every_type(writer: gguf.GGUFWriter) -> None:
    writer.add_uint8("t.u8", 255)
    writer.add_int8("t.i8", -128)
    writer.add_uint16("t.u16", 65535)
    writer.add_int16("t.i16", -32768)
    writer.add_uint32("t.u32", 2**32 - 1)
    writer.add_int32("t.i32", -(2**31))
    writer.add_uint64("t.u64", 2**64 - 1)
    writer.add_int64("t.i64", -(2**63))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.bool", True)
    writer.add_string("t.string", "häß \U0001f600 " * 3)
    writer.add_string("t.long", "ab" * 10**6)
    writer.add_array("t.strings", ["", "a", "żółw", "b" * 300])
    writer.add_array("t.integers", [-3, 0, 5])
    writer.add_array("t.floats", [0.5, -1.25])
    writer.add_array("t.bools", [True, False, True])
    writer.add_array("t.many", list(range(1000)))


def test_header_equals_that_of_the_gguf_package(path: Path) -> None:
    write_gguf(path, Tiny(), "F16", extra=every_type)
    own, package = header(path), gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in package.fields.items() if not k.startswith("GGUF.")}
    assert own.version == 3
    assert own.metadata == theirs
    assert path.stat().st_size > 2**20  # so that the reader had to read on
    assert list(own.tensors) == [t.name for t in package.tensors]
    for tensor in package.tensors:
        info = own.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist())[::-1]
        assert (info.type, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert (info.offset, info.path) == (tensor.data_offset, path)


def test_nested_arrays_and_other_alignments(path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(256)

    write_gguf(path, Tiny(), extra=extra)
    assert {info.offset % 256 for info in header(path).tensors.values()} == {0}
    nested = array(9, [array(4, [struct.pack("<I", i)]) for i in range(3)])
    path.write_bytes(raw(fields=[("nested", 9, nested)]))
    assert header(path).metadata == {"nested": [[0], [1], [2]]}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name) + packed + struct.pack("<IQ", kind, offset)


def raw(
    fields: list[tuple[str, int, bytes]] | None = None,
    tensors: list[bytes] | None = None,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 0,
) -> bytes:
    """A GGUF file from its parts, well formed or not, with `data` bytes after the header."""
    fields, tensors = fields or [], tensors or []
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<2Q", *(counts or (len(tensors), len(fields))))
    for key, kind, value in fields:
        head += string(key) + struct.pack("<I", kind) + value
    head += b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


DEEP = array(9, [array(9, [array(9, [array(9, [array(9, [array(9, [array(4, [])])])])])])])
U32 = struct.pack("<I", 7)
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "magic": (b"ggjt" + bytes(60), "not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "version 1": (raw(version=1), "version 1 is not supported"),
    "version 4": (raw(version=4), "version 4 is not supported"),
    "too many tensors": (raw(counts=(2**60, 0)), "1152921504606846976 items"),
    "too many fields": (raw(counts=(0, 2**64 - 1)), "18446744073709551615 items"),
    "missing field": (raw(counts=(0, 1)), "damaged"),
    "long key": (raw([("k", 4, U32)])[:24] + struct.pack("<Q", 2**63) + bytes(99), "past the end"),
    "long string": (raw([("k", 8, struct.pack("<Q", 2**40))], data=99), "past the end"),
    "not UTF-8": (raw([("k", 8, string(b"\xff\xfe"))]), "not UTF-8"),
    "long array": (raw([("k", 9, array(4, [], count=2**50))]), "items are announced"),
    "long array of strings": (raw([("k", 9, array(8, [], count=2**50))]), "items are announced"),
    "array of nothing": (raw([("k", 9, array(13, [U32] * 4, count=1))]), "type 13 at byte"),
    "field of unknown type": (raw([("k", 77, U32)]), "metadata type 77"),
    "deep nesting": (raw([("k", 9, DEEP)]), "metadata type 9 at byte"),
    "field twice": (raw([("k", 4, U32), ("k", 4, U32)]), "'k' appears twice"),
    "tensor twice": (raw([], [tensor("w", [8]), tensor("w", [8])], data=32), "'w' appears twice"),
    "alignment": (raw([("general.alignment", 4, U32)]), "general.alignment = 7"),
    "rank": (raw([], [tensor("w", [1] * 5)], data=4), "'w' has 5 dimensions"),
    "no elements": (raw([], [tensor("w", [8, 0])]), r"'w' of type F32 has shape \[0, 8\]"),
    "huge": (raw([], [tensor("w", [2**40, 2**40])]), "'w' ends at byte"),
    "past the end": (raw([], [tensor("w", [8])], data=31), "'w' ends at byte 96, but .* 95"),
    "offset past the end": (raw([], [tensor("w", [8], offset=2**62)], data=32), "'w' ends at"),
    "unaligned": (raw([], [tensor("w", [8], offset=4)], data=64), "'w' is not aligned to 32"),
    "part of a block": (raw([], [tensor("w", [48], 8)], data=99), r"Q8_0 has shape \[48\]"),
    "scalar of a block type": (raw([], [tensor("w", [], 8)], data=99), r"Q8_0 has shape \[\]"),
    "other type": (raw([], [tensor("w", [256], 10)], data=99), "'w' has type Q2_K.*choose.*Q4_K"),
    "unknown type": (raw([], [tensor("w", [256], 999)], data=99), "'w' has type 999"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused_with_the_reason(path: Path, case: str) -> None:
    data, message = BAD_HEADERS[case]
    path.write_bytes(data)
    with pytest.raises(OnnxstreamError, match=message) as caught:
        header(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_an_error(path: Path) -> None:
    write_gguf(path, replace(Tiny(), layers=1))
    data = path.read_bytes()
    end = max(info.offset + info.nbytes for info in header(path).tensors.values())
    for length in [*range(0, 1500, 7), *range(1500, end, 997), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError):
            header(path)


def test_header_of_a_sparse_giant_is_refused_before_it_is_read(path: Path) -> None:
    start = raw([("k", 8, struct.pack("<Q", MAX_HEADER + 1))])
    with path.open("wb") as file:
        file.write(start)
        file.truncate(2**40)
    with pytest.raises(ModelError, match="the header is larger than"):
        header(path)


def test_missing_file_and_folder(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(ModelError, match="no such file"):
            header(missing)


def test_flipped_bytes_are_read_or_refused_but_never_crash(path: Path) -> None:
    write_gguf(path, replace(Tiny(), layers=1), "Q8_0")
    data, chance = path.read_bytes(), random.Random(1)
    first = min(info.offset for info in header(path).tensors.values())
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(first)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
        except OnnxstreamError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100
