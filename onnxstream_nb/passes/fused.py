"""For a GPU, where a launch costs as much as a small operator takes: several of them are one.

Operators of the domain onnxstream_nb, so this is no rewrite for graphs that are written out:

    AddRMSNormalization (a, b, scale) -> a + b, and its RMSNormalization
    SwishMul (x, y) -> swish(x) y
    MatMuls (x, up to JOINED matrices) -> the product with each
    RotaryAttention (q, k, v, past keys, past values, cos, sin) -> Attention of rotated q and k
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxstream_nb.graph import Graph, Node

DOMAIN = "onnxstream_nb"
JOINED = 3


def rewrite_fused(graph: Graph) -> Graph:
    """The graph with such nodes in place of several."""
    return _with_products(_with_pairs(_with_rotation(graph)))


def _with_products(graph: Graph) -> Graph:
    """Products of one value, where the first of them is computed."""
    places: dict[str, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        if _is(node, "MatMul") and _is_matrix(node.inputs[1], graph):
            places.setdefault(node.inputs[0], []).append(i)
    nodes: list[Node | None] = list(graph.nodes)
    for of_one in places.values():
        for first in range(0, len(of_one), JOINED):
            group = of_one[first : first + JOINED]
            if len(group) > 1:
                joined = _products([graph.nodes[i] for i in group])
                for i in group:
                    nodes[i] = None
                nodes[group[0]] = joined
    return graph.with_(nodes=tuple(node for node in nodes if node is not None))


def _is_matrix(name: str, graph: Graph) -> bool:
    return name in graph.initializers and len(graph.initializers[name].shape) == 2


def _products(nodes: Sequence[Node]) -> Node:
    return replace(
        nodes[0], op_type="MatMuls", domain=DOMAIN, attributes={},
        inputs=(nodes[0].inputs[0], *(node.inputs[1] for node in nodes)),
        outputs=tuple(node.outputs[0] for node in nodes),
    )  # fmt: skip


def _with_rotation(graph: Graph) -> Graph:
    """Attention that rotates its queries and keys itself."""
    made = {name: node for node in graph.nodes for name in node.outputs}
    readers = graph.consumers()
    outputs = {value.name for value in graph.outputs}
    nodes: dict[int, Node] = {id(node): node for node in graph.nodes}
    for node in graph.nodes:
        turned = [made.get(name) for name in node.inputs[:2]] if _is(node, "Attention") else []
        if len(turned) < 2 or not _rotates_alone(node, turned):
            continue
        names = node.inputs[:2]
        if any(len(readers[name]) > 1 or name in outputs for name in names):
            continue
        first, second = (each for each in turned if each is not None)
        nodes[id(node)] = _rotary_attention(node, first, second)
        del nodes[id(first)], nodes[id(second)]
    return graph.with_(nodes=tuple(nodes.values()))


def _rotates_alone(attention: Node, turned: Sequence[Node | None]) -> bool:
    """Whether queries and keys are both rotated by the same tables, token by token, and there is
    no more to attention than a causal limit and a cache."""
    first, second = turned
    if first is None or second is None or first is second:
        return False
    if not (_is(first, "RotaryEmbedding") and _is(second, "RotaryEmbedding")):
        return False
    given = attention.inputs
    plain = len(given) >= 6 and not given[3] and all(given[4:6]) and not any(given[6:])
    heads = [attention.attributes.get(name) for name in ("q_num_heads", "kv_num_heads")]
    alike = [
        (node.inputs[1:], *(node.attributes.get(name, 0) for name in _ROTATION)) for node in turned
        if node is not None
    ]  # fmt: skip
    own = [node.attributes.get("num_heads") for node in (first, second)]
    return plain and all(heads) and heads == own and alike[0] == alike[1] and len(alike[0][0]) == 2


_ROTATION = ("interleaved", "rotary_embedding_dim")


def _rotary_attention(attention: Node, first: Node, second: Node) -> Node:
    rotation = {name: first.attributes[name] for name in _ROTATION if name in first.attributes}
    return replace(
        attention, op_type="RotaryAttention", domain=DOMAIN,
        inputs=(
            first.inputs[0], second.inputs[0], attention.inputs[2], *attention.inputs[4:6],
            *first.inputs[1:],
        ),
        attributes={**attention.attributes, **rotation},
    )  # fmt: skip


def _with_pairs(graph: Graph) -> Graph:
    """Two operators as one node, where the first is computed."""
    readers = graph.consumers()
    outputs = {value.name for value in graph.outputs}
    fused: dict[int, Node] = {}
    gone: set[int] = set()
    places = {id(node): i for i, node in enumerate(graph.nodes)}
    for i, node in enumerate(graph.nodes):
        followers = readers.get(node.outputs[0], []) if node.outputs else []
        if _is(node, "Add"):
            norms = [n for n in followers if _is(n, "RMSNormalization") and _normalizes(n, node)]
            if len(norms) == 1 and norms[0].inputs[1] in graph.initializers:
                fused[i] = _add_norm(node, norms[0])
                gone.add(places[id(norms[0])])
        elif _is(node, "Swish") and node.attributes.get("alpha", 1.0) == 1.0:
            alone = len(followers) == 1 and node.outputs[0] not in outputs
            if alone and _is(followers[0], "Mul") and len(set(followers[0].inputs)) == 2:
                fused[places[id(followers[0])]] = _swish_mul(node, followers[0])
                gone.add(i)
    nodes = tuple(fused.get(i, node) for i, node in enumerate(graph.nodes) if i not in gone)
    return graph.with_(nodes=nodes)


def _is(node: Node, op_type: str) -> bool:
    return node.op_type == op_type and not node.domain


def _normalizes(norm: Node, add: Node) -> bool:
    return norm.inputs[0] == add.outputs[0] and norm.inputs[1] != add.outputs[0]


def _add_norm(add: Node, norm: Node) -> Node:
    return replace(
        norm, op_type="AddRMSNormalization", domain=DOMAIN,
        inputs=(*add.inputs, norm.inputs[1]), outputs=(add.outputs[0], norm.outputs[0]),
    )  # fmt: skip


def _swish_mul(swish: Node, mul: Node) -> Node:
    other = next(name for name in mul.inputs if name != swish.outputs[0])
    return replace(
        mul, op_type="SwishMul", domain=DOMAIN, inputs=(swish.inputs[0], other), attributes={}
    )
