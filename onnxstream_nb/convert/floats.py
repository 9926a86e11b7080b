"""Steps: weights of floats stored as float32, float16 or bfloat16, and widened where they are used.

The graph computes in float32 whatever its weights are stored as: a stored weight passes through a
Cast, a table of which rows are looked up after the lookup, so that only those are cast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UnsupportedError
from ..graph import Graph, Node, WeightRef
from ..passes.rewriting import captured
from ..passes.upgrade import raise_opset
from .draft import Array, Draft, placeholder

HALVES = {"float16": 10, "bfloat16": 16}
"""Element types that are widened -> their numbers in onnx.TensorProto."""
WIDE = ".float32"
"""What the name of a stored weight ends with once it is widened."""
FLOAT = 1
SMALL = 1024  # elements; fewer stay float32: norms, biases, what is no weight
_BFLOAT16_OPSET = 13  # from which on Cast, Gather and Transpose take bfloat16

_WEIGHT_INPUTS = {
    "MatMul": (0, 1), "Gemm": (0, 1), "Gather": (0,), "Transpose": (0,), "Conv": (1,),
    "ConvTranspose": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2), "Einsum": (0, 1),
}  # fmt: skip
_MOVES = ("Gather", "Transpose")  # what the elements pass through as they are


@dataclass(frozen=True)
class Stored:
    """Makes a weight of a draft in another type, a piece at a time."""

    draft: Draft
    ref: WeightRef
    dtype: str

    def __call__(self) -> Array:
        """All of it."""
        found = [piece.reshape(-1) for piece in self.pieces()]
        return np.concatenate(found).reshape(self.ref.shape)

    def pieces(self) -> Iterator[Array]:
        """The elements in C order."""
        return self.draft.pieces(self.ref, self.dtype)


def store(draft: Draft, dtype: str | None) -> Draft:
    """The draft with its large float weights stored as `dtype`, or without one as their files have
    them: halves as they are, block encodings as float16. Small ones and vectors are float32.

    Raises UnsupportedError for a graph that is too old for bfloat16; a value that float16 cannot
    hold is an error when the weight is written.
    """
    if dtype is not None:
        draft = draft.with_(widened(draft.graph))
    kinds = _kinds(draft.graph, dtype)
    graph = draft.graph
    if "bfloat16" in kinds.values():
        raised = raise_opset(graph, _BFLOAT16_OPSET)
        if raised is None:
            raise UnsupportedError(
                f"the graph's opset {graph.opset.get('')} has no bfloat16, and it cannot be raised:"
                " convert with --dtype fp16, or export the model with a newer opset"
            )
        graph = raised
    made = {}
    initializers = dict(graph.initializers)
    for name, kind in kinds.items():
        ref = initializers[name]
        if name not in draft.made and ref.encoding == kind:
            initializers[name] = replace(ref, dtype=kind, encoding="raw")
        else:
            made[name] = Stored(draft, ref, kind)
            initializers[name] = placeholder(name, kind, ref.shape)
    nodes = tuple(_Casts(graph, kinds).nodes())
    return draft.with_(graph.with_(nodes=nodes, initializers=initializers), made)


def _kinds(graph: Graph, dtype: str | None) -> dict[str, str]:
    """Initializer -> the half type it is stored in, for those that are."""
    inside = captured(graph) | {o.name for o in graph.outputs}
    weights = {
        node.inputs[i]
        for node in graph.nodes
        for i in _WEIGHT_INPUTS.get(node.op_type, ())
        if not node.domain and i < len(node.inputs) and not _by_position(node)
    }
    found = {}
    for name, ref in graph.initializers.items():
        if ref.dtype != "float32" or name in inside:
            continue
        if len(ref.shape) < 2 or math.prod(ref.shape) < SMALL:
            continue
        kind = (dtype if name in weights else None) or _own(ref)
        if kind in HALVES:
            found[name] = kind
    return found


def _by_position(node: Node) -> bool:
    """Whether a node looks positions up: cos and sin of angles, which halves are too coarse for."""
    return node.op_type == "Gather" and node.inputs[1] == "position_ids"


def _own(ref: WeightRef) -> str:
    """What a weight is stored in where nothing is asked for."""
    if ref.encoding in ("raw", "float32"):
        return "float32"
    return ref.encoding if ref.encoding in HALVES else "float16"


class _Casts:
    """A graph's nodes with the Casts of what is stored in a half type."""

    def __init__(self, graph: Graph, kinds: dict[str, str]) -> None:
        self.graph, self.kinds = graph, kinds
        self.names = {*graph.producers(), *graph.initializers, *(i.name for i in graph.inputs)}
        self.names |= {node.name for node in graph.nodes}
        self.wide: dict[str, str] = {}

    def nodes(self) -> Iterator[Node]:
        """In topological order."""
        for node in self.graph.nodes:
            stored = [name for name in dict.fromkeys(node.inputs) if name in self.kinds]
            if node.op_type in _MOVES and not node.domain and stored == [node.inputs[0]]:
                output = node.outputs[0]
                moved = self.fresh(f"{output}.{self.kinds[stored[0]]}")
                yield replace(node, outputs=(moved,))
                yield self.cast(moved, output)
                continue
            for name in stored:
                if name not in self.wide:
                    self.wide[name] = self.fresh(f"{name}{WIDE}")
                    yield self.cast(name, self.wide[name])
            yield replace(node, inputs=tuple(self.wide.get(i, i) for i in node.inputs))

    def cast(self, name: str, output: str) -> Node:
        return Node("Cast", (name,), (output,), {"to": FLOAT}, self.fresh(f"{output}/Cast"))

    def fresh(self, stem: str) -> str:
        name = stem
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def widened(graph: Graph) -> Graph:
    """A graph that computes in float16 or bfloat16, as one that does in float32."""
    initializers = {
        n: replace(ref, dtype="float32", encoding=ref.dtype if ref.encoding == "raw" else
                   ref.encoding) if ref.dtype in HALVES else ref
        for n, ref in graph.initializers.items()
    }  # fmt: skip
    values = [
        tuple(replace(v, dtype="float32") if v.dtype in HALVES else v for v in values)
        for values in (graph.inputs, graph.outputs)
    ]
    nodes = tuple(_widened_node(node) for node in graph.nodes)
    return graph.with_(nodes=nodes, initializers=initializers, inputs=values[0], outputs=values[1])


def _widened_node(node: Node) -> Node:
    attributes = dict(node.attributes)
    for name, value in node.attributes.items():
        if isinstance(value, Graph):
            attributes[name] = widened(value)
        elif isinstance(value, np.ndarray) and str(value.dtype) in HALVES:
            attributes[name] = value.astype(np.float32)
        elif name in ("to", "dtype", "output_dtype") and value in HALVES.values():
            attributes[name] = FLOAT
    return replace(node, attributes=attributes) if node.attributes else node
