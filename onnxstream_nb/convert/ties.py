"""Weights that are one in their files are one in the output: a step that shares them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..graph import Node, WeightRef
from ..passes.rewriting import captured
from .draft import Draft


def share(draft: Draft) -> Draft:
    """Initializers over the same bytes become one; what sees it transposed gets a Transpose.

    So a table that is the embedding and, transposed, the output matrix, is written once.
    """
    graph = draft.graph
    kept = captured(graph) | {o.name for o in graph.outputs}
    views: list[Node] = []
    renamed: dict[str, str] = {}
    for refs in _groups(ref for n, ref in graph.initializers.items() if n not in draft.made):
        own, *others = sorted(refs, key=lambda ref: ref.transposed)
        for ref in others:
            if ref.transposed != own.transposed:
                axes = len(ref.shape)
                perm = (*range(axes - 2), axes - 1, axes - 2)
                views.append(_view("Transpose", own, ref, perm=perm))
            elif ref.name in kept:
                views.append(_view("Identity", own, ref))
            else:
                renamed[ref.name] = own.name
    gone = renamed.keys() | {node.outputs[0] for node in views}
    if not gone:
        return draft
    nodes = (replace(n, inputs=tuple(renamed.get(i, i) for i in n.inputs)) for n in graph.nodes)
    initializers = {n: ref for n, ref in graph.initializers.items() if n not in gone}
    return draft.with_(graph.with_(nodes=(*views, *nodes), initializers=initializers))


def _view(op_type: str, own: WeightRef, ref: WeightRef, **attributes: Any) -> Node:
    return Node(op_type, (own.name,), (ref.name,), attributes, f"{ref.name}/{op_type}")


def _groups(refs: Iterable[WeightRef]) -> list[list[WeightRef]]:
    """Those that stand for the same tensor in the same bytes, transposed or not."""
    found: dict[object, list[WeightRef]] = {}
    for ref in refs:
        if ref.nbytes and not isinstance(ref.source, bytes):
            same = (ref.key, ref.dtype, ref.stored_shape, ref.scale, ref.zero_point)
            found.setdefault(same, []).append(ref)
    return [group for group in found.values() if len(group) > 1]
