"""Keys and values appended to a cache before Attention -> its past and present."""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter


def rewrite(graph: Graph, read: Read) -> Graph:
    """Let Attention do the Concat, and present what the Concat made under its old name.

    Not where `is_causal` is set: the mask it stands for depends on the past.
    """
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type != "Attention" or node.domain or node.attributes.get("is_causal", 0):
            continue
        if any(node.inputs[4:]) or any(node.outputs[1:]):
            continue
        k, v = (_append(rewriter, i) for i in node.inputs[1:3])
        if k is None or v is None or k is v or _depends(rewriter, node, k, v):
            continue
        mask = node.inputs[3] if len(node.inputs) > 3 else ""
        inputs = (node.inputs[0], k.inputs[1], v.inputs[1], mask, k.inputs[0], v.inputs[0])
        outputs = (node.outputs[0], k.outputs[0], v.outputs[0])
        rewriter.replace(k)
        rewriter.replace(v)
        rewriter.replace(node, replace(node, inputs=inputs, outputs=outputs))
    return rewriter.finish()


def _append(rewriter: Rewriter, value: str) -> Node | None:
    """The Concat of a past and new rows along the sequence axis that makes the value."""
    node = rewriter.made_by(value, "Concat")
    if node is None or len(node.inputs) != 2 or node.attributes["axis"] not in (-2, 2):
        return None
    shapes = [rewriter.facts.shape(i) for i in node.inputs]
    if rewriter.is_replaced(node) or any(s is None or len(s) != 4 for s in shapes):
        return None
    return node


def _depends(rewriter: Rewriter, node: Node, *appends: Node) -> bool:
    """Whether another input of the fused node is computed from what it would present."""
    targets = {id(a) for a in appends}
    first = min(rewriter.position[t] for t in targets)
    stack = [node.inputs[0], *node.inputs[3:4], *(i for a in appends for i in a.inputs)]
    seen: set[int] = set()
    while stack:
        producer = rewriter.producer.get(stack.pop())
        if producer is None or id(producer) in seen or rewriter.position[id(producer)] < first:
            continue
        if id(producer) in targets:
            return True
        seen.add(id(producer))
        stack.extend(producer.inputs)
    return False
