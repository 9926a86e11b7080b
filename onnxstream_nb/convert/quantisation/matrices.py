"""The matrices of a graph that can be quantised: what multiplies, and what rows are looked up in.

Dims: a product is x (..., K) times (K, N); a table has V rows of D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import ModelError
from ...graph import Graph, Node, WeightRef
from ...passes.rewriting import captured
from ..draft import Draft

Array = np.ndarray[Any, Any]

FLOAT_TYPES = ("float32", "float16", "bfloat16")
_PLAIN_GEMM = {"transA": 0, "alpha": 1.0, "beta": 1.0}
_ALIKE = frozenset({
    "Cast", "Tanh", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Transpose", "Expand",
})  # fmt: skip
_ATTENTION = ("Attention", "")
_WITH_OTHERS = frozenset({"Add", "Mul", "Div", "Sub", "Concat"})


@dataclass(frozen=True)
class Matrix:
    """An initializer `ref` of floats that is read as a matrix and in no other way.

    `by_rows`: it is (N, K), else (K, N). `products` are the MatMul and Gemm that multiply by it,
    also behind a Transpose; `lookups` the Gather nodes that pick rows of it. A tied table may have
    a second name, `alias`: (D, V) over the same bytes, by which it is multiplied. `roles` are what
    it is to the model: "head" gives the logits, "values" those of an Attention, "table" is looked
    up by input_ids.
    """

    ref: WeightRef
    by_rows: bool
    products: tuple[Node, ...] = ()
    lookups: tuple[Node, ...] = ()
    alias: str = ""
    roles: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The initializer's."""
        return self.ref.name

    @property
    def rows(self) -> tuple[int, int]:
        """(N, K)."""
        first, second = self.ref.shape
        return (first, second) if self.by_rows else (second, first)

    @property
    def names(self) -> tuple[str, ...]:
        """What a pattern may say: its roles, the initializers' names, the nodes'."""
        nodes = (*self.products, *self.lookups)
        own = (self.name, *([self.alias] if self.alias else ()))
        return (*self.roles, *own, *(node.name for node in nodes if node.name))

    @property
    def input(self) -> str:
        """What its only product multiplies; "" when it has several, or is looked up in."""
        return self.products[0].inputs[0] if len(self.products) == 1 and not self.lookups else ""


def read_rows(draft: Draft, matrix: Matrix) -> Array:
    """The elements (N, K) float32. Raises ModelError when one is no finite number."""
    array = draft.read(draft.graph.initializers[matrix.name]).astype(np.float32, copy=False)
    return _finite(array if matrix.by_rows else array.T, matrix)


def read_strips(draft: Draft, matrix: Matrix) -> Iterator[Array]:
    """What `read_rows` gives, some rows at a time where they are stored as rows."""
    ref = draft.graph.initializers[matrix.name]
    if matrix.name in draft.made or ref.transposed == matrix.by_rows:
        yield read_rows(draft, matrix)
        return
    by_rows = replace(ref, shape=ref.stored_shape, transposed=False)
    for strip in draft.pieces(by_rows, "float32"):
        yield _finite(strip.reshape(-1, matrix.rows[1]), matrix)


def _finite(array: Array, matrix: Matrix) -> Array:
    if not np.isfinite(array).all():
        raise ModelError(
            f"{matrix.name}: not all weights are finite numbers, so they cannot be quantised; the "
            "file is damaged, fetch or export it again"
        )
    return array


def find(draft: Draft) -> list[Matrix]:
    """The matrices of a draft, in the order in which they are first used."""
    graph = draft.graph
    finder = _Finder(graph)
    found = [m for name in graph.initializers if (m := finder.matrix(name)) is not None]
    merged = _with_aliases(found, draft.made)
    order = {id(node): i for i, node in enumerate(graph.nodes)}
    valued = [node.inputs[2] for node in graph.nodes if (node.op_type, node.domain) == _ATTENTION]
    leading = {
        "head": {id(node) for node in _leading_to(graph, ["logits"])},
        "values": {id(node) for node in _leading_to(graph, valued)},
    }
    named = [replace(m, roles=frozenset(_roles(m, leading))) for m in merged]
    usable = [m for m in named if m.products or "table" in m.roles]
    return sorted(usable, key=lambda m: min(order[id(n)] for n in (*m.products, *m.lookups)))


