"""(x - mean) / sqrt(variance + epsilon) * weight + bias -> LayerNormalization (opset 17)."""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.norms import is_per_channel, normalised, over_last_axis, square
from onnxstream_nb.passes.patterns import Match, Var, matches, op
from onnxstream_nb.passes.rewriting import Rewriter

OPSET = 17

_X = Var("x")
_CENTRED = op("Sub", _X, op("ReduceMean", _X, bind="mean", rest=True))
_VARIANCE = op("ReduceMean", square(_CENTRED), bind="variance", rest=True)
_SCALED = op("Mul", Var("scale"), normalised(_CENTRED, _VARIANCE))
PATTERNS = {"Add": op("Add", Var("bias"), _SCALED), "Mul": _SCALED}


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse the pattern over the last axis, with a bias or without."""
    rewriter = Rewriter(graph, read)
    fused: set[int] = set()
    for root in reversed(graph.nodes):
        pattern = PATTERNS.get(root.op_type)
        if pattern is None or id(root) in fused:
            continue
        match = next((m for m in matches(rewriter, pattern, root) if _fits(rewriter, m)), None)
        if match is not None:
            fused.update(id(n) for n in match.nodes)
            rewriter.replace(root, _fused(root, match))
    return rewriter.finish(OPSET)


def _fits(rewriter: Rewriter, match: Match) -> bool:
    x = match.values["x"]
    weights = [match.values[name] for name in ("scale", "bias") if name in match.values]
    return (
        over_last_axis(rewriter, match.bound["mean"])
        and over_last_axis(rewriter, match.bound["variance"])
        and all(is_per_channel(rewriter, w, x) for w in weights)
        and all(rewriter.facts.dtype(w) == rewriter.facts.dtype(x) for w in weights)
    )


def _fused(root: Node, match: Match) -> Node:
    names = (name for name in ("x", "scale", "bias") if name in match.values)
    inputs = tuple(match.values[name] for name in names)
    attributes = {"axis": -1, "epsilon": match.numbers["epsilon"], "stash_type": 1}
    return Node("LayerNormalization", inputs, root.outputs, attributes, root.name)
