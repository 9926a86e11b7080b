"""OnnxStream's model folders: `model.txt`, one operator a line, and one `.bin` file per weight.

The text keeps neither graph inputs and outputs nor the element types of runtime tensors: they
follow from use. It was exported from opset 14.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ModelError
from ..graph import Dim, Graph, Node, Value, WeightRef
from .onnxstream_line import OPSET, Operator, Runtime, Stored, escape, parse, unescape
from .onnxstream_types import Types, infer

__all__ = ["ALWAYS_OUTPUT", "escape", "read", "unescape"]

ALWAYS_OUTPUT = re.compile(r"opkv\d+|logits")
"""Names of values that are results even where a node reads them; any other is one of the two."""
# The sizes that OnnxStream's language models leave open, by the inputs and outputs they occur in.
_OPEN_SIZES = (
    (re.compile(r"input_ids|position_ids|logits"), "sequence"),
    (re.compile(r"pkv\d+"), "past"),
    (re.compile(r"attention_mask|opkv\d+"), "total"),
)
_INTEGERS_LIMIT = 2**20  # bytes of a weight that is read here to turn it into integers


def read(folder: str | Path) -> Graph:
    """Read the OnnxStream model in `folder`; weights stay in their files.

    Raises ModelError, naming model.txt and the line, when the text is malformed, or a weight's
    file is missing, outside the folder or not of the declared size.
    """
    path = Path(folder).absolute() / "model.txt"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; an OnnxStream folder holds a model.txt")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise ModelError(f"{path}: not UTF-8 text, so no OnnxStream model ({e})") from e
    builder = _Builder(path)
    for number, line in enumerate(lines, 1):
        if line.strip():
            builder.number = number
            builder.add(parse(path, number, line))
    if not builder.nodes:
        raise ModelError(f"{path}: empty; fetch or export the model again")
    return builder.graph()


class _Builder:
    """The lines so far; `number` is the one being added."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self.nodes: list[Node] = []
        self.weights: dict[str, WeightRef] = {}
        self.inputs: dict[str, Runtime] = {}
        self.computed: dict[str, Runtime] = {}

    def add(self, operator: Operator) -> None:
        """Append one operator."""
        names = tuple(self.consume(operator))
        self.produce(operator.outputs)
        results = tuple(t.name for t in operator.outputs)
        self.nodes.append(
            Node(operator.op_type, names, results, operator.attributes, operator.name)
        )

    def consume(self, operator: Operator) -> Iterable[str]:
        """The names of an operator's inputs, after noting what they are."""
        for tensor in operator.inputs:
            if isinstance(tensor, Stored):
                yield self.weight(_without_trailing_one(tensor, operator))
            elif tensor is None:
                yield ""
            else:
                if tensor.name not in self.computed:
                    self.inputs.setdefault(tensor.name, tensor)
                yield tensor.name

    def weight(self, stored: Stored) -> str:
        """Add a weight; the name under which its operator sees it."""
        ref = stored.ref
        if self.weights.setdefault(ref.name, ref) != ref:
            raise self.error(f"weight {ref.name!r} was declared differently before")
        return self.channels_first(ref) if stored.channels_last else ref.name

    def channels_first(self, ref: WeightRef) -> str:
        """The transposition of a weight that is stored as (O, ..., I) to (O, I, ...)."""
        name, rank = f"{ref.name}_nchw", len(ref.shape)
        if name not in self.computed:
            self.computed[name] = Runtime(name, (ref.shape[0], ref.shape[-1], *ref.shape[1:-1]))
            perm = (0, rank - 1, *range(1, rank - 1))
            self.nodes.append(Node("Transpose", (ref.name,), (name,), {"perm": perm}))
        return name

    def produce(self, tensors: Iterable[Runtime]) -> None:
        for tensor in tensors:
            if tensor.name in self.computed:
                raise self.error(f"{tensor.name!r} is computed a second time")
            if tensor.name in self.inputs:
                raise self.error(f"{tensor.name!r} is used by a line before this one")
            self.computed[tensor.name] = tensor

    def graph(self) -> Graph:
        """All lines together: what nothing computes is an input, what nothing uses an output."""
        types = infer(self.nodes, self.weights, OPSET)
        used = {i for n in self.nodes for i in n.inputs}
        results = [
            _value(t, types)
            for t in self.computed.values()
            if t.name not in used or ALWAYS_OUTPUT.fullmatch(t.name)
        ]
        results.sort(key=lambda v: v.name != "logits")
        first = results[0]
        return Graph(
            tuple(self.nodes),
            tuple(_value(t, types) for t in self.inputs.values()),
            tuple(results),
            {name: self.typed(ref, types[name]) for name, ref in self.weights.items()},
            {"": OPSET},
            self.path.parent.name,
            {"vocab_size": first.shape[-1]} if first.name == "logits" and first.shape else {},
        )

    def typed(self, ref: WeightRef, dtype: str) -> WeightRef:
        """`ref`, read as int64 where its float numbers stand for integers.

        OnnxStream's converter stores an int64 second operand of Mul as float.
        """
        if ref.dtype == dtype or dtype != "int64":
            return ref
        if ref.nbytes > _INTEGERS_LIMIT:
            raise ModelError(f"{self.path}: {ref.name!r} of {ref.nbytes} bytes multiplies integers")
        numbers = _numbers(ref)
        if not np.isfinite(numbers).all() or (np.rint(numbers) != numbers).any():
            raise ModelError(f"{self.path}: {ref.name!r} multiplies integers by fractions")
        data = numbers.astype("<i8").tobytes()
        return WeightRef(ref.name, ref.shape, "int64", data, nbytes=len(data))

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}:{self.number}: {what}")


def _without_trailing_one(stored: Stored, operator: Operator) -> Stored:
    """A one-dimensional convolution's weight without the second dimension it was written with."""
    data, ref = operator.inputs[0], stored.ref
    axis = len(ref.shape) - (2 if stored.channels_last else 1)
    if operator.op_type != "Conv" or not isinstance(data, Runtime):
        return stored
    if len(ref.shape) != len(data.dims) + 1 or ref.shape[axis] != 1:
        return stored
    shape = ref.shape[:axis] + ref.shape[axis + 1 :]
    return replace(stored, ref=replace(ref, shape=shape))


def _numbers(ref: WeightRef) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    stored = {"raw": "<f4", "float16": "<f2", "uint8": "u1"}[ref.encoding]
    assert isinstance(ref.source, Path)
    numbers = np.fromfile(ref.source, stored).astype(np.float64)
    return (numbers - ref.zero_point) * ref.scale


def _value(tensor: Runtime, types: Types) -> Value:
    known = [size for pattern, size in _OPEN_SIZES if pattern.fullmatch(tensor.name)]
    shape: tuple[Dim, ...] = tuple(
        d or (known[0] if known else f"{tensor.name}_{axis}") for axis, d in enumerate(tensor.dims)
    )
    return Value(tensor.name, types[tensor.name], shape)
