"""Rewrites of a graph, each valid ONNX to valid ONNX of the same meaning.

The fused operators are the standard's own: RMSNormalization, RotaryEmbedding, Attention,
LayerNormalization, Gelu, Swish. A pass that puts one in raises the graph to the operator's opset,
and leaves the graph as it was where another node cannot follow.

Sizes that are unknown before the run are taken to be equal where an export lets them meet in a
broadcast (torch.export assumes the same): a size of 1 that is to be stretched has to be written 1.
"""

from __future__ import annotations

from typing import NoReturn

from onnxstream_nb.graph import Graph, WeightRef
from onnxstream_nb.passes import (
    attention,
    common,
    constants,
    dead,
    expands,
    gelu,
    grouped,
    heads,
    identity,
    integer_products,
    layer_norm,
    past,
    quantised,
    reshapes,
    rms_norm,
    rotary,
    swish,
    tables,
    tanh,
    uint8_matrices,
)
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.fused import rewrite_fused
from onnxstream_nb.passes.kvcache import CachePair, find_cache
from onnxstream_nb.passes.logit_rows import LOGIT_ROWS, rewrite_logit_rows
from onnxstream_nb.passes.together import rewrite_together
from onnxstream_nb.passes.unpadded import rewrite_unpadded
from onnxstream_nb.passes.windows import rewrite_windows

__all__ = [
    "LOGIT_ROWS", "CachePair", "clean", "find_cache", "optimize", "rewrite_fused",
    "rewrite_logit_rows", "rewrite_together", "rewrite_unpadded", "rewrite_windows",
    "with_quantised_weights",
]  # fmt: skip

_CLEANING = (constants, identity, common, reshapes, dead)
_ROUNDS = 4

_FUSIONS = (
    integer_products.rewrite, quantised.rewrite, tables.rewrite, uint8_matrices.rewrite,
    expands.rewrite, tanh.rewrite, layer_norm.rewrite, rms_norm.rewrite, gelu.rewrite,
    rotary.rewrite, heads.rewrite_rotary, attention.rewrite, grouped.rewrite,
    past.rewrite, heads.rewrite_attention, swish.rewrite,
)  # fmt: skip


def clean(graph: Graph, read: Read) -> Graph:
    """Fold constants, drop what does nothing or is computed twice, until nothing changes."""
    for _ in range(_ROUNDS):
        before = graph
        for step in _CLEANING:
            graph = step.rewrite(graph, read)
        if graph is before:
            break
    return graph


def with_quantised_weights(graph: Graph) -> Graph:
    """The graph with every stored matrix as one weight: to count what its weights are."""
    steps = constants.rewrite_views, integer_products.rewrite, quantised.rewrite, tables.rewrite
    for step in steps:
        graph = step(graph, _unread)
    return graph


def _unread(ref: WeightRef) -> NoReturn:
    raise AssertionError(f"{ref.name}: no weight is read to say how it is stored")


def optimize(graph: Graph, read: Read) -> Graph:
    """The graph in the fused vocabulary, its leftovers cleaned away.

    `read` gives the elements of an initializer; it is called for small ones, and for tables of
    cos and sin.
    """
    graph = clean(graph, read)
    for fuse in _FUSIONS:
        fused = fuse(graph, read)
        if fused is not graph:
            graph = clean(fused, read)
    return graph
