"""Attention over keys and values that repeat_kv copied for each query head -> without the copies.

Source: Ainslie et al., "GQA", arXiv:2305.13245; in exports Unsqueeze, Expand or a Concat
of one value with itself, Reshape.
"""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import Graph
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter


def rewrite(graph: Graph, read: Read) -> Graph:
    """Let four-dimensional Attention read the heads as they were before they were repeated."""
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type != "Attention" or node.domain or len(node.outputs) > 1:
            continue
        k, v = (_before_repeat(rewriter, i) for i in node.inputs[1:3])
        if k is None or v is None or any(node.inputs[4:6]):
            continue
        if k[1] == v[1] and "kv_num_heads" not in node.attributes:
            inputs = (node.inputs[0], k[0], v[0], *node.inputs[3:])
            rewriter.replace(node, replace(node, inputs=inputs))
    return rewriter.finish()


def _before_repeat(rewriter: Rewriter, value: str) -> tuple[str, int] | None:
    """The value before repeat_kv and how often each head was repeated."""
    reshape = rewriter.made_by(value, "Reshape")
    expand = rewriter.made_by(reshape.inputs[0], "Expand", "Concat") if reshape else None
    unsqueeze = rewriter.made_by(expand.inputs[0], "Unsqueeze") if expand else None
    if reshape is None or expand is None or unsqueeze is None:
        return None
    if expand.op_type == "Concat" and len(set(expand.inputs)) > 1:
        return None
    shape = rewriter.facts.shape
    before, single, repeated, after = (
        shape(v) for v in (unsqueeze.inputs[0], *(n.outputs[0] for n in (unsqueeze, expand)), value)
    )
    if before is None or single is None or repeated is None or after is None:
        return None
    if len(before) != 4 or len(repeated) != 5 or len(after) != 4:
        return None
    _, heads, _, width = before
    times = repeated[2]
    if not (isinstance(heads, int) and isinstance(width, int) and isinstance(times, int)):
        return None
    # Only the new third axis grows; unknown sizes that meet in an Expand are equal.
    grows = single[2] == 1 and repeated[1] == heads and repeated[4] == width
    merged = after[1] == heads * times and after[3] == width
    return (unsqueeze.inputs[0], times) if grows and merged else None
