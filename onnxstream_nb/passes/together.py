"""Products of one value stand together: so those that are done elsewhere are begun before any of
them is waited for."""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node


def rewrite_together(graph: Graph) -> Graph:
    """The graph with every MatMul of an initializer behind the first one of the same value."""
    first: dict[str, int] = {}
    place: dict[int, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        at = first.setdefault(node.inputs[0], i) if _is_product(node, graph) else i
        place[i] = (at, i)
    ordered = sorted(range(len(graph.nodes)), key=place.__getitem__)
    return graph.with_(nodes=tuple(graph.nodes[i] for i in ordered))


def _is_product(node: Node, graph: Graph) -> bool:
    return node.op_type == "MatMul" and not node.domain and node.inputs[1] in graph.initializers
