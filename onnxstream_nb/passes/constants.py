"""Compute before the run what does not depend on it: small constants, and known shapes."""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import ENCODINGS, Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter, constant_ref


def rewrite(graph: Graph, read: Read) -> Graph:
    """Replace nodes whose result is known by initializers.

    A transposition of a weight matrix becomes another view of the same bytes.
    """
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        output = node.outputs[0] if len(node.outputs) == 1 else ""
        if not output or node.domain or output in rewriter.kept:
            continue
        ref = _transposed(rewriter, node)
        if ref is None and (value := rewriter.facts.constant(output)) is not None:
            ref = constant_ref(output, value)
        if ref is not None:
            rewriter.add_initializer(ref)
            rewriter.replace(node)
    return rewriter.finish()


def _transposed(rewriter: Rewriter, node: Node) -> WeightRef | None:
    ref = rewriter.graph.initializers.get(node.inputs[0]) if node.op_type == "Transpose" else None
    if ref is None or len(ref.shape) != 2 or node.attributes.get("perm", (1, 0)) != (1, 0):
        return None
    if ref.encoding not in ENCODINGS and ref.encoding != "raw":
        return None
    shape = (ref.shape[1], ref.shape[0])
    return replace(ref, name=node.outputs[0], shape=shape, transposed=not ref.transposed)