def _roles(matrix: Matrix, leading: Mapping[str, set[int]]) -> Iterator[str]:
    for role, nodes in leading.items():
        if any(id(node) in nodes for node in matrix.products):
            yield role
    if any(node.inputs[1] == "input_ids" for node in matrix.lookups):
        yield "table"


class _Finder:
    """Looks at the uses of initializers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.uses = graph.consumers()
        self.kept = {v.name for v in graph.outputs} | captured(graph)

    def matrix(self, name: str) -> Matrix | None:
        """The matrix that an initializer is, None when it is read in another way."""
        ref = self.graph.initializers[name]
        known = ref.dtype in FLOAT_TYPES and len(ref.shape) == 2 and not ref.parts
        if not known or 0 in ref.shape or name in self.kept or not self.uses.get(name):
            return None
        products: list[Node] = []
        lookups: list[Node] = []
        ways: set[bool] = set()
        for node in self.uses[name]:
            if _is_lookup(node, name) and not self._scales(node.outputs[0]):
                lookups.append(node)
                ways.add(True)
                continue
            found = self._multiplied(node, name)
            if not found:
                return None
            products += (product for product, _ in found)
            ways |= {by_rows for _, by_rows in found}
        if len(ways) != 1:
            return None
        return Matrix(ref, ways.pop(), tuple(products), tuple(lookups))

    def _scales(self, value: str) -> bool:
        """Whether a value, or what a Cast makes of it, is the scale of integers."""
        return any(
            node.inputs[1] == value
            if node.op_type == "DequantizeLinear"
            else node.op_type == "Cast" and self._scales(node.outputs[0])
            for node in self.uses.get(value, ())
        )

    def _multiplied(self, node: Node, name: str) -> list[tuple[Node, bool]]:
        """The products by what `node` reads as `name`, and whether it holds rows (N, K)."""
        by_rows = _by_rows(node, name)
        if by_rows is not None:
            return [(node, by_rows)]
        turned = node.op_type == "Transpose" and not node.domain
        if not turned or node.attributes.get("perm", (1, 0)) != (1, 0):
            return []
        value = node.outputs[0]
        found = [(user, _by_rows(user, value)) for user in self.uses.get(value, ())]
        if value in self.kept or any(way is None for _, way in found):
            return []
        return [(user, not way) for user, way in found]


def _is_lookup(node: Node, name: str) -> bool:
    return (
        (node.op_type, node.domain) == ("Gather", "")
        and node.inputs[0] == name
        and node.attributes.get("axis", 0) == 0
    )


def _by_rows(node: Node, name: str) -> bool | None:
    """Whether a product's second factor `name` is (N, K); None when it is no such product."""
    if node.domain or node.inputs.count(name) != 1 or node.inputs[1:2] != (name,):
        return None
    if node.op_type == "MatMul":
        return False
    given = node.attributes
    if node.op_type != "Gemm" or any(given.get(k, v) != v for k, v in _PLAIN_GEMM.items()):
        return None
    return bool(given.get("transB", 0))


def _with_aliases(found: Sequence[Matrix], made: Mapping[str, Any]) -> list[Matrix]:
    """Tables and the matrices over the same bytes, seen the other way, as one each."""
    stored = {m.ref.key: m for m in found if m.name not in made and not m.lookups}
    result: dict[str, Matrix] = {m.name: m for m in found}
    for table in found:
        other = stored.get(table.ref.key)
        if not table.lookups or table.name in made or other is None or other.by_rows:
            continue
        same = table.ref.shape == other.ref.shape[::-1]
        if same and table.ref.transposed != other.ref.transposed and other.name in result:
            del result[other.name]
            products = (*table.products, *other.products)
            result[table.name] = replace(table, products=products, alias=other.name)
    return list(result.values())


def _leading_to(graph: Graph, outputs: Iterable[str]) -> list[Node]:
    """The products from which values come element by element."""
    producers, found, values = graph.producers(), [], list(outputs)
    while values:
        node = producers.get(values.pop())
        if node is None or node.domain:
            continue
        if node.op_type in ("MatMul", "Gemm"):
            found.append(node)
        elif node.op_type in _ALIKE:
            values.append(node.inputs[0])
        elif node.op_type in _WITH_OTHERS:
            values += [name for name in node.inputs if name not in graph.initializers]
    return found
