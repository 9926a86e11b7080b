"""x / sqrt(mean(x**2) + epsilon) * weight -> RMSNormalization (opset 23)."""

from __future__ import annotations

from onnxstream_nb.graph import DTYPES, Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.norms import is_per_channel, normalised, over_last_axis, square
from onnxstream_nb.passes.patterns import Match, Var, matches, maybe, op
from onnxstream_nb.passes.rewriting import Rewriter

OPSET = 23

_X = Var("x")
_NORM = normalised(_X, op("ReduceMean", square(_X), bind="mean", rest=True))
PATTERN = op("Mul", Var("scale"), maybe("Cast", _NORM, bind="cast"))


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse the pattern over the last axis.

    A half-precision model computes it in float32 between two Casts, which is what the operator
    does by its `stash_type`.
    """
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        for match in matches(rewriter, PATTERN, root) if root.op_type == "Mul" else ():
            x = _input(rewriter, match)
            scale = match.values["scale"]
            if x is not None and is_per_channel(rewriter, scale, x):
                rewriter.replace(root, _fused(root, x, scale, match.numbers["epsilon"]))
                break
    return rewriter.finish(OPSET)


def _fused(root: Node, x: str, scale: str, epsilon: float) -> Node:
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return Node("RMSNormalization", (x, scale), root.outputs, attributes, root.name)


def _input(rewriter: Rewriter, match: Match) -> str | None:
    """What is normalised, or None when the axis or the types are not the operator's."""
    facts, x = rewriter.facts, match.values["x"]
    if not over_last_axis(rewriter, match.bound["mean"]):
        return None
    if "cast" in match.bound:
        inner = rewriter.made_by(x, "Cast")
        narrow = DTYPES[match.bound["cast"].attributes["to"]]
        if inner is None or facts.dtype(inner.inputs[0]) != narrow or facts.dtype(x) != "float32":
            return None
        x = inner.inputs[0]
    return x if facts.dtype(x) == facts.dtype(match.values["scale"]) else None
