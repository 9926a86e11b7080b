"""Logits of the last position only: what generation needs of a long prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.passes.rewriting import captured, constant_ref

_ELEMENTWISE = frozenset({"Cast", "Tanh", "Identity"})
_WITH_CONSTANT = frozenset({"Add", "Mul", "Div", "Sub"})


def rewrite_last_logits(graph: Graph) -> Graph:
    """Let the output `logits`, (batch, sequence, vocabulary), have one position, the last.

    The head's input is cut down to it, before the product with the vocabulary's matrix. The graph
    is returned as it was when its head is not a product with a constant matrix.
    """
    output = next((o for o in graph.outputs if o.name == "logits"), None)
    head = _head(graph) if output is not None else None
    if output is None or head is None or output.shape is None or len(output.shape) != 3:
        return graph
    taken = {*graph.producers(), *graph.initializers, *(i.name for i in graph.inputs)}
    index, last = (_unused(name, taken) for name in ("logits.last", "logits.hidden"))
    gather = Node("Gather", (head.inputs[0], index), (last,), {"axis": 1}, last)
    cut = replace(head, inputs=(last, head.inputs[1]))
    nodes = [n for node in graph.nodes for n in ((gather, cut) if node is head else (node,))]
    one = Value(output.name, output.dtype, (output.shape[0], 1, output.shape[2]))
    return graph.with_(
        nodes=tuple(nodes),
        outputs=tuple(one if o is output else o for o in graph.outputs),
        initializers={**graph.initializers, index: constant_ref(index, np.array([-1], np.int64))},
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
    taken.add(name)
    return name
