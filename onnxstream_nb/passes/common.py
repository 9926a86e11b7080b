"""Compute equal things once: equal constants, equal nodes, and equal sizes however they arise."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.passes.evaluate import is_symbolic
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter, has_body

SMALL = 1024
"""Constants up to this many bytes are compared by their contents."""

_RANDOM = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
})  # fmt: skip


def rewrite(graph: Graph, read: Read) -> Graph:
    """Let the readers of a value read an equal one that is computed earlier."""
    rewriter = Rewriter(graph, read)
    now: dict[str, str] = {}
    _merge_constants(rewriter, now)
    known: dict[Hashable, tuple[str, ...]] = {}
    for node in graph.nodes:
        keys = [k for k in (_size_key(rewriter, node), _node_key(node, now)) if k is not None]
        first = next((known[k] for k in keys if k in known), None)
        if first is not None and len(first) == len(node.outputs):
            for old, new in zip(node.outputs, first, strict=True):
                if rewriter.rename(old, new):
                    now[old] = new
        else:
            known.update(dict.fromkeys(keys, node.outputs))
    return rewriter.finish()


def _merge_constants(rewriter: Rewriter, now: dict[str, str]) -> None:
    first: dict[Hashable, str] = {}
    for name, ref in rewriter.graph.initializers.items():
        key = _contents(rewriter, ref)
        original = first.setdefault(key, name) if key is not None else name
        if original != name and rewriter.rename(name, original):
            now[name] = original


def _contents(rewriter: Rewriter, ref: WeightRef) -> Hashable | None:
    if ref.nbytes > SMALL or ref.encoding != "raw" or ref.dtype == "string":
        return None
    value = rewriter.facts.constant(ref.name)
    return None if value is None else (ref.dtype, ref.shape, value.tobytes())


def _size_key(rewriter: Rewriter, node: Node) -> Hashable | None:
    """What an integer value holds, where that is known as symbols."""
    value = rewriter.facts.value(node.outputs[0]) if len(node.outputs) == 1 else None
    if value is None or not is_symbolic(value):
        return None
    return ("size", value.shape, tuple(value.flat))


def _node_key(node: Node, now: dict[str, str]) -> Hashable | None:
    if node.op_type in _RANDOM or has_body(node) or not node.outputs:
        return None
    attributes = tuple(sorted((k, _hashable(v)) for k, v in node.attributes.items()))
    inputs = tuple(now.get(i, i) for i in node.inputs)
    # An omitted output is another signature than a named one.
    named = tuple(bool(o) for o in node.outputs)
    return (node.domain, node.op_type, inputs, attributes, named)


def _hashable(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{value.tobytes().hex()}"
    return f"{type(value).__name__}{value!r}"
