"""Compute before the run what does not depend on it: small constants, and known shapes."""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import DTYPES, ENCODINGS, Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter, constant_ref


def rewrite(graph: Graph, read: Read) -> Graph:
    """Replace nodes whose result is known by initializers.

    A weight matrix that is transposed, and one that is stored in half the bits and widened to
    float32, become other views of the same bytes.
    """
    rewriter = Rewriter(rewrite_views(graph, read), read)
    for node in rewriter.graph.nodes:
        output = _only_output(rewriter, node)
        if output and (value := rewriter.facts.constant(output)) is not None:
            rewriter.add_initializer(constant_ref(output, value))
            rewriter.replace(node)
    return rewriter.finish()


def rewrite_views(graph: Graph, read: Read) -> Graph:
    """Only other views of stored bytes: nothing is read."""
    while True:
        rewriter = Rewriter(graph, read)
        for node in graph.nodes:
            ref = _viewed(rewriter, node) if _only_output(rewriter, node) else None
            if ref is not None:
                rewriter.add_initializer(ref)
                rewriter.replace(node)
        rewritten = rewriter.finish()
        if rewritten is graph:
            return graph
        graph = rewritten


def widened(node: Node, ref: WeightRef) -> WeightRef | None:
    """What a Cast makes of a stored weight, when that is float32 of the very same numbers."""
    to = DTYPES.get(node.attributes.get("to", 0))
    if ref.encoding != "raw" or ref.dtype not in ("float16", "bfloat16") or to != "float32":
        return None
    return replace(ref, dtype=to, encoding=ref.dtype)


def _only_output(rewriter: Rewriter, node: Node) -> str:
    """The output of a node that initializers could replace, or nothing."""
    output = node.outputs[0] if len(node.outputs) == 1 and not node.domain else ""
    return "" if output in rewriter.kept else output


def _viewed(rewriter: Rewriter, node: Node) -> WeightRef | None:
    """The result of a node as another view of an initializer's bytes."""
    if node.op_type not in ("Cast", "Transpose"):
        return None
    ref = rewriter.graph.initializers.get(node.inputs[0])
    if ref is not None:
        ref = widened(node, ref) if node.op_type == "Cast" else _transposed(node, ref)
    return None if ref is None else replace(ref, name=node.outputs[0])


def _transposed(node: Node, ref: WeightRef) -> WeightRef | None:
    if len(ref.shape) != 2 or node.attributes.get("perm", (1, 0)) != (1, 0):
        return None
    if ref.encoding not in ENCODINGS and ref.encoding != "raw":
        return None
    return replace(ref, shape=(ref.shape[1], ref.shape[0]), transposed=not ref.transposed)
