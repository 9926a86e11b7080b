"""Logits of some positions only: of a long prompt, generating needs those of the last."""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.passes.rewriting import captured

LOGIT_ROWS = "logit_rows"

_ELEMENTWISE = frozenset({"Cast", "Tanh", "Identity"})
_WITH_CONSTANT = frozenset({"Add", "Mul", "Div", "Sub"})


def rewrite_logit_rows(graph: Graph) -> Graph:
    """Let the output `logits`, (batch, sequence, vocabulary), have the positions that a further
    input, `logit_rows` int64 (rows), picks along the sequence; negative ones count from its end.

    The head's input is cut down to them, before the product with the vocabulary's matrix. The graph
    is returned as it was when its head is not a product with a constant matrix, or is cut already.
    """
    output = next((o for o in graph.outputs if o.name == "logits"), None)
    head = _head(graph) if output is not None else None
    if output is None or head is None or output.shape is None or len(output.shape) != 3:
        return graph
    if output.shape[1] == 1:
        return graph
    taken = {*graph.producers(), *graph.initializers, *(i.name for i in graph.inputs)}
    if LOGIT_ROWS in taken:
        return graph
    picked = _unused("logits.hidden", taken)
    gather = Node("Gather", (head.inputs[0], LOGIT_ROWS), (picked,), {"axis": 1}, picked)
    cut = replace(head, inputs=(picked, head.inputs[1]))
    nodes = [n for node in graph.nodes for n in ((gather, cut) if node is head else (node,))]
    rows = Value(output.name, output.dtype, (output.shape[0], "rows", output.shape[2]))
    return graph.with_(
        nodes=tuple(nodes),
        inputs=(*graph.inputs, Value(LOGIT_ROWS, "int64", ("rows",))),
        outputs=tuple(rows if o is output else o for o in graph.outputs),
    )


def _head(graph: Graph) -> Node | None:
    """The MatMul with an initializer from which `logits` come position by position."""
    producers, users = graph.producers(), graph.consumers()
    kept = {o.name for o in graph.outputs} | captured(graph)
    value = "logits"
    while (node := producers.get(value)) is not None and not node.domain:
        if value != "logits" and (len(users[value]) > 1 or value in kept):
            return None
        if node.op_type == "MatMul":
            ref = graph.initializers.get(node.inputs[1])
            return node if ref is not None and len(ref.shape) == 2 else None
        following = _through(graph, node)
        if following is None:
            return None
        value = following
    return None


def _through(graph: Graph, node: Node) -> str | None:
    """The input of a node that treats every position alike."""
    if node.op_type in _ELEMENTWISE:
        return node.inputs[0]
    if node.op_type not in _WITH_CONSTANT:
        return None
    computed = [i for i in node.inputs if i not in graph.initializers]
    refs = [graph.initializers[i] for i in node.inputs if i in graph.initializers]
    return computed[0] if len(computed) == 1 and all(len(r.shape) <= 1 for r in refs) else None


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
