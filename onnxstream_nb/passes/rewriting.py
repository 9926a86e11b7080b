"""What every rewrite is written with: a graph with its indices, and the edits made to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Array, Facts, Read
from onnxstream_nb.passes.upgrade import raise_opset

CLOSE = 1e-3
"""Relative tolerance within which a constant is the one a formula asks for (fp16 has 5e-4)."""


def captured(graph: Graph) -> set[str]:
    """Names that the bodies of If, Loop and Scan nodes take from this graph."""
    return {name for node in graph.nodes for body in _bodies(node) for name in _free(body)}


def _bodies(node: Node) -> Iterator[Graph]:
    for value in node.attributes.values():
        if isinstance(value, Graph):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, Graph))


def _free(body: Graph) -> set[str]:
    used = {i for node in body.nodes for i in node.inputs} | {o.name for o in body.outputs}
    made = {o for node in body.nodes for o in node.outputs} | {i.name for i in body.inputs}
    return (used | captured(body)) - made - set(body.initializers) - {""}


def has_body(node: Node) -> bool:
    """Whether the node is an If, Loop or Scan."""
    return next(_bodies(node), None) is not None


def constant_ref(name: str, array: Array) -> WeightRef:
    """A weight that lies in memory."""
    data = np.ascontiguousarray(array).tobytes()
    return WeightRef(name, array.shape, str(array.dtype), data, 0, len(data))


def remove_dead(graph: Graph) -> Graph:
    """Drop the nodes and initializers that no output depends on."""
    live = {o.name for o in graph.outputs} | captured(graph)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if live.intersection(node.outputs):
            kept.append(node)
            live.update(node.inputs)
    initializers = {k: v for k, v in graph.initializers.items() if k in live}
    if len(kept) == len(graph.nodes) and len(initializers) == len(graph.initializers):
        return graph
    return graph.with_(nodes=tuple(reversed(kept)), initializers=initializers)


class Rewriter:
    """A graph that a pass looks at, and the edits that `finish` applies all at once.

    `kept` are the values whose names must survive: outputs, and what bodies of nodes capture.
    """

    def __init__(self, graph: Graph, read: Read) -> None:
        self.graph = graph
        self.read = read
        self.producer = graph.producers()
        self.uses = graph.consumers()
        self.position = {id(node): i for i, node in enumerate(graph.nodes)}
        self.kept = frozenset({o.name for o in graph.outputs} | captured(graph))
        self._replaced: dict[int, tuple[Node, ...]] = {}
        self._renamed: dict[str, str] = {}
        self._added: dict[str, WeightRef] = {}
        self._names = {*self.producer, *graph.initializers, *(i.name for i in graph.inputs)}

    @cached_property
    def facts(self) -> Facts:
        """Types, shapes and small values of the graph as it was before the edits."""
        return Facts(self.graph, self.read)

    def made_by(self, value: str, *op_types: str) -> Node | None:
        """The standard node of one of these types that makes the value, if there is one."""
        node = self.producer.get(value)
        return node if node and node.op_type in op_types and not node.domain else None

    def scalar(self, value: str) -> float | None:
        """The one number that a constant holds."""
        ref = self.graph.initializers.get(value)
        if ref is None or int(np.prod(ref.shape)) != 1:
            return None
        array = self.facts.constant(value)
        return None if array is None or array.dtype.kind not in "fiu" else float(array.item())

    def is_private(self, nodes: Iterable[Node], root: Node) -> bool:
        """Whether nothing but the root's outputs is used outside the nodes."""
        inside = {id(n) for n in nodes}
        return all(
            o not in self.kept and all(id(u) in inside for u in self.uses.get(o, ()))
            for n in nodes
            if n is not root
            for o in n.outputs
        )

    def fresh(self, stem: str) -> str:
        """A value name that the graph does not have."""
        tries = (stem if i == 0 else f"{stem}_{i}" for i in count())
        name = next(n for n in tries if n not in self._names)
        self._names.add(name)
        return name

    def node(self, op_type: str, inputs: Iterable[str], stem: str, **attributes: Any) -> Node:
        """A new node with one new output, to be put in by `replace`."""
        return Node(op_type, tuple(inputs), (self.fresh(stem),), attributes, self.fresh(stem))

    def constant(self, stem: str, array: Array) -> str:
        """The name of a new initializer."""
        name = self.fresh(stem)
        self._added[name] = constant_ref(name, array)
        return name

    def add_initializer(self, ref: WeightRef) -> None:
        """Take a reference in under its own name."""
        self._added[ref.name] = ref

    def is_replaced(self, node: Node) -> bool:
        """Whether an earlier edit took the node's place."""
        return id(node) in self._replaced

    def replace(self, node: Node, *nodes: Node) -> None:
        """Put `nodes` (none: remove) where the node was; together they make its used outputs."""
        self._replaced[id(node)] = nodes

    def rename(self, old: str, new: str) -> bool:
        """Let the readers of `old` read `new`; refused for a name that must survive."""
        if old in self.kept or not old:
            return False
        self._renamed[old] = new
        return True

    def finish(self, opset: int = 0) -> Graph:
        """The edited graph, without what became dead, at `opset` or above.

        The graph is returned as it was when nothing was edited, or when the rest of it cannot be
        raised to that opset.
        """
        if not (self._replaced or self._renamed or self._added):
            return self.graph
        nodes = [
            self._with_new_names(n)
            for node in self.graph.nodes
            for n in self._replaced.get(id(node), (node,))
        ]
        initializers: Mapping[str, WeightRef] = {**self.graph.initializers, **self._added}
        edited = self.graph.with_(nodes=tuple(_ordered(nodes)), initializers=initializers)
        return raise_opset(remove_dead(edited), opset) or self.graph

    def _with_new_names(self, node: Node) -> Node:
        inputs = tuple(self._new_name(i) for i in node.inputs)
        if inputs == node.inputs:
            return node
        return Node(node.op_type, inputs, node.outputs, node.attributes, node.name, node.domain)

    def _new_name(self, value: str) -> str:
        while value in self._renamed:
            value = self._renamed[value]
        return value


def _ordered(nodes: list[Node]) -> list[Node]:
    """The nodes in topological order, disturbed as little as possible."""
    producer = {o: n for n in nodes for o in n.outputs if o}
    done: set[int] = set()
    result: list[Node] = []
    for start in nodes:
        stack = [start]
        while stack:
            node = stack[-1]
            needed = [producer[i] for i in node_reads(node) if i in producer]
            waiting = [n for n in needed if id(n) not in done]
            if id(node) not in done and waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if id(node) not in done:
                done.add(id(node))
                result.append(node)
    return result


def node_reads(node: Node) -> Iterator[str]:
    """The values that a node reads, those that its bodies capture among them."""
    yield from node.inputs
    for body in _bodies(node):
        yield from _free(body)
