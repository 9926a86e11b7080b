"""Rows looked up in a stored table and then decoded: lookups in a table of decoded rows.

A table that is stored in fewer bits becomes one logical initializer of floats, over the same bytes:
of half floats (Cast of what Gather gives), or of integers in parts (DequantizeLinear of what a
Gather of each gives, or Gather of what DequantizeLinear gives). So a table that is a head's matrix,
too, is one stored weight.
"""

from __future__ import annotations

from dataclasses import replace

from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.passes.constants import widened
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.quantised import dequantised, in_parts, is_matrix, transposed
from onnxstream_nb.passes.rewriting import Rewriter

_BITS = {"int4": 4, "uint4": 4}


def rewrite(graph: Graph, read: Read) -> Graph:
    """Lookups in tables of floats, each over the bytes that were looked up before."""
    rewriter = Rewriter(graph, read)
    made: dict[tuple[object, ...], str] = {}
    for node in graph.nodes:
        found = None if node.domain else _lookup(rewriter, node)
        if found is None:
            continue
        table, ids = found
        if table.matrix not in made:
            made[table.matrix] = rewriter.fresh(table.name)
            rewriter.add_initializer(replace(table, name=made[table.matrix]))
        inputs = (made[table.matrix], ids)
        rewriter.replace(node, Node("Gather", inputs, node.outputs, {"axis": 0}, node.name))
    return rewriter.finish()


def _lookup(rewriter: Rewriter, node: Node) -> tuple[WeightRef, str] | None:
    """The table of floats whose rows a node gives, and the name of the ids."""
    if node.op_type == "Cast":
        return _cast_rows(rewriter, node.inputs[0], node)
    if node.op_type == "DequantizeLinear":
        return _dequantised_rows(rewriter, node)
    if node.op_type == "Gather" and node.attributes.get("axis", 0) == 0:
        factor = dequantised(rewriter, node.inputs[0], turned=True)
        table = None if factor is None else _as_table(factor)
        return None if table is None else (table, node.inputs[1])
    return None


def _gathered(rewriter: Rewriter, value: str) -> tuple[WeightRef, str] | None:
    """The stored table of which a value is rows, and the ids."""
    node = rewriter.made_by(value, "Gather")
    ref = rewriter.graph.initializers.get(node.inputs[0]) if node else None
    if node is None or ref is None or node.attributes.get("axis", 0) != 0:
        return None
    return None if len(ref.shape) != 2 or ref.transposed else (ref, node.inputs[1])


def _cast_rows(rewriter: Rewriter, value: str, cast: Node) -> tuple[WeightRef, str] | None:
    found = _gathered(rewriter, value)
    ref = widened(cast, found[0]) if found else None
    return None if found is None or ref is None else (ref, found[1])


def _dequantised_rows(rewriter: Rewriter, node: Node) -> tuple[WeightRef, str] | None:
    """Rows of integers, of scales and of zero points, of which the last axis has the blocks."""
    found = []
    for value in filter(None, node.inputs):
        cast = rewriter.made_by(value, "Cast")
        if cast is None:
            found.append(_gathered(rewriter, value))
        else:
            found.append(_cast_rows(rewriter, cast.inputs[0], cast))
    known = [each for each in found if each is not None]
    block = int(node.attributes.get("block_size", 0))
    refs, ids = [ref for ref, _ in known], {ids for _, ids in known}
    if len(known) != len(found) or len(ids) != 1 or not block or not is_matrix(node, refs):
        return None
    if node.attributes.get("axis", 1) not in (-1, _rank(rewriter, *ids)):
        return None
    factor = in_parts(refs[0].name, [transposed(ref) for ref in refs], block)
    table = None if factor is None else _as_table(factor)
    return None if table is None else (table, ids.pop())


def _rank(rewriter: Rewriter, ids: str) -> int | None:
    """The axes of ids that are an input of the graph, None of others."""
    shapes = (value.shape for value in rewriter.graph.inputs if value.name == ids)
    return next((len(shape) for shape in shapes if shape is not None), None)


def _as_table(factor: WeightRef) -> WeightRef | None:
    """A factor (D, V) as the table (V, D), when each part has rows of its own that begin with a
    byte."""
    turned = transposed(factor)
    parts = tuple(transposed(part) for part in factor.parts)
    rows = turned.shape[0]
    whole = all(
        not part.transposed
        and part.shape[0] == rows
        and part.shape[1] * _BITS.get(part.dtype, 8) % 8 == 0
        for part in parts
    )
    return replace(turned, parts=parts, block_axis=1) if whole else None
