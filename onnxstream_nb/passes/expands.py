"""Leave stretching to the operator that follows, where that stretches by itself."""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter
from onnxstream_nb.passes.shape_rules import broadcast

_STRETCHES = frozenset({
    "Add", "Sub", "Mul", "Div", "And", "Or", "Equal", "Less", "LessOrEqual", "Greater",
    "GreaterOrEqual",
})  # fmt: skip


def rewrite(graph: Graph, read: Read) -> Graph:
    """Let operators that broadcast read a value from before an Expand, where they give the same.

    Casts may stand between: they are made of the smaller value.
    """
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type in _STRETCHES and not node.domain:
            _narrow(rewriter, node)
    return rewriter.finish()


def _narrow(rewriter: Rewriter, node: Node) -> None:
    shape = rewriter.facts.shape
    inputs, casts = list(node.inputs), list[Node]()
    for i, value in enumerate(node.inputs):
        cast = rewriter.made_by(value, "Cast")
        expand = rewriter.made_by(cast.inputs[0] if cast else value, "Expand")
        if expand is None:
            continue
        shapes = [shape(expand.inputs[0] if j == i else name) for j, name in enumerate(inputs)]
        stretched = broadcast(shapes)
        if stretched is None or tuple(stretched) != shape(node.outputs[0]):
            continue
        inputs[i] = expand.inputs[0]
        if cast is not None:
            inputs[i] = rewriter.fresh(f"{value}.narrow")
            casts.append(replace(cast, inputs=expand.inputs[:1], outputs=(inputs[i],)))
    if tuple(inputs) != node.inputs:
        rewriter.replace(node, *casts, replace(node, inputs=tuple(inputs)))
