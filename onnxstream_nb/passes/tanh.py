"""2 sigmoid(2 x) - 1 -> Tanh, as converters write it for engines that have no Tanh."""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.patterns import Num, Var, matches, op
from onnxstream_nb.passes.rewriting import Rewriter

PATTERN = op(
    "Sub", op("Mul", op("Sigmoid", op("Mul", Var("x"), Num(2.0))), Num(2.0)), Num(1.0)
)  # fmt: skip


def rewrite(graph: Graph, read: Read) -> Graph:
    """Put the one operator in the place of the four."""
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        match = next(matches(rewriter, PATTERN, root), None) if root.op_type == "Sub" else None
        if match is not None:
            rewriter.replace(root, Node("Tanh", (match.values["x"],), root.outputs, {}, root.name))
    return rewriter.finish()
