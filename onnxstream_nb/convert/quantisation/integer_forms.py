"""How a quantised matrix is written: as DequantizeLinear in blocks, or as MatMulNBits.

Dims: integers (N, K), B blocks a row. A form keeps the names of what it stands for: the value of a
DequantizeLinear is called as the initializer was, so that the products read it as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import ModelError
from ...graph import Graph, Node, WeightRef
from ...passes.rewriting import remove_dead
from ...weight import numpy_dtype
from ..draft import Draft, Make, placeholder
from .matrices import Matrix

Array = np.ndarray[Any, Any]

FLOAT = 1  # onnx.TensorProto.FLOAT
NUMBERS = {"float16": 10, "bfloat16": 16}  # of onnx.TensorProto's types


@dataclass(frozen=True)
class Rounded:
    """Integers (N, K), scales (N, B) float32, zero points (N, B) or None."""

    integers: Array
    scales: Array
    zeros: Array | None = None


@dataclass(frozen=True)
class Grid:
    """The integers of a matrix: of `bits`, `block` along K to a scale (0: all), and the type in
    which scales are stored."""

    bits: int
    block: int
    asymmetric: bool
    scales: str = "float16"

    @property
    def dtype(self) -> str:
        """The integers' element type."""
        return f"{'u' if self.asymmetric else ''}int{self.bits}"

    @property
    def low(self) -> int:
        """The least integer; of symmetric 8 bits -127, so that both signs reach as far."""
        return 0 if self.asymmetric else -8 if self.bits == 4 else -127

    @property
    def high(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1 if self.asymmetric else (1 << (self.bits - 1)) - 1

    def length(self, k: int) -> int:
        """How many elements of a row of K share a scale."""
        return self.block or k

    def blocks(self, k: int) -> int:
        """B."""
        return -(-k // self.length(k))


class Codes:
    """The rounded matrices by name. They are computed when they are asked for; the latest is kept,
    since its integers, scales and zero points are written one after the other."""

    def __init__(self, compute: Mapping[str, Callable[[], Rounded]]) -> None:
        self._compute = compute
        self._latest: tuple[str, Rounded] | None = None

    def __call__(self, name: str) -> Rounded:
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # or two are in memory
            self._latest = name, checked(name, self._compute[name]())
        return self._latest[1]


def checked(name: str, rounded: Rounded) -> Rounded:
    """The rounded matrix. Raises ModelError when its type of scales is too small for it."""
    if not np.isfinite(rounded.scales).all():
        raise ModelError(
            f"{name}: its weights are so large that float16 has no scale for them; write the "
            "scales as float32 (--scales float32)"
        )
    return rounded


def joined(strips: Iterable[Rounded]) -> Rounded:
    """A matrix of which some rows were rounded at a time."""
    found = list(strips)
    if len(found) == 1:
        return found[0]
    integers = np.concatenate([r.integers for r in found])
    scales = np.concatenate([r.scales for r in found])
    zeros = [r.zeros for r in found if r.zeros is not None]
    return Rounded(integers, scales, np.concatenate(zeros) if zeros else None)


def values(rounded: Rounded, block: int) -> Array:
    """What a rounded matrix stands for, (N, K) float32; `block` elements share a scale."""
    k = rounded.integers.shape[1]
    result = rounded.integers.astype(np.float32)
    if rounded.zeros is not None:
        result -= np.repeat(rounded.zeros, block, axis=1)[:, :k]
    result *= np.repeat(rounded.scales, block, axis=1)[:, :k]
    return result


@dataclass
class Written:
    """Nodes to be put before others or in their place, and the initializers that they read."""

    before: dict[int, list[Node]] = field(default_factory=dict)
    instead: dict[int, list[Node]] = field(default_factory=dict)
    initializers: dict[str, WeightRef] = field(default_factory=dict)
    made: dict[str, Make] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], make: Make) -> str:
        """An initializer that is made."""
        kind = numpy_dtype(dtype)
        self.initializers[name] = placeholder(name, dtype, shape)
        self.made[name] = lambda: make().astype(kind, copy=False)
        return name

    def finish(self, draft: Draft) -> Draft:
        """The draft with all of it."""
        graph = draft.graph
        nodes = [
            new
            for node in graph.nodes
            for new in (*self.before.get(id(node), ()), *self.instead.get(id(node), (node,)))
        ]
        kept = {k: ref for k, ref in graph.initializers.items() if k not in self.dropped}
        opset = dict(graph.opset)
        if any(node.domain == "com.microsoft" for node in nodes):
            opset.setdefault("com.microsoft", 1)
        edited = graph.with_(
            nodes=tuple(nodes), initializers={**kept, **self.initializers}, opset=opset
        )
        return draft.with_(remove_dead(edited), self.made)


def write_dequantised(
    written: Written, graph: Graph, matrix: Matrix, grid: Grid, codes: Codes
) -> None:
    """DequantizeLinear of a matrix, and of the rows that are looked up in it."""
    name, (_, k) = matrix.name, matrix.rows
    written.dropped |= {name, matrix.alias}
    in_blocks = bool(grid.block) or bool(matrix.lookups)
    parts = _parts(written, matrix, grid, codes, in_blocks)
    if matrix.products:
        axis = int(matrix.by_rows) if in_blocks else int(not matrix.by_rows)
        attributes = {"axis": axis} | ({"block_size": grid.length(k)} if in_blocks else {})
        nodes = _dequantise(matrix, parts, name, attributes)
        if matrix.alias:
            nodes.append(
                Node("Transpose", (name,), (matrix.alias,), {"perm": (1, 0)}, matrix.alias)
            )
        lookups = {id(node) for node in matrix.lookups}
        readers = [n for n in graph.nodes if {name, matrix.alias or name} & set(n.inputs)]
        first = next(n for n in readers if id(n) not in lookups)
        written.before.setdefault(id(first), []).extend(nodes)
    for node in matrix.lookups:
        value = node.outputs[0]
        picked = [f"{value}.{kind}" for kind in ("integers", "scales", "zeros")][: len(parts)]
        rows = [
            Node("Gather", (part, node.inputs[1]), (row,), {"axis": 0}, row)
            for part, row in zip(parts, picked, strict=True)
        ]
        blocked = {"axis": -1, "block_size": grid.length(k)}
        written.instead[id(node)] = [*rows, *_dequantise(matrix, picked, value, blocked)]


