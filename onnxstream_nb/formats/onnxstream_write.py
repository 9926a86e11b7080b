"""Writing OnnxStream's model folders: `model.txt`, and one `.bin` file per weight.

The form is that of OnnxStream's converter. A convolution's weight is written twice, as (O, I, H, W)
and as (O, H, W, I), which its engine reads; one of one dimension gains a trailing 1. A Gemm's
transposed constant is stored as it is multiplied. Every operator gets a name of its own, since
the engine keeps packed weights by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from ..errors import UnsupportedError
from ..graph import Graph, Node, WeightRef
from ..progress import Report
from .onnxstream_line import OPSET, escape
from .sink import Data, Folder

Array = np.ndarray[Any, Any]

_ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "uint8": 1}
_LONGEST = 200  # characters of a file's name; a system takes 255 with what is added to it
_SMALL = 1 << 16  # elements of a matrix that is looked at before it becomes float16
_FLOAT16_MAX = 65504.0
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Contents:
    """What a graph's weights hold: `read` gives one whole, `pieces` a part after the other in C
    order as an element type; `dims` are a value's sizes, 0 for an open one, None for no idea."""

    read: Callable[[WeightRef], Array]
    pieces: Callable[[WeightRef, str], Iterable[Array]]
    dims: Callable[[str], tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class _File:
    """One weight's file: its name without .bin, how it lies in there, and its elements' type."""

    stem: str
    ref: WeightRef
    layout: str
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.ref.shape) * _ITEM_BYTES[self.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the text declares it."""
        if self.layout == "transposed":
            return self.ref.shape[::-1]
        conv = self.layout in ("nchw", "nhwc")
        return (*self.ref.shape, 1) if conv and len(self.ref.shape) == 3 else self.ref.shape

    @property
    def declaration(self) -> str:
        kind, ref = self.dtype, self.ref
        if kind == "uint8":
            kind = f"uint8[{float(ref.scale)},{ref.zero_point}]"
        return f"{self.stem}.bin({kind}:{','.join(map(str, self.shape))})"


def write(
    graph: Graph, folder: Folder, contents: Contents, report: Report, *, dtype: str = ""
) -> None:
    """Write `graph`, of opset 14, into `folder`, one weight at a time.

    `dtype` is "float32" or "float16", that of matrices; "" leaves them as exact as they are (block
    encodings become float16). Vectors and scalars stay float32: norms, biases and rotary
    frequencies are small. Weights whose encoding is uint8 stay so. Raises UnsupportedError naming
    what the text cannot hold.
    """
    text = _Text(graph, contents, dtype)
    lines = list(text.lines())
    files = text.files.values()
    total = sum(f.nbytes for f in files)
    folder.reserve(total)
    done = 0
    for file in files:
        report(f"writing {file.stem}.bin", done / total if total else None)
        with folder.file(f"{file.stem}.bin") as sink:
            for data in _data(file, contents):
                sink.write(data)
        done += file.nbytes
    with folder.file("model.txt") as sink:
        sink.write("".join(f"{line}\n" for line in lines).encode())


# -- the text


class _Text:
    """The lines of a graph, and the files that they name."""

    def __init__(self, graph: Graph, contents: Contents, dtype: str) -> None:
        self.graph, self.contents, self.dtype = graph, contents, dtype
        self.files: dict[tuple[str, str], _File] = {}
        self._producers = graph.producers()
        self._stems: set[str] = set()
        self._names: set[str] = set()

    def lines(self) -> Iterator[str]:
        """One for each node."""
        for index, node in enumerate(self.graph.nodes):
            attributes = dict(node.attributes)
            inputs = ";".join(self._input(node, i, attributes) for i in range(len(node.inputs)))
            outputs = ";".join(f"{escape(o)}({_dims(self._dims(o))})" for o in node.outputs if o)
            fields = [f"{self._name(node, index)}:{node.op_type}", f"input:{inputs}"]
            fields.append(f"output:{outputs}")
            if attributes:
                fields.append(";".join(_attributes(node, attributes)))
            yield "*".join(fields)

    def _name(self, node: Node, index: int) -> str:
        plain = re.sub(r"[*:\r\n]", "_", node.name) or f"{node.op_type}_{index}"
        name = plain if plain not in self._names else f"{plain}_{index}"
        self._names.add(name)
        return name

    def _dims(self, value: str) -> tuple[int, ...]:
        return self.contents.dims(value) or ()

    def _input(self, node: Node, index: int, attributes: dict[str, Any]) -> str:
        name = node.inputs[index]
        if not name:
            return ""
        ref = self.graph.initializers.get(name)
        if ref is None:
            return f"{escape(name)}({_dims(self._dims(name))})"
        if node.op_type == "Gemm" and attributes.get(("transA", "transB", "")[index], 0):
            attributes.pop(("transA", "transB")[index])
            return self._file(ref, "transposed").declaration
        if node.op_type == "Conv" and index == 1:
            if len(ref.shape) not in (3, 4):
                raise UnsupportedError(f"Conv {node.name!r}: its weight has {len(ref.shape)} axes")
            self._file(ref, "nhwc")
            return self._file(ref, "nchw").declaration
        made = self._producers.get(node.inputs[0])
        filled = made is not None and made.op_type == "ConstantOfShape"
        if node.op_type == "Mul" and index == 1 and ref.dtype == "int64" and filled:
            return self._file(ref, "float").declaration  # OnnxStream fills with floats only
        return self._file(ref, "plain").declaration

    def _file(self, ref: WeightRef, layout: str) -> _File:
        key = (ref.name, layout)
        if key not in self.files:
            stem = self._stem(ref.name, layout)
            dtype = "float32" if layout == "float" else self._element_type(ref)
            self.files[key] = _File(stem, ref, layout, dtype)
        return self.files[key]

    def _stem(self, name: str, layout: str) -> str:
        """A file's name: the weight's own, unless that is too long or another has it."""
        known = next((f.stem for (n, _), f in self.files.items() if n == name), "")
        base = re.sub(r"_(nchw|nhwc)$", "", known) if layout in ("nchw", "nhwc") else ""
        if not base:
            base = escape(name)
            if len(base) > _LONGEST or base in self._stems or base.endswith(("_nchw", "_nhwc")):
                base = f"weight{len(self.files)}"
            self._stems.add(base)
        suffix = "" if layout in ("plain", "float") else f"_{layout}"
        return base + suffix

    def _element_type(self, ref: WeightRef) -> str:
        if ref.dtype == "int64":
            return "int64"
        if ref.dtype != "float32":
            raise UnsupportedError(
                f"weight {ref.name!r}: OnnxStream's text has no elements of type {ref.dtype}"
            )
        if ref.encoding == "uint8":
            return "uint8"
        exact = ref.encoding in ("raw", "float32", "bfloat16")
        wanted = self.dtype or ("float32" if exact else "float16")
        if wanted == "float32" or len(ref.shape) < 2:
            return "float32"
        return "float32" if self._is_table_of_extremes(ref) else "float16"

    def _is_table_of_extremes(self, ref: WeightRef) -> bool:
        """Whether a small matrix, such as a mask, has numbers that float16 has not."""
        if math.prod(ref.shape) > _SMALL:
            return False
        return bool((np.abs(self.contents.read(ref)) > _FLOAT16_MAX).any())


def _dims(sizes: Iterable[int]) -> str:
    return ",".join(map(str, sizes))


def _attributes(node: Node, attributes: Mapping[str, Any]) -> Iterator[str]:
    schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    for name, value in attributes.items():
        kind = str(schema.attributes[name].type).rpartition(".")[2]
        if kind not in _FORMAT:
            raise UnsupportedError(
                f"{node.op_type} {node.name!r}: OnnxStream's text cannot hold its attribute {name}"
            )
        text = _FORMAT[kind](value)
        if re.search(r"[;:*\r\n]", text):
            raise UnsupportedError(
                f"{node.op_type} {node.name!r}: {name} = {text!r} has a character that separates "
                "fields in OnnxStream's text"
            )
        yield f"{name}:{text}"


def _float(value: float) -> str:
    """As Python prints what a float32 holds."""
    return str(float(np.float32(value)))


_FORMAT: Mapping[str, Callable[[Any], str]] = {
    "INT": lambda value: str(int(value)),
    "FLOAT": _float,
    "STRING": lambda value: value.decode() if isinstance(value, bytes) else str(value),
    "INTS": _dims,
    "FLOATS": lambda value: ",".join(map(_float, value)),
    "TENSOR": lambda value: str(np.asarray(value).reshape(-1)[0].item()),
}


# -- the weights


def _data(file: _File, contents: Contents) -> Iterator[Data]:
    """A file's bytes, a bounded piece at a time."""
    if file.layout in ("plain", "float"):
        arrays = contents.pieces(file.ref, "float32" if file.dtype == "uint8" else file.dtype)
    else:
        arrays = iter((_laid_out(contents.read(file.ref), file),))
    for array in arrays:
        elements = _quantised(array, file.ref) if file.dtype == "uint8" else array
        little = elements.astype(np.dtype(file.dtype).newbyteorder("<"), copy=False)
        data = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
        for start in range(0, data.nbytes, _CHUNK):
            yield data[start : start + _CHUNK]


def _laid_out(array: Array, file: _File) -> Array:
    """The whole of a weight as its operator wants it."""
    if file.layout == "transposed":
        return array.T
    shaped = array.reshape(replace(file, layout="nchw").shape)
    return shaped.transpose(0, 2, 3, 1) if file.layout == "nhwc" else shaped


def _quantised(array: Array, ref: WeightRef) -> Array:
    """What stands for the numbers: they are of the form (q - zero_point) * scale already."""
    scale = ref.scale or 1.0  # a weight of zeros only may have none
    stored: Array = np.clip(np.rint(array / scale) + ref.zero_point, 0, 255).astype(np.uint8)
    return stored
