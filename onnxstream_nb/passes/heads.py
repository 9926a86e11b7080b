"""Splitting into heads and merging them again -> the three-dimensional forms of the operators.

RotaryEmbedding and Attention take (batch, sequence, heads * channels) as projections make it. The
Reshape and Transpose that remain around them cancel, which `identity` does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter
from onnxstream_nb.passes.shape_rules import Shape

_SWAP = (0, 2, 1, 3)


def rewrite_rotary(graph: Graph, read: Read) -> Graph:
    """RotaryEmbedding of split heads: rotate first, split afterwards."""
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type != "RotaryEmbedding" or node.domain:
            continue
        split = _split(rewriter, node.inputs[0])
        if split is not None:
            nodes, flat, (_, _, heads, width) = split
            attributes = {**node.attributes, "num_heads": heads}
            inputs = (flat, *node.inputs[1:])
            rotated = replace(node, inputs=inputs, attributes=attributes)
            rewriter.replace(node, *nodes, *_split_after(rewriter, rotated, heads, width))
    return rewriter.finish()


def rewrite_attention(graph: Graph, read: Read) -> Graph:
    """Attention whose query, keys and values are all split heads: leave them whole."""
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        if node.op_type != "Attention" or node.domain:
            continue
        splits = [s for i in node.inputs[:3] if (s := _split(rewriter, i)) is not None]
        if len(splits) != 3:
            continue
        q, k, v = (shape for _, _, shape in splits)
        attributes = {**node.attributes, "q_num_heads": q[2], "kv_num_heads": k[2]}
        inputs = (*(flat for _, flat, _ in splits), *node.inputs[3:])
        whole = replace(node, inputs=inputs, attributes=attributes)
        before = [n for nodes, _, _ in splits for n in nodes]
        rewriter.replace(node, *before, *_split_after(rewriter, whole, q[2], v[3]))
    return rewriter.finish()


def _split(rewriter: Rewriter, value: str) -> tuple[list[Node], str, Shape] | None:
    """Of a (B, H, T, D) value: nodes to add, the name of it as (B, T, H*D), and (B, T, H, D)."""
    swap = rewriter.made_by(value, "Transpose")
    if swap is None or swap.attributes.get("perm") != _SWAP:
        return None
    shape = rewriter.facts.shape(swap.inputs[0])
    if shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        return None
    reshape = rewriter.made_by(swap.inputs[0], "Reshape")
    if reshape is not None:
        flat = rewriter.facts.shape(reshape.inputs[0])
        if flat == (*shape[:2], shape[2] * shape[3]):
            return [], reshape.inputs[0], shape
    target = np.array([0, 0, shape[2] * shape[3]], np.int64)
    merge = _reshape(rewriter, swap.inputs[0], target, f"{value}.merged")
    return [merge], merge.outputs[0], shape


def _split_after(rewriter: Rewriter, node: Node, heads: object, width: object) -> list[Node]:
    """The node, with its first output split so that it is what it was in four dimensions."""
    output = node.outputs[0]
    whole = rewriter.fresh(f"{output}.whole")
    target = np.array([0, 0, heads, width], np.int64)
    split = _reshape(rewriter, whole, target, f"{output}.split")
    swap = Node("Transpose", split.outputs, (output,), {"perm": _SWAP}, rewriter.fresh(output))
    return [replace(node, outputs=(whole, *node.outputs[1:])), split, swap]


def _reshape(rewriter: Rewriter, value: str, target: np.ndarray[tuple[int], np.dtype[np.int64]],
             stem: str) -> Node:  # fmt: skip
    name = rewriter.constant(f"{stem}.shape", target)
    return rewriter.node("Reshape", (value, name), stem)
