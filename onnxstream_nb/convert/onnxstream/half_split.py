"""Rotary embeddings of neighbouring channels as those of halves, by another order of the weights.

GGUF files of Llama keep the rows of the query and key projections so that pairs are neighbours.
Scores are products over all channels of a head, so queries and keys may take any order together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from ...graph import Node, WeightRef
from ...passes.rewriting import Rewriter
from ..draft import Draft, Make

Order = np.ndarray[Any, np.dtype[np.int64]]


def half_split(draft: Draft) -> Draft:
    """The draft with interleaved rotations of projections replaced by half-split ones.

    Only where queries and keys of an attention are both rotated so, and nothing else sees them;
    the cache then holds keys in the new order.
    """
    rewriter = Rewriter(draft.graph, draft.read)
    made: dict[str, Make] = {}
    for node in draft.graph.nodes:
        if node.op_type == "Attention" and not node.domain:
            sides = [_rotation(rewriter, value) for value in node.inputs[:2]]
            if None not in sides:
                for side in sides:
                    if side is not None:
                        _apply(rewriter, draft, *side, made)
    return draft.with_(rewriter.finish(), made)


def _rotation(rewriter: Rewriter, value: str) -> tuple[Node, list[str]] | None:
    """The interleaved rotation of a projection, and its weight and bias; None for any other."""
    rotary = rewriter.made_by(value, "RotaryEmbedding")
    if rotary is None or not rotary.attributes.get("interleaved", 0):
        return None
    if not rotary.attributes.get("num_heads", 0) or rewriter.is_replaced(rotary):
        return None
    weights: list[str] = []
    x, private = rotary.inputs[0], [value, rotary.inputs[0]]
    add = rewriter.made_by(x, "Add")
    if add is not None:
        weights += [i for i in add.inputs if i in rewriter.graph.initializers]
        x = next((i for i in add.inputs if i not in rewriter.graph.initializers), "")
        private.append(x)
    product = rewriter.made_by(x, "MatMul")
    if product is None or len(weights) != (add is not None):
        return None
    weights.append(product.inputs[1])
    if not all(_is_ours(rewriter, name) for name in (*private, *weights)):
        return None
    known = [rewriter.graph.initializers.get(name) for name in weights]
    widths = {None if ref is None else ref.shape[-1:] for ref in known}
    return (rotary, weights) if len(widths) == 1 and None not in widths else None


def _is_ours(rewriter: Rewriter, name: str) -> bool:
    known = name in rewriter.graph.initializers or name in rewriter.producer
    return known and name not in rewriter.kept and len(rewriter.uses.get(name, ())) == 1


def _apply(
    rewriter: Rewriter, draft: Draft, rotary: Node, weights: Iterable[str], made: dict[str, Make]
) -> None:
    heads = rotary.attributes["num_heads"]
    for name in weights:
        ref = rewriter.graph.initializers[name]
        width = ref.shape[-1] // heads
        rotated = rotary.attributes.get("rotary_embedding_dim", 0) or width
        made[name] = _reordered(draft, ref, _order(heads, width, rotated))
        # its encoding stays, as a hint of how exact it is
        rewriter.add_initializer(replace(ref, source=b"", offset=0, nbytes=0, transposed=False))
    attributes = {k: v for k, v in rotary.attributes.items() if k != "interleaved"}
    rewriter.replace(rotary, replace(rotary, attributes=attributes))


def _order(heads: int, width: int, rotated: int) -> Order:
    """(H * D,): the even ones of each head's rotated channels, the odd ones, those not rotated."""
    first = np.arange(0, rotated, 2)
    head = np.concatenate([first, first + 1, np.arange(rotated, width)])
    order: Order = (np.arange(heads)[:, None] * width + head).reshape(-1)
    return order


def _reordered(draft: Draft, ref: WeightRef, order: Order) -> Make:
    return lambda: np.ascontiguousarray(draft.read(ref)[..., order])
