"""A step from fused and newer operators to those of opset 14 that OnnxStream's text may hold.

It works on any draft; what makes a language model of it that OnnxStream can run is in
`streamed_llm`. A graph that has nothing to take apart is left as it is, its opset aside.
"""

from __future__ import annotations

from ...graph import Graph
from ...passes import clean, with_quantised_weights
from ...passes.rewriting import Rewriter
from ..draft import Draft
from . import attention_formulas, simple_formulas
from .emit import Emit
from .opset14 import lowered, widened
from .renaming import renamed

OPERATORS = frozenset({
    "Add", "And", "ArgMax", "Cast", "Concat", "ConstantOfShape", "Conv", "Cos", "Div", "Equal",
    "Erf", "Expand", "Flatten", "Gather", "Gemm", "Greater", "InstanceNormalization", "Less",
    "MatMul", "MaxPool", "Mul", "Neg", "Pow", "Range", "ReduceMean", "Reshape", "Resize",
    "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub",
    "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip
"""What OnnxStream's engine knows."""

_FORMULAS = {**simple_formulas.FORMULAS, **attention_formulas.FORMULAS}


def decompose(draft: Draft, padding: str = "") -> Draft:
    """The draft in operators of opset 14, as far as possible in those of OnnxStream.

    Half-precision arithmetic becomes float32. `padding` is an int64 input (1, L) that is 0 where
    a boolean or causal attention may not look. Raises UnsupportedError naming a node that opset
    14 has no words for.
    """
    draft = draft.with_(widened(with_quantised_weights(draft.graph)))
    draft = draft.with_(clean(draft.graph, draft.read))
    draft = draft.with_(_rewritten(draft, padding))
    draft = draft.with_(clean(draft.graph, draft.read))
    return draft.with_(lowered(_without_idle_casts(draft)))


def foreign(graph: Graph) -> list[str]:
    """The operators of a graph that OnnxStream's own engine does not know, in order."""
    return sorted({n.op_type for n in graph.nodes} - OPERATORS)


def _without_idle_casts(draft: Draft) -> Graph:
    """Outputs under their names where a Cast of floats to floats only gave them those."""
    rewriter = Rewriter(draft.graph, draft.read)
    names: dict[str, str] = {}
    for node in draft.graph.nodes:
        inner, dtype = node.inputs[:1], rewriter.facts.dtype
        idle = node.op_type == "Cast" and dtype(inner[0]) == dtype(node.outputs[0]) == "float32"
        if idle and inner[0] in rewriter.producer and inner[0] not in rewriter.kept:
            names.setdefault(inner[0], node.outputs[0])
    gone = set(names.values())
    nodes = tuple(n for n in draft.graph.nodes if n.outputs[0] not in gone)
    return renamed(draft.graph.with_(nodes=nodes), names) if names else draft.graph


def _rewritten(draft: Draft, padding: str) -> Graph:
    rewriter = Rewriter(draft.graph, draft.read)
    for node in draft.graph.nodes:
        formula = None if node.domain else _FORMULAS.get(node.op_type)
        if formula is not None:
            emit = Emit(rewriter, node, padding)
            if formula(emit) is not False:
                rewriter.replace(node, *emit.nodes)
    return rewriter.finish()
