"""The model as data: nodes, values and references to weights. Nothing here reads a file.

A `Graph` is an ONNX graph: its operators, attributes and meaning are the standard's. Weights are
`WeightRef`s, which say where the bytes are and how they are stored, so that a provider decides
when (and whether) to read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

Dim = int | str | None
"""One dimension: a size, the name of a symbolic size, or None when nothing is known."""

DTYPES: Mapping[int, str] = MappingProxyType({
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    8: "string", 9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
    14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8e4m3fn", 18: "float8e4m3fnuz",
    19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4e2m1",
    24: "float8e8m0", 25: "uint2", 26: "int2",
})  # fmt: skip
"""onnx.TensorProto.DataType number -> the element type's name as used throughout this package."""


SHORT = ("int4", "uint4")
"""Elements of parts of which a byte holds two."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a block of weights is stored: `block` elements take `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


ENCODINGS: Mapping[str, Encoding] = MappingProxyType({
    e.name: e
    for e in (
        Encoding("float32", 1, 4), Encoding("float16", 1, 2), Encoding("bfloat16", 1, 2),
        Encoding("uint8", 1, 1),
        Encoding("q8_0", 32, 34), Encoding("q4_0", 32, 18), Encoding("q4_1", 32, 20),
        Encoding("q4_k", 256, 144), Encoding("q5_k", 256, 176), Encoding("q6_k", 256, 210),
    )
})  # fmt: skip
"""The encodings of a logically float weight. Blocks run along the last stored axis."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Where one weight lies and how it is stored; never its bytes, unless they have no file.

    `shape` and `dtype` are the logical tensor, as the graph sees it. `encoding` is its storage:
    a name of `ENCODINGS`, or `raw` (little-endian elements of `dtype` itself, C order). When
    `transposed`, the file holds the tensor with its last two axes swapped: a logical (K, N)
    matrix stored as N rows of K. An encoding "uint8" stands for (q - zero_point) * scale.
    `source` is a file, or the bytes themselves for a constant that exists only in memory.

    The encodings "affine4" and "affine8" are a matrix (K, N) in `parts`, each with a place of its
    own: integers (K or more, N), scales (B or 1, N or 1) and zero points of such a shape, where
    there are any; `block` elements along K share a scale. `nbytes` is that of all parts.
    A table's blocks run along its rows, `block_axis` 1: a matrix (V, D) whose parts are (V, ...).

    A matrix whose bytes are panels (kernels/panels.py) has `panel` bytes for every 16 of its N
    stored rows, the last of them filled up, and no parts; its `encoding` says what was packed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: Path | bytes
    offset: int = 0
    nbytes: int = 0
    encoding: str = "raw"
    transposed: bool = False
    scale: float = 1.0
    zero_point: int = 0
    parts: tuple[WeightRef, ...] = ()
    block: int = 0
    block_axis: int = 0
    panel: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in storage order: `shape` with the last two axes swapped when transposed."""
        if not self.transposed:
            return self.shape
        return (*self.shape[:-2], self.shape[-1], self.shape[-2])

    @property
    def unit(self) -> tuple[int, int]:
        """How many stored rows of a matrix stay together when it is cut, and their bytes."""
        if self.parts:
            rows = self._together
            return rows, sum(_rows_of(part, self, 0, rows).nbytes for part in self.parts)
        return (16, self.panel) if self.panel else (1, self.nbytes // self.stored_shape[0])

    @property
    def _together(self) -> int:
        """Stored rows of a matrix in parts that its panels keep together: 16 of N, blocks of K."""
        if self.transposed:
            return 16
        return 32 if self.block >= self.shape[0] else max(32, self.block)

    def rows(self, start: int, stop: int) -> WeightRef:
        """Stored rows `start` to `stop` of a matrix; see `cut_by_rows`. In panels, `start` is the
        first row of one, and `stop` is so too or is the matrix's end."""
        shape = (stop - start, self.stored_shape[1])
        shape = shape[::-1] if self.transposed else shape
        if self.parts:
            parts = tuple(_rows_of(part, self, start, stop) for part in self.parts)
            nbytes, offset = sum(part.nbytes for part in parts), parts[0].offset
            return replace(self, shape=shape, offset=offset, nbytes=nbytes, parts=parts)
        rows, each = self.unit
        first, last = start // rows, -(-stop // rows)
        return replace(
            self, shape=shape, offset=self.offset + each * first, nbytes=each * (last - first)
        )

    @property
    def cut_by_rows(self) -> bool:
        """Whether it is a matrix whose stored rows are weights of their own."""
        shape = self.stored_shape
        if len(shape) != 2 or shape[0] == 0 or self.block_axis:
            return False
        if self.parts:
            return self.in_groups and all(_is_cut(part, self) for part in self.parts)
        return self.panel > 0 or self.nbytes % shape[0] == 0

    @property
    def in_groups(self) -> bool:
        """Whether a matrix in parts is what panels hold: K of whole groups of 32, blocks of whole
        groups, of 16 or of all of K, zero points that are integers."""
        if self.block_axis or not self.shape[0] or self.shape[0] % 32:
            return False
        blocks = self.block % 32 == 0 or self.block == 16 or self.block >= self.shape[0]
        return blocks and all("int" in part.dtype for part in self.parts[2:])

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two references to the same stored bytes (tied weights are read once)."""
        if self.parts:
            return (self.encoding, self.block, *(part.key for part in self.parts))
        where = self.source if isinstance(self.source, Path) else id(self.source)
        return (where, self.offset, self.nbytes, self.encoding)

    @property
    def matrix(self) -> tuple[object, ...]:
        """Equal for two references to the same stored bytes seen as the same logical tensor."""
        return (*self.key, self.shape, self.transposed)


def _per_row(part: WeightRef, whole: WeightRef) -> int:
    """How many stored rows of a matrix in parts share one row of a part; 0 when all share all."""
    axis = int(whole.transposed)
    if part is whole.parts[0] or (axis and part.shape[1] > 1):
        return 1
    return whole.block if part.shape[axis] > 1 else 0


def _is_cut(part: WeightRef, whole: WeightRef) -> bool:
    """Whether rows of a part lie together, and begin with a byte wherever its matrix is cut."""
    axis = int(whole.transposed)
    across = part.shape[1 - axis]
    together = part.transposed == whole.transposed or 1 in part.shape
    even = part.dtype not in SHORT or axis == 1 or across % 2 == 0 or part is whole.parts[0]
    return not _per_row(part, whole) or (together and even)


def _rows_of(part: WeightRef, whole: WeightRef, start: int, stop: int) -> WeightRef:
    """What of a part belongs to stored rows `start` to `stop` of its matrix."""
    each, axis = _per_row(part, whole), int(whole.transposed)
    if not each:
        return part
    across = part.shape[1 - axis]
    first, last = start // each, min(part.shape[axis], -(-stop // each))
    if part.dtype in SHORT:
        begin, end = first * across // 2, -(-last * across // 2)
    else:
        width = part.nbytes // (part.shape[0] * part.shape[1])
        begin, end = first * across * width, last * across * width
    shape = (across, last - first) if axis else (last - first, across)
    return replace(part, shape=shape, offset=part.offset + begin, nbytes=end - begin)


@dataclass(frozen=True, slots=True)
class Value:
    """A graph input or output: its name, element type and shape."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """One operator application. `attributes` hold int, float, str, bytes, tuples of them,
    numpy arrays (tensor attributes) or `Graph`s (bodies of If, Loop and Scan). An omitted
    optional input is the empty string."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, their inputs and outputs, and the weights they refer to.

    `opset` maps a domain ("" is ai.onnx) to its version. `metadata` carries what the format
    knows beside the graph (`architecture`, `context_length`, ...), for show and inspect.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    initializers: Mapping[str, WeightRef]
    opset: Mapping[str, int]
    name: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Graph:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that computes it."""
        return {o: n for n in self.nodes for o in n.outputs if o}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order."""
        result: dict[str, list[Node]] = {}
        for node in self.nodes:
            for i in node.inputs:
                if i:
                    result.setdefault(i, []).append(node)
        return result
