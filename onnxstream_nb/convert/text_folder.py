"""A draft written as an OnnxStream folder."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from .. import formats
from ..errors import UnsupportedError
from ..formats.onnx_write import to_model_proto
from ..formats.onnxstream_write import Contents, write
from ..formats.sink import Folder
from ..graph import Graph, Node, Value
from ..passes.facts import Facts, Read
from ..passes.rewriting import remove_dead
from ..progress import Report
from .draft import Draft
from .opset14 import storable
from .streamed_llm import streamed

_LARGE = 1 << 16  # elements of an initializer that no shape depends on

Dims = tuple[int, ...]


def write_text_folder(draft: Draft, folder: Folder, report: Report, *, dtype: str = "") -> Graph:
    """Write `draft` into `folder` as model.txt and .bin files; returns the graph that was written.

    It becomes a language model with OnnxStream's names where it has a cache, and loses its fused
    operators, see `streamed`. `dtype` is that of the matrices, see `formats.onnxstream_write`.
    """
    draft = storable(streamed(draft))
    draft = draft.with_(with_own_outputs(remove_dead(draft.graph)))
    contents = Contents(draft.read, draft.pieces, known_dims(draft.graph, draft.read))
    write(draft.graph, folder, contents, report, dtype=dtype)
    return draft.graph


def with_own_outputs(graph: Graph) -> Graph:
    """The graph with outputs that no node reads: the text knows them by that alone.

    An output that is used as well, is an input or a constant, becomes a copy. The cache's outputs
    and logits are known by their names.
    """
    read = {i for n in graph.nodes for i in n.inputs}
    computed = graph.producers()
    copied = [o for o in graph.outputs if o.name not in computed or _is_hidden(o.name, read)]
    if not copied:
        return graph
    inner = {o.name: f"{o.name}.inner" for o in copied if o.name in computed}
    nodes = [_with_names(n, inner) for n in graph.nodes]
    nodes += [_copy(o, inner.get(o.name, o.name)) for o in copied]
    clash = {o.name: f"{o.name}.copy" for o in copied if o.name not in computed}
    nodes = [_with_outputs(n, clash) if n in nodes[-len(copied) :] else n for n in nodes]
    outputs = tuple(
        Value(clash.get(o.name, o.name), o.dtype, o.shape) for o in graph.outputs
    )
    return graph.with_(nodes=tuple(nodes), outputs=outputs)
