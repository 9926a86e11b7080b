"""Models whose weights are kept packed in files, and what such a file holds by another reader."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from kernel_oracles import Array
from onnx_models import saved
from packing_models import TiedModel, feeds, matrix, stored
from quantised_models import Quantised, activations, dequantised, nbits

from onnxstream_nb.graph import Graph, WeightRef
from onnxstream_nb.packed_file import PackedFile
from onnxstream_nb.session import Session, internal

exact = partial(Session, precision="exact")
IDS = [3, 0, 82, 3, 41]

SHIPPED: dict[str, Quantised] = {
    "columns of nibbles": dequantised("int4", 320, 148, 64, zeros=True),
    "odd columns of nibbles": dequantised("uint4", 320, 133, 32, zeros=True),
    "odd zero points": dequantised("uint4", 96, 133, 32, zeros=True, turned=True),
    "rows of nibbles": dequantised("uint4", 320, 133, 32, zeros=True, turned=True),
    "columns of bytes": dequantised("int8", 320, 150, per="row", zeros=True),
    "rows of bytes": dequantised("uint8", 320, 150, 128, turned=True),
    "rows of bytes, one scale": dequantised("int8", 320, 150, per="tensor", turned=True),
    "one row": dequantised("int8", 4096, 1, 32, turned=True, zeros=True),
    "4 bits": nbits(4, 320, 150, 64, zeros="packed"),
    "4 bits, odd blocks": nbits(4, 96, 150, 32, zeros="packed"),
    "8 bits": nbits(8, 320, 133, 32),
}
"""Quantised matrices as ONNX models have them, in several panels."""


def packer() -> Any:
    return internal("Panels")()


def matrices(folder: Path, encoding: str) -> list[WeightRef]:
    """Block-encoded matrices of several sizes in one file."""
    path, data, refs = folder / "w.bin", b"\0" * 5, []
    for i, (k, n) in enumerate(((256, 37), (256, 16), (512, 1), (768, 300))):
        raw = stored(encoding, n, k, i)
        refs.append(matrix(f"w{i}", encoding, raw, k, path, len(data)))
        data += raw.tobytes() + b"\0"
    path.write_bytes(data)
    return refs


def file_of(graph: Graph, folder: Path) -> PackedFile:
    """The file in `folder` of a graph, whose weights with panels are all in files."""
    panel_bytes, stamp = packer().panel_bytes, packer().stamp
    refs = [ref for ref in graph.initializers.values() if ref.name != "embedding"]
    return PackedFile(folder, [r for r in refs if panel_bytes(r)], panel_bytes, stamp)


def only_file(folder: Path) -> Path:
    """The one file of packed weights in a folder; nothing else is there but the lock."""
    (path,) = (path for path in folder.iterdir() if path.name != ".lock")
    assert path.suffix == ".panels"
    return path


def contents(path: Path) -> dict[str, bytes]:
    """The panels in a file by the names of their weights."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    begin = -(-(16 + length) // 4096) * 4096
    return {
        w["name"]: data[begin + w["offset"] : begin + w["offset"] + w["nbytes"]]
        for w in header["weights"]
    }


class Tied:
    """TiedModel's logits by any session options."""

    def __init__(self, folder: Path, encoding: str) -> None:
        self.model = TiedModel(folder, encoding)
        self.path = self.model.path

    def logits(self, ids: list[int] = IDS, **options: Any) -> Array:
        with exact(self.model.graph, **options) as session:
            result: Array = session.run(feeds(ids))["logits"]
        return result


class Shipped:
    """The result of a model of SHIPPED by any session options."""

    def __init__(self, folder: Path, name: str) -> None:
        self.found = SHIPPED[name]
        self.path = saved(self.found.model, folder / "model.onnx")

    def y(self, rows: int = 5, **options: Any) -> Array:
        x = activations(131, self.found.k)[:rows]
        with Session(self.path, **options) as session:
            result: Array = session.run({"x": np.ascontiguousarray(x)})["y"]
        return result
