"""A draft written as an OnnxStream folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import onnx

from ...errors import UnsupportedError
from ...formats.onnx_write import to_model_proto
from ...formats.onnxstream import ALWAYS_OUTPUT
from ...formats.onnxstream_write import Contents, write
from ...formats.sink import Folder
from ...graph import Graph, Node, Value
from ...passes.facts import Facts, Read
from ...passes.rewriting import remove_dead
from ...progress import Report
from ..draft import Draft
from .decompose import foreign
from .onnxstream_uint8 import uint8_weights
from .opset14 import storable
from .renaming import renamed
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
    if dtype == "uint8":
        draft, dtype = uint8_weights(draft, report), ""
    if missing := foreign(draft.graph):
        report(f"OnnxStream's own engine does not know {', '.join(missing)}; this one does", None)
    contents = Contents(draft.read, draft.pieces, known_dims(draft.graph, draft.read))
    write(draft.graph, folder, contents, report, dtype=dtype)
    return draft.graph


def with_own_outputs(graph: Graph) -> Graph:
    """The graph with outputs that a node makes and none reads: the text knows them by that alone.

    Any other becomes a copy: under its own name, but NAME.copy where the output is an input. The
    cache's outputs and logits are known by their names.
    """
    read = {i for n in graph.nodes for i in n.inputs}
    computed, inputs = graph.producers(), {i.name for i in graph.inputs}
    shared = [
        o.name
        for o in graph.outputs
        if o.name not in computed or (o.name in read and not ALWAYS_OUTPUT.fullmatch(o.name))
    ]
    if not shared:
        return graph
    inner = {name: f"{name}.inner" for name in shared if name not in inputs}
    copies = {name: f"{name}.copy" for name in shared if name in inputs}
    graph = renamed(graph, inner)
    made = [
        Node("Concat", (inner.get(n, n),), (copies.get(n, n),), {"axis": 0}, f"{n}.copy")
        for n in shared
    ]
    names = {new: old for old, new in inner.items()} | copies
    outputs = (replace(o, name=names.get(o.name, o.name)) for o in graph.outputs)
    return graph.with_(nodes=(*graph.nodes, *made), outputs=tuple(outputs))


def known_dims(graph: Graph, read: Read) -> Callable[[str], Dims | None]:
    """What tells the sizes of a value, 0 where they are open; None where not even its rank is."""
    facts = Facts(graph, read)
    inferred = _inferred(graph, read)
    declared = {v.name: v for v in graph.outputs}

    def dims(name: str) -> Dims | None:
        shape = facts.shape(name)
        own = None if shape is None else tuple(s if isinstance(s, int) else 0 for s in shape)
        other = inferred.get(name)
        if own is None or other is None or len(own) != len(other):
            own = other if own is None else own
        else:
            own = tuple(a or b for a, b in zip(own, other, strict=True))
        if own is None and name in declared:
            raise UnsupportedError(
                f"output {name!r}: its number of dimensions is not known; export the model anew "
                "with the shapes of its outputs"
            )
        return own

    return dims


def _inferred(graph: Graph, read: Read) -> dict[str, Dims]:
    """What onnx's own inference finds, of convolutions above all."""
    large = {n: r for n, r in graph.initializers.items() if prod(r.shape) > _LARGE}
    small = {n: r for n, r in graph.initializers.items() if n not in large}
    inputs = (*graph.inputs, *(Value(n, r.dtype, r.shape) for n, r in large.items()))
    model = to_model_proto(graph.with_(inputs=inputs, initializers=small), read)
    values = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*values.value_info, *values.output)
        if value.type.tensor_type.HasField("shape")
    }
