"""A small bounded reader of safetensors headers: which tensors a file holds, and where.

The format: 8 bytes of little-endian length, that many bytes of JSON, then the tensors without
gaps (https://huggingface.co/docs/safetensors). Also reads the other JSON files of a model folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError

MAX_JSON = 100_000_000
"""Bytes of JSON that are read at most; the format's own limit of a header."""

_ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its shape in C order, the format's dtype name, and its bytes in `path`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> description, every offset checked against dtype, shape and file size."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; download the model again")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise _damaged(path, f"a header of {length} bytes does not fit the file's {size} bytes")
        entries = parse_object(path, file.read(length))
    entries.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _describe(path, name, entry, data) for name, entry in entries.items()}
    end = data
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise _damaged(path, f"tensor '{info.name}' overlaps another or leaves a gap before it")
        end += info.nbytes
    if end != size:
        raise _damaged(path, f"the tensors end at byte {end}, but the file has {size} bytes")
    return tensors


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, the content of `path`; a key that appears twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        raise _damaged(path, f"not valid JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise _damaged(path, "the JSON is not an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; a Hugging Face model folder needs it")
    if path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path}: larger than {MAX_JSON} bytes")
    return parse_object(path, path.read_bytes())


def _describe(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor '{name}' is not described by dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise _damaged(path, f"tensor '{name}' has the unknown dtype {dtype!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor '{name}' has shape {shape!r}, data_offsets {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if nbytes * 8 != math.prod(shape) * _ITEM_BITS[dtype]:
        raise _damaged(path, f"tensor '{name}': {nbytes} bytes do not hold {dtype} {shape}")
    return TensorInfo(name, tuple(shape), dtype, path, data + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(map(_size, value))


def _size(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: {what}; it is damaged or incomplete, download it again")
