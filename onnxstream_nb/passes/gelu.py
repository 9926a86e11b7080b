"""x/2 * (1 + erf(x/sqrt(2))), and its tanh approximation, -> Gelu (opset 20).

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415.
"""

from __future__ import annotations

from math import pi, sqrt

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.patterns import Num, Pattern, Var, either, matches, op, product
from onnxstream_nb.passes.rewriting import Rewriter

OPSET = 20

_X = Var("x")
_CUBE = either(op("Pow", _X, Num(3.0)), product(_X, _X, _X))
_SUM = op("Add", _X, op("Mul", _CUBE, Num(0.044715)))


def _gate(inner: Pattern) -> Pattern:
    plus_one = op("Add", inner, Num(1.0))
    return either(
        product(_X, plus_one, Num(0.5)),
        op("Mul", op("Div", _X, Num(2.0)), plus_one),
        op("Div", op("Mul", _X, plus_one), Num(2.0)),
    )


PATTERNS = {
    "none": _gate(op("Erf", either(op("Div", _X, Num(sqrt(2))), op("Mul", _X, Num(1 / sqrt(2)))))),
    "tanh": _gate(op("Tanh", op("Mul", _SUM, Num(sqrt(2 / pi))))),
}


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse both forms; `approximate` says which it was."""
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        if root.op_type not in ("Mul", "Div"):
            continue
        for approximate, pattern in PATTERNS.items():
            match = next(matches(rewriter, pattern, root), None)
            if match is not None:
                inputs = (match.values["x"],)
                attributes = {"approximate": approximate}
                rewriter.replace(root, Node("Gelu", inputs, root.outputs, attributes, root.name))
    return rewriter.finish(OPSET)
