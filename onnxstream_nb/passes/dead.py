"""Drop what no output depends on."""

from __future__ import annotations

from onnxstream_nb.graph import Graph
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import remove_dead


def rewrite(graph: Graph, read: Read) -> Graph:
    """Keep the nodes and initializers that an output needs, bodies of nodes included."""
    return remove_dead(graph)
