"""The safetensors header reader against the package's, and headers that are damaged or hostile."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors
from llama_fixtures import write_hf
from llama_oracle import Tiny

from onnxstream_nb.errors import ModelError, OnnxstreamError
from onnxstream_nb.formats.safetensors import read
from onnxstream_nb.formats.safetensors_header import read_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_header_equals_that_of_the_safetensors_package(folder: Path) -> None:
    held = write_hf(folder, Tiny("qwen3"), "BF16")
    file = folder / "model.safetensors"
    own, data = read_header(file), file.read_bytes()
    theirs = dict(safetensors.deserialize(data))
    assert own.keys() == theirs.keys() == held.keys()
    for name, tensor in theirs.items():
        info = own[name]
        assert (info.dtype, list(info.shape)) == (tensor["dtype"], tensor["shape"])
        assert data[info.offset : info.offset + info.nbytes] == bytes(tensor["data"])


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HEADERS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "the JSON is not an object"),
    "entry": ({"w": 5}, "'w' is not described by"),
    "fields": ({"w": {"dtype": "F32", "shape": [2]}}, "'w' is not described by"),
    "dtype": ({"w": entry(dtype="F33")}, "'w' has the unknown dtype 'F33'"),
    "dtype list": ({"w": entry(dtype=["F32"])}, r"unknown dtype \['F32'\]"),
    "negative": ({"w": entry(shape=[-2])}, r"'w' has shape \[-2\]"),
    "fraction": ({"w": entry(shape=[2.0])}, r"'w' has shape \[2.0\]"),
    "truth": ({"w": entry(shape=[True, 2])}, r"'w' has shape \[True, 2\]"),
    "rank": ({"w": entry(shape=[1] * 17)}, "'w' has shape"),
    "offsets": ({"w": entry(data_offsets=[0, 4, 8])}, r"data_offsets \[0, 4, 8\]"),
    "backwards": ({"w": entry(data_offsets=[8, 0])}, "'w': -8 bytes do not hold"),
    "huge": ({"w": entry(shape=[2**40, 2**40])}, "'w': 8 bytes do not hold F32"),
    "gap": ({"w": entry(data_offsets=[4, 12])}, "'w' overlaps another or leaves a gap"),
    "overlap": ({"v": entry(), "w": entry()}, "overlaps another"),
    "beyond": ({"v": entry(), "w": entry(data_offsets=[8, 16])}, "end at byte .* but the file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_is_refused(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, bytes(8), bytes([3]) + bytes(9)])
def test_file_that_is_no_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="download it again"):
        read_header(path)


def test_truncated_and_flipped_files_are_read_or_refused(folder: Path) -> None:
    write_hf(folder, Tiny())
    file = folder / "model.safetensors"
    data, chance = file.read_bytes(), random.Random(1)
    for length in [*range(0, 3000, 37), len(data) - 1]:
        file.write_bytes(data[:length])
        with pytest.raises(ModelError):
            read(folder)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[chance.randrange(2000)] = chance.randrange(256)
        file.write_bytes(damaged)
        try:
            read(folder)
        except OnnxstreamError:
            refused += 1
    assert refused > 100
