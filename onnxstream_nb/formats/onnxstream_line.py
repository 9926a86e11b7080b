"""One line of OnnxStream's model.txt, read as an operator of opset 14.

    NAME:TYPE*input:T;T;...*output:T;...[*attribute:value;attribute:value]

A runtime tensor T is `name(dims)`, a weight `file.bin(type:dims)`, an omitted input nothing.
The text does not say of which type an attribute is: the operator's schema does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..errors import ModelError, UnsupportedError
from ..graph import WeightRef
from .external_data import resolve

OPSET = 14

_TENSOR = re.compile(r"([^()]*)\(([^()]*)\)")
_WEIGHT = re.compile(r"(float32|float16|int64|uint8\[([^,\]]+),([^,\]]+)\]):([0-9,]*)")
_ESCAPE = re.compile(r"_([0-9A-F]+)_")
_ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Runtime:
    """A tensor that an operator or the user provides; 0 in `dims` is an open size."""

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight; `channels_last` when its file holds a convolution's weight as (O, H, W, I)."""

    ref: WeightRef
    channels_last: bool


@dataclass(frozen=True, slots=True)
class Operator:
    """What a line says; an omitted input is None."""

    name: str
    op_type: str
    inputs: tuple[Runtime | Stored | None, ...]
    outputs: tuple[Runtime, ...]
    attributes: Mapping[str, Any]


def parse(path: Path, number: int, text: str) -> Operator:
    """Read line `number` of the model.txt at `path`; errors name both."""
    return _Line(path, number).operator(text)


def escape(name: str) -> str:
    """A tensor's name as OnnxStream writes it: all but ASCII letters and digits as `_HEX_`."""
    return re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m[0]):X}_", name)


def unescape(name: str) -> str:
    """The name that `escape` was given. Raises ValueError for a code that is no character."""
    try:
        plain = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), name)
    except OverflowError as e:
        raise ValueError(str(e)) from e
    plain.encode()  # a lone surrogate is no character
    return plain


