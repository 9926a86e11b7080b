"""A step: weights of bytes with one scale and zero point, as OnnxStream stores them, kept so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..graph import Node, WeightRef
from ..passes.rewriting import constant_ref
from .draft import Draft


def keep(draft: Draft) -> Draft:
    """Each such weight as its bytes and a DequantizeLinear: exactly (q - zero_point) * scale."""
    nodes: list[Node] = []
    initializers = dict(draft.graph.initializers)
    for name, ref in draft.graph.initializers.items():
        if ref.encoding != "uint8" or ref.dtype != "float32" or name in draft.made:
            continue
        del initializers[name]
        scale = np.array(ref.scale, np.float32)
        parts = (
            replace(_as_bytes(ref), name=f"{name}.uint8"),
            constant_ref(f"{name}.scale", scale),
            constant_ref(f"{name}.zero_point", np.array(ref.zero_point, np.uint8)),
        )
        initializers |= {part.name: part for part in parts}
        names = tuple(part.name for part in parts)
        nodes.append(Node("DequantizeLinear", names, (name,), name=f"{name}/DequantizeLinear"))
    if not nodes:
        return draft
    graph = draft.graph
    return draft.with_(graph.with_(nodes=(*nodes, *graph.nodes), initializers=initializers))


def _as_bytes(ref: WeightRef) -> WeightRef:
    return replace(ref, dtype="uint8", encoding="raw", scale=1.0, zero_point=0)
