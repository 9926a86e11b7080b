"""The mask of a sliding window, made from positions -> Attention's left_window_size (opset 25)."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter

OPSET = 25


def rewrite_windows(graph: Graph, read: Read) -> Graph:
    """Let Attention over a cache know of its window, instead of reading a mask of all positions.

    The mask is 0 <= query - key < window, by the positions that follow those of the cache.
    """
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        window = _window(rewriter, node)
        if window is not None:
            inputs = (*node.inputs[:3], "", *node.inputs[4:])
            attributes = {**node.attributes, "is_causal": 1, "left_window_size": window - 1}
            rewriter.replace(node, replace(node, inputs=inputs, attributes=attributes))
    return rewriter.finish(OPSET)


def _window(rewriter: Rewriter, node: Node) -> int | None:
    """How many positions the node's mask lets a token see, itself included."""
    if node.op_type != "Attention" or node.domain or node.attributes.get("is_causal", 0):
        return None
    if len(node.inputs) != 6 or not all(node.inputs[3:]):
        return None
    both = rewriter.made_by(node.inputs[3], "And")
    for lower, upper in permutations(both.inputs) if both else ():
        causal = rewriter.made_by(lower, "GreaterOrEqual")
        near = rewriter.made_by(upper, "Less")
        if causal is None or near is None or causal.inputs[0] != near.inputs[0]:
            continue
        size = rewriter.scalar(near.inputs[1])
        if rewriter.scalar(causal.inputs[1]) != 0 or size is None or size < 1:
            continue
        return int(size) if _is_distance(rewriter, causal.inputs[0], node) else None
    return None


def _is_distance(rewriter: Rewriter, value: str, attention: Node) -> bool:
    """Whether it is each new position, (T, 1), less each position there is, (S,)."""
    difference = rewriter.made_by(value, "Sub")
    if difference is None:
        return False
    column = rewriter.made_by(difference.inputs[0], "Unsqueeze")
    keys = rewriter.made_by(difference.inputs[1], "Range")
    queries = rewriter.made_by(column.inputs[0], "Range") if column else None
    if column is None or keys is None or queries is None or len(column.inputs) != 2:
        return False
    facts, (q, past) = rewriter.facts, (attention.inputs[0], attention.inputs[4])
    axes = facts.constant(column.inputs[1])
    new, held = facts.shape(q), facts.shape(past)
    if axes is None or axes.tolist() not in ([1], [-1]) or new is None or held is None:
        return False
    if len(held) != 4 or len(new) not in (3, 4):
        return False
    start, tokens = held[2], new[-2]
    wanted = {"queries": (start, start + tokens, 1), "keys": (0, start + tokens, 1)}
    found = {"queries": queries, "keys": keys}
    return all(_sizes(rewriter, found[name]) == sizes for name, sizes in wanted.items())


def _sizes(rewriter: Rewriter, node: Node) -> tuple[object, ...]:
    """Start, limit and step of a Range, None where unknown."""
    values = [rewriter.facts.value(name) for name in node.inputs]
    return tuple(None if v is None or v.size != 1 else v.reshape(-1)[0] for v in values)