class _Line:
    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self.where = f"{path}:{number}"

    def operator(self, text: str) -> Operator:
        head, *fields = text.split("*")
        name, _, op_type = head.rpartition(":")
        labels = [f.partition(":")[0] for f in fields[:2]]
        if len(fields) not in (2, 3) or labels != ["input", "output"]:
            raise self.error("not of the form NAME:TYPE*input:...*output:...[*attributes]")
        schema = self.schema(op_type)
        inputs, outputs = (self.tensors(f.partition(":")[2]) for f in fields[:2])
        if not schema.min_input <= len(inputs) <= schema.max_input:
            raise self.error(f"{op_type} of opset {OPSET} does not take {len(inputs)} inputs")
        results = tuple(t for t in outputs if isinstance(t, Runtime))
        if not results or len(results) < len(outputs) or len(results) > schema.max_output:
            raise self.error(f"{op_type} cannot have the outputs {fields[1]!r}")
        attributes = dict(self.attributes(schema, fields[2])) if len(fields) == 3 else {}
        return Operator(name, op_type, inputs, results, attributes)

    def schema(self, op_type: str) -> onnx.defs.OpSchema:
        try:
            return onnx.defs.get_schema(op_type, OPSET, "")
        except onnx.defs.SchemaError as e:
            raise UnsupportedError(
                f"{self.where}: {op_type!r} is no ONNX operator of opset {OPSET}"
            ) from e

    def tensors(self, text: str) -> tuple[Runtime | Stored | None, ...]:
        return tuple(self.tensor(t) if t else None for t in text.split(";")) if text else ()

    def tensor(self, text: str) -> Runtime | Stored:
        match = _TENSOR.fullmatch(text)
        if match is None or not match[1]:
            raise self.error(f"{text!r} is not of the form name(dims) or file.bin(type:dims)")
        if ":" in match[2] or match[1].endswith(".bin"):
            return self.weight(match[1], match[2])
        return Runtime(self.name(match[1]), self.dims(match[2]))

    def name(self, escaped: str) -> str:
        try:
            return unescape(escaped)
        except ValueError as e:
            raise self.error(f"{escaped!r} is not a name that OnnxStream writes") from e

    def dims(self, text: str) -> tuple[int, ...]:
        parts = text.split(",") if text else []
        if not all(p.isascii() and p.isdigit() and len(p) < 19 for p in parts):
            raise self.error(f"({text}) are no dimensions")
        return tuple(map(int, parts))

    def weight(self, file: str, declaration: str) -> Stored:
        """A weight, its file found and measured."""
        match = _WEIGHT.fullmatch(declaration)
        if match is None or not file.endswith(".bin"):
            raise self.error(
                f"{file}({declaration}): a weight is file.bin(type:dims), its type float32, "
                "float16, int64 or uint8[scale,zero_point]"
            )
        kind, shape = match[1].partition("[")[0], self.dims(match[4])
        path, channels_last = self.find(file)
        if channels_last and len(shape) > 2:
            shape = (shape[0], *shape[2:], shape[1])
        nbytes = math.prod(shape) * _ITEM_BYTES[kind]
        if (size := path.stat().st_size) != nbytes:
            raise self.error(
                f"{path} has {size} bytes, but {kind} {list(shape)} needs {nbytes}; "
                "fetch or export it again"
            )
        ref = WeightRef(
            self.name(file.removesuffix(".bin").removesuffix("_nchw")),
            shape,
            "int64" if kind == "int64" else "float32",
            path,
            nbytes=nbytes,
            encoding=kind if kind in ("float16", "uint8") else "raw",
        )
        ref = self.quantised(ref, match[2], match[3]) if kind == "uint8" else ref
        return Stored(ref, channels_last)

    def quantised(self, ref: WeightRef, scale: str, zero_point: str) -> WeightRef:
        try:
            ref = replace(ref, scale=float(scale), zero_point=int(zero_point))
        except ValueError as e:
            raise self.error(f"uint8[{scale},{zero_point}]: {e}") from e
        if not (math.isfinite(ref.scale) and 0 <= ref.zero_point <= 255):
            raise self.error(f"uint8[{scale},{zero_point}] is out of range")
        return ref

    def find(self, file: str) -> tuple[Path, bool]:
        """A weight's file, and whether it is the channels-last one.

        The text names `_nchw.bin`, but OnnxStream itself reads only `_nhwc.bin`, so that may be
        the one that was kept.
        """
        folder, nhwc = self.path.parent, file.replace("_nchw.bin", "_nhwc.bin")
        channels_last = nhwc != file and not (folder / file).exists() and (folder / nhwc).exists()
        try:
            return resolve(self.path, nhwc if channels_last else file), channels_last
        except ModelError as e:
            raise self.error(str(e).removeprefix(f"{self.path}: ")) from e

    def attributes(self, schema: onnx.defs.OpSchema, text: str) -> Iterator[tuple[str, Any]]:
        for item in text.split(";"):
            name, _, value = item.partition(":")
            if name not in schema.attributes:
                raise UnsupportedError(
                    f"{self.where}: {schema.name} has no attribute {name!r} in opset {OPSET}"
                )
            kind = str(schema.attributes[name].type).rpartition(".")[2]
            if kind not in _PARSE_ATTRIBUTE:
                raise UnsupportedError(f"{self.where}: attribute {name!r} is {kind}")
            try:
                yield name, _PARSE_ATTRIBUTE[kind](value)
            except (ValueError, OverflowError) as e:
                raise self.error(f"attribute {item!r} is not {kind}") from e

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.where}: {what}")


def _scalar_tensor(text: str) -> np.ndarray[Any, Any]:
    """A tensor attribute of one element, as Python printed it: bool, int64, else float32."""
    if text in ("True", "False"):
        return np.array([text == "True"])
    if re.fullmatch(r"-?\d+", text):
        return np.array([int(text)], np.int64)
    return np.array([float(text)], np.float32)


_PARSE_ATTRIBUTE: Mapping[str, Callable[[str], Any]] = {
    "INT": int,
    "FLOAT": float,
    "STRING": str,
    "INTS": lambda text: tuple(map(int, text.split(","))) if text else (),
    "FLOATS": lambda text: tuple(map(float, text.split(","))) if text else (),
    "TENSOR": _scalar_tensor,
}
