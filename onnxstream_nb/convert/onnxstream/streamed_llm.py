"""A step from any language model with a cache to one as OnnxStream's chat program runs them.

Its inputs are input_ids (1, T), attention_mask (1, P + T), position_ids (1, T) and pkv0, pkv1, ...
(1, KV, P, D), keys and values in turn; its outputs logits and opkv0, ... (1, KV, P + T, D).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ... import passes
from ...graph import Graph, Node, Value, WeightRef
from ...passes import CachePair, find_cache
from ..draft import Draft
from .decompose import decompose
from .half_split import half_split
from .renaming import renamed

PADDING = "attention_mask"
_FIRST = ("input_ids", PADDING, "position_ids", "logits")
_ANGLES = frozenset({"Cast", "Unsqueeze", "Mul", "Cos", "Sin", "Concat"})
_FLOAT32_SCOPE = "/model/rotary_emb/input_layernorm/"
"""What OnnxStream's chat program computes in float32 beside its float16: operators whose names
hold /input_layernorm/. A float16 angle of position 3000 would be wrong by a radian."""


def streamed(draft: Draft) -> Draft:
    """The draft as OnnxStream's text can hold it: opset 14, and a language model's own names.

    A graph that has no cache is only decomposed, see `decompose` for what that refuses.
    """
    draft = draft.with_(passes.with_quantised_weights(draft.graph))
    pairs = find_cache(draft.graph)
    if not pairs:
        return tied_once(decompose(draft))
    draft = half_split(_with_plain_masks(draft))
    graph = renamed(draft.graph, _names(pairs))
    padding = _padding(graph)
    graph = graph.with_(inputs=(*graph.inputs, *padding)) if padding else graph
    draft = decompose(draft.with_(graph), PADDING if padding else "")
    draft = draft.with_(_in_order(_float32_angles(draft.graph)))
    return tied_once(draft)


def _with_plain_masks(draft: Draft) -> Draft:
    """An export's masks as what they say, so that they are written as OnnxStream can compute them.

    What attention_mask hid is hidden again where the input is put back, see `decompose`.
    """
    fused = passes.optimize(draft.graph, draft.read)
    plain = passes.rewrite_unpadded(fused, draft.read)
    if plain is fused or PADDING in {i.name for i in plain.inputs}:
        return draft
    return draft.with_(plain)


def _names(pairs: Iterable[CachePair]) -> dict[str, str]:
    """The cache's names: keys are even, values odd."""
    names: dict[str, str] = {}
    counts = {"key": 0, "value": 1}
    for pair in pairs:
        number = counts[pair.kind]
        counts[pair.kind] += 2
        names[pair.past_input] = f"pkv{number}"
        names[pair.present_output] = f"opkv{number}"
    return names


def _padding(graph: Graph) -> list[Value]:
    """The input of the padding mask, where the graph has attentions that lack one."""
    known = {i.name for i in graph.inputs}
    fused = any(n.op_type == "Attention" and not n.domain for n in graph.nodes)
    if not fused or PADDING in known or "input_ids" not in known:
        return []
    return [Value(PADDING, "int64", (1, "total"))]


def _float32_angles(graph: Graph) -> Graph:
    """The operators between positions and cos and sin in a scope that is computed in float32."""
    producers = graph.producers()
    angles = {id(n): n for n in graph.nodes if n.op_type in ("Cos", "Sin")}
    pending = list(angles.values())
    for node in pending:  # grows
        for name in node.inputs:
            before = producers.get(name)
            if before is not None and before.op_type in _ANGLES and id(before) not in angles:
                angles[id(before)] = before
                pending.append(before)
    numbers = {key: i for i, key in enumerate(angles)}
    nodes = tuple(
        replace(n, name=f"{_FLOAT32_SCOPE}{n.op_type}_{numbers[id(n)]}") if id(n) in angles else n
        for n in graph.nodes
    )
    return graph.with_(nodes=nodes)


def _in_order(graph: Graph) -> Graph:
    """Inputs and outputs in OnnxStream's order."""

    def place(value: Value) -> tuple[int, int]:
        if value.name in _FIRST:
            return _FIRST.index(value.name), 0
        number = re.fullmatch(r"o?pkv(\d+)", value.name)
        return len(_FIRST), int(number[1]) if number else -1

    return graph.with_(
        inputs=tuple(sorted(graph.inputs, key=place)),
        outputs=tuple(sorted(graph.outputs, key=place)),
    )


def tied_once(draft: Draft) -> Draft:
    """A matrix that is used both as it is and transposed is stored once, and transposed by a node.

    An embedding and the head that is tied to it. Our own engine reads it as a second view.
    """
    graph = draft.graph
    plain = {r.key: n for n, r in graph.initializers.items() if _is_matrix(r) and not r.transposed}
    turned = {
        name: plain[ref.key]
        for name, ref in graph.initializers.items()
        if _is_matrix(ref) and ref.transposed and ref.key in plain
    }
    if not turned:
        return draft
    nodes: list[Node] = []
    for node in graph.nodes:
        for name in dict.fromkeys(i for i in node.inputs if i in turned):
            table = turned.pop(name)
            nodes.append(Node("Transpose", (table,), (name,), {"perm": (1, 0)}, f"/{name}/T"))
        nodes.append(node)
    made = {o for n in nodes for o in n.outputs}
    kept = {n: r for n, r in graph.initializers.items() if n not in made}
    return draft.with_(graph.with_(nodes=tuple(nodes), initializers=kept))


def _is_matrix(ref: WeightRef) -> bool:
    return len(ref.shape) == 2 and not isinstance(ref.source, bytes) and ref.encoding != "uint8"
