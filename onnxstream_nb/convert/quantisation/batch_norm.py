"""Batch normalizations folded into the convolutions before them: what is quantised is then what is
computed, and every output has a scale for its own weights.

Dims: M outputs of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...graph import Node
from ...passes.rewriting import Rewriter
from ..draft import Draft, Make, placeholder

Array = np.ndarray[Any, Any]


def fold_batch_norms(draft: Draft) -> Draft:
    """The draft without the BatchNormalization nodes that are the only readers of a convolution
    with constant weights and have constant statistics."""
    rewriter, made = Rewriter(draft.graph, draft.read), dict[str, Make]()
    for node in draft.graph.nodes:
        if node.op_type == "BatchNormalization" and not node.domain:
            _fold(draft, rewriter, node, made)
    graph = rewriter.finish()
    return draft if graph is draft.graph else draft.with_(graph, made)


def _fold(draft: Draft, rewriter: Rewriter, node: Node, made: dict[str, Make]) -> None:
    conv, refs = rewriter.made_by(node.inputs[0], "Conv"), draft.graph.initializers
    if conv is None or not rewriter.is_private((conv, node), node) or len(node.outputs) > 1:
        return
    needed = (*conv.inputs[1:], *node.inputs[1:])
    if any(name and name not in refs for name in needed) or node.attributes.get("training_mode", 0):
        return
    bias = conv.inputs[2] if len(conv.inputs) > 2 else ""
    statistics = {name: draft.read(refs[name]).astype(np.float64) for name in node.inputs[1:]}
    scale, offset, mean, variance = (statistics[name] for name in node.inputs[1:])
    factor = scale / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
    weight = refs[conv.inputs[1]]

    def folded_weight() -> Array:
        along = factor.reshape(-1, *(1,) * (len(weight.shape) - 1))
        folded: Array = (draft.read(weight) * along).astype(np.float32)
        return folded

    def folded_bias() -> Array:
        before = draft.read(refs[bias]).astype(np.float64) if bias else 0.0
        folded: Array = ((before - mean) * factor + offset).astype(np.float32)
        return folded

    def add(stem: str, shape: tuple[int, ...], make: Callable[[], Array]) -> str:
        name = rewriter.fresh(stem)
        rewriter.add_initializer(placeholder(name, "float32", shape))
        made[name] = make
        return name

    names = (
        add(f"{weight.name}.folded", weight.shape, folded_weight),
        add(f"{weight.name}.folded_bias", factor.shape, folded_bias),
    )
    inputs = (conv.inputs[0], *names)
    rewriter.replace(conv)
    rewriter.replace(node, replace(conv, inputs=inputs, outputs=node.outputs))
