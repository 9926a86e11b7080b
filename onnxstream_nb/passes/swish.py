"""x * sigmoid(alpha * x) -> Swish (opset 24).

Source: Ramachandran, Zoph and Le, "Searching for Activation Functions", arXiv:1710.05941.
"""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.patterns import Num, Var, either, matches, op
from onnxstream_nb.passes.rewriting import Rewriter

OPSET = 24

_X = Var("x")
PATTERN = op("Mul", _X, op("Sigmoid", either(op("Mul", _X, Num(name="alpha")), _X)))


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse SiLU, and with a factor inside the sigmoid the quick GELU."""
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        match = next(matches(rewriter, PATTERN, root), None) if root.op_type == "Mul" else None
        if match is not None:
            attributes = {"alpha": match.numbers.get("alpha", 1.0)}
            inputs = (match.values["x"],)
            rewriter.replace(root, Node("Swish", inputs, root.outputs, attributes, root.name))
    return rewriter.finish(OPSET)
