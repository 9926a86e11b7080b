"""A matrix that a graph holds twice, once as a table and once as a head, becomes one.

Exporters that fold constants transpose the head of a model with tied embeddings, and so store it
beside the table that it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...graph import Graph, Node, WeightRef
from ...passes.rewriting import Rewriter
from ..draft import FLOATS, Draft

Array = np.ndarray[Any, Any]

_ROWS = 1024  # compared at a time


def tied(draft: Draft) -> Draft:
    """The draft with every copy of an embedding's table, transposed or not, made from the table:
    (V, D) is stored once, and a Transpose gives (D, V)."""
    graph = draft.graph
    for table in _tables(graph):
        for copy in _candidates(graph, table):
            graph = _merged(draft, graph, table, copy)
    return draft if graph is draft.graph else draft.with_(graph)


def _tables(graph: Graph) -> Iterator[WeightRef]:
    """The matrices (V, D) whose rows are looked up, each once."""
    names = (n.inputs[0] for n in graph.nodes if n.op_type == "Gather" and not n.domain)
    for name in dict.fromkeys(names):
        ref = graph.initializers.get(name)
        if ref is not None and len(ref.shape) == 2 and ref.dtype in FLOATS.values():
            yield ref


def _candidates(graph: Graph, table: WeightRef) -> list[WeightRef]:
    """Other initializers of the table's type and sizes."""
    sizes = (table.shape, table.shape[::-1])
    return [
        ref
        for name, ref in graph.initializers.items()
        if name != table.name and ref.dtype == table.dtype and ref.shape in sizes
    ]


def _merged(draft: Draft, graph: Graph, table: WeightRef, copy: WeightRef) -> Graph:
    """The graph without `copy`, if it holds the elements of `table`."""
    if table.name not in graph.initializers or copy.name not in graph.initializers:
        return graph
    first, second = draft.read(table), draft.read(copy)
    if copy.shape == table.shape and _equal(first, second):
        rewriter = Rewriter(graph, draft.read)
        rewriter.rename(copy.name, table.name)
        return rewriter.finish()
    if copy.shape == table.shape[::-1] and _equal(first, second.T):
        node = Node("Transpose", (table.name,), (copy.name,), {"perm": (1, 0)}, copy.name)
        rest = {name: ref for name, ref in graph.initializers.items() if name != copy.name}
        return graph.with_(nodes=(node, *graph.nodes), initializers=rest)
    return graph


def _equal(a: Array, b: Array) -> bool:
    """Whether two matrices hold the same bits, found out some rows at a time."""
    return all(
        a[i : i + _ROWS].tobytes() == b[i : i + _ROWS].tobytes() for i in range(0, len(a), _ROWS)
    )
