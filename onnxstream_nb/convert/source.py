"""A model of any format as a draft, simplified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import formats, passes
from ..graph import Graph, Node
from ..passes.constants import widened
from ..passes.rewriting import Rewriter, captured
from .draft import Draft
from .floats import WIDE
from .onnxstream.renaming import renamed


def read(source: Path) -> Draft:
    """The model at `source`, simplified: constants folded, shapes computed where they are known,
    and dead, doubled and idle nodes gone. Weights that the graph widens are floats stored so."""
    draft = Draft(formats.load(source))
    return draft.with_(_plain_names(_lookups(passes.clean(draft.graph, draft.read), draft)))


def _lookups(graph: Graph, draft: Draft) -> Graph:
    """Rows that are looked up in a table of halves and then widened, as rows of a float table."""
    rewriter = Rewriter(graph, draft.read)
    tables: dict[str, str] = {}
    for node in graph.nodes:
        cast = node.op_type == "Cast" and not node.domain
        gather = rewriter.made_by(node.inputs[0], "Gather") if cast else None
        ref = graph.initializers.get(gather.inputs[0]) if gather else None
        table = widened(node, ref) if ref is not None else None
        if gather is None or table is None:
            continue
        if table.name not in tables:
            tables[table.name] = rewriter.fresh(f"{table.name}{WIDE}")
            rewriter.add_initializer(replace(table, name=tables[table.name]))
        inputs = (tables[table.name], *gather.inputs[1:])
        name = node.name.removesuffix("/Cast")
        lookup = Node("Gather", inputs, node.outputs, gather.attributes, name)
        rewriter.replace(node, lookup)
    return rewriter.finish()


def _plain_names(graph: Graph) -> Graph:
    """Weights that an earlier conversion stored as halves, under the names they had before it."""
    taken = {*graph.producers(), *graph.initializers, *(i.name for i in graph.inputs)}
    inner = captured(graph)
    plain = {
        name: name.removesuffix(WIDE)
        for name in graph.initializers
        if name.endswith(WIDE) and name.removesuffix(WIDE) not in taken and name not in inner
    }
    return renamed(graph, plain) if plain else graph
