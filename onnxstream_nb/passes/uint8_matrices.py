"""Matrices of OnnxStream's 8-bit folders as integers with one scale and zero point in parts.

Then they are multiplied as other quantised matrices are: also where a table of rows is a head's
matrix, of which its lookups keep the bytes as they are.
"""

from __future__ import annotations

import struct

from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.quantised import in_parts
from onnxstream_nb.passes.rewriting import Rewriter


def rewrite(graph: Graph, read: Read) -> Graph:
    """Products with matrices of encoding "uint8" as products with matrices in parts."""
    rewriter = Rewriter(graph, read)
    made: dict[str, str] = {}
    for node in graph.nodes:
        ref = _factor(graph, node)
        if ref is None:
            continue
        if ref.name not in made:
            parts = _parts(rewriter.fresh(f"{ref.name}.matrix"), ref)
            if parts is None:
                continue
            rewriter.add_initializer(parts)
            made[ref.name] = parts.name
        inputs = (node.inputs[0], made[ref.name])
        rewriter.replace(node, Node("MatMul", inputs, node.outputs, node.attributes, node.name))
    return rewriter.finish()


def _factor(graph: Graph, node: Node) -> WeightRef | None:
    """The matrix (K, N) of encoding "uint8" that a MatMul multiplies by."""
    if node.op_type != "MatMul" or node.domain:
        return None
    ref = graph.initializers.get(node.inputs[1])
    return ref if ref is not None and ref.encoding == "uint8" and len(ref.shape) == 2 else None


def _parts(name: str, ref: WeightRef) -> WeightRef | None:
    scale = struct.pack("<f", ref.scale)
    return in_parts(
        name,
        (
            WeightRef(
                ref.name, ref.shape, "uint8", ref.source, ref.offset, ref.nbytes,
                transposed=ref.transposed,
            ),
            WeightRef(f"{name}.scale", (1, 1), "float32", scale, 0, len(scale)),
            WeightRef(f"{name}.zero", (1, 1), "uint8", bytes([ref.zero_point]), 0, 1),
        ),
        ref.shape[0],
    )  # fmt: skip
