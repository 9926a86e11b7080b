"""Give Reshape a constant target wherever 0 (copy) and one -1 (the rest) can say it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter


def rewrite(graph: Graph, read: Read) -> Graph:
    """Replace computed targets of Reshape, so that the shape arithmetic behind them goes."""
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type == "Reshape" and not node.domain and node.inputs[1] in rewriter.producer:
            target = _target(rewriter, node)
            if target is not None:
                name = rewriter.constant(f"{node.outputs[0]}.shape", np.array(target, np.int64))
                attributes = {k: v for k, v in node.attributes.items() if k != "allowzero"}
                inputs = (node.inputs[0], name)
                rewriter.replace(node, replace(node, inputs=inputs, attributes=attributes))
    return rewriter.finish()


def _target(rewriter: Rewriter, node: Node) -> list[int] | None:
    before = rewriter.facts.shape(node.inputs[0])
    after = rewriter.facts.shape(node.outputs[0])
    if before is None or after is None or 0 in after:
        return None
    target = [
        size if isinstance(size, int)
        else 0 if i < len(before) and before[i] == size
        else -1
        for i, size in enumerate(after)
    ]  # fmt: skip
    # A -1 beside a copied size could not be resolved if that size were 0.
    ambiguous = target.count(-1) > 1 or (-1 in target and 0 in target)
    return None if ambiguous else target
