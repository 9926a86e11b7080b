"""Other names for the values of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...graph import Graph, Node, Value, WeightRef


def renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The graph with values of other names; one that has a wanted name already gives way."""
    taken = {o for n in graph.nodes for o in n.outputs} | {i.name for i in graph.inputs}
    wanted = {new for old, new in names.items() if new != old}
    away = {name: f"{name}.other" for name in (taken & wanted) - names.keys()}
    every = {**names, **away}

    def value(v: Value) -> Value:
        return replace(v, name=every.get(v.name, v.name))

    def node(n: Node) -> Node:
        inputs, outputs = (tuple(every.get(v, v) for v in vs) for vs in (n.inputs, n.outputs))
        return replace(n, inputs=inputs, outputs=outputs)

    def weight(r: WeightRef) -> WeightRef:
        return replace(r, name=every.get(r.name, r.name)) if r.name in every else r

    return graph.with_(
        nodes=tuple(map(node, graph.nodes)),
        inputs=tuple(map(value, graph.inputs)),
        outputs=tuple(map(value, graph.outputs)),
        initializers={every.get(n, n): weight(r) for n, r in graph.initializers.items()},
    )