def write_floats(written: Written, draft: Draft, matrix: Matrix, encoding: str) -> None:
    """The same matrix of float32, marked as one that is to be stored in another type of floats."""
    name, ref = matrix.name, draft.graph.initializers[matrix.name]
    if ref.encoding != encoding:
        kept = placeholder(name, ref.dtype, ref.shape)
        written.initializers[name] = replace(kept, encoding=encoding)
        written.made[name] = lambda: draft.read(ref)


def _parts(
    written: Written, matrix: Matrix, grid: Grid, codes: Codes, in_blocks: bool
) -> list[str]:
    """The initializers of the integers, the scales and the zero points, laid as the matrix was."""
    name, (n, k) = matrix.name, matrix.rows
    shape = (n, grid.blocks(k))
    by_rows = matrix.by_rows

    def laid(array: Array) -> Array:
        return array if by_rows else np.ascontiguousarray(array.T)

    def few(array: Array) -> Array:
        return laid(array) if in_blocks else array[:, 0]

    few_shape = (shape if by_rows else shape[::-1]) if in_blocks else (n,)
    scales = matrix.ref.dtype if matrix.ref.dtype == "float16" else grid.scales
    parts = [
        written.add(f"{name}.{grid.dtype}", grid.dtype, matrix.ref.shape,
                    lambda: laid(codes(name).integers)),
        written.add(f"{name}.scales", scales, few_shape, lambda: few(codes(name).scales)),
    ]  # fmt: skip
    if grid.asymmetric:
        zeros = f"{name}.zeros"
        parts.append(written.add(zeros, grid.dtype, few_shape, lambda: few(_zeros(codes(name)))))
    return parts


def _zeros(rounded: Rounded) -> Array:
    assert rounded.zeros is not None
    return rounded.zeros


def _dequantise(
    matrix: Matrix, parts: Iterable[str], value: str, attributes: Mapping[str, int]
) -> list[Node]:
    """The nodes that give `value` in the matrix's own type: in float32 unless that is float16."""
    integers, scales, *zeros = parts
    kind = matrix.ref.dtype
    nodes = []
    if kind != "float16":
        cast = f"{scales}.float"
        nodes.append(Node("Cast", (scales,), (cast,), {"to": FLOAT}, cast))
        scales = cast
    result = value if kind != "bfloat16" else f"{value}.float"
    inputs = (integers, scales, *zeros)
    nodes.append(Node("DequantizeLinear", inputs, (result,), dict(attributes), result))
    if kind == "bfloat16":
        nodes.append(Node("Cast", (result,), (value,), {"to": NUMBERS[kind]}, value))
    return nodes


# -- MatMulNBits ---------------------------------------------------------------------------------


def write_nbits(written: Written, matrix: Matrix, grid: Grid, codes: Codes) -> None:
    """MatMulNBits in the place of a matrix's products, in onnxruntime's layout."""
    name, (n, k) = matrix.name, matrix.rows
    block, blocks, bits = grid.length(k), grid.blocks(k), grid.bits
    written.dropped.add(name)

    def integers() -> Array:
        found = codes(name).integers.astype(np.int16) - (0 if grid.asymmetric else _lowest(bits))
        padded = np.zeros((n, blocks * block), np.uint8)
        padded[:, :k] = found
        return packed(padded, bits).reshape(n, blocks, block * bits // 8)

    parts = [
        written.add(f"{name}.bits{bits}", "uint8", (n, blocks, block * bits // 8), integers),
        written.add(f"{name}.scales", matrix.ref.dtype, (n, blocks), lambda: codes(name).scales),
    ]
    if grid.asymmetric:
        shape = (n, -(-blocks * bits // 8))
        zeros = f"{name}.zeros"
        parts.append(written.add(zeros, "uint8", shape, lambda: packed(_zeros(codes(name)), bits)))
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block}
    for node in matrix.products:
        inputs, label = (node.inputs[0], *parts), node.name or node.outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        product = f"{node.outputs[0]}.product" if bias else node.outputs[0]
        nodes = [Node("MatMulNBits", inputs, (product,), attributes, label, "com.microsoft")]
        if bias:
            nodes.append(Node("Add", (product, bias), node.outputs, {}, f"{label}.bias"))
        written.instead[id(node)] = nodes


def _lowest(bits: int) -> int:
    """What an unsigned integer is above the signed one that it stands for, negated."""
    return -(1 << (bits - 1))


def packed(elements: Array, bits: int) -> Array:
    """(N, n) uint8 of `bits` each -> (N, bytes), the lower half of a byte first."""
    if bits == 8:
        return elements
    even = np.pad(elements, ((0, 0), (0, elements.shape[1] % 2)))
    result: Array = even[:, ::2] | even[:, 1::2] << 4
    return result
