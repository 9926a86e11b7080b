"""Remove nodes that hand their input on unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnxstream_nb.graph import DTYPES, Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter

Rule = Callable[[Rewriter, Node], str | None]

WIDER: Mapping[str, tuple[str, ...]] = {
    "float16": ("float32", "float64"),
    "bfloat16": ("float32", "float64"),
    "float32": ("float64",),
    "int32": ("int64", "float64"),
    "bool": ("int32", "int64", "float16", "float32"),
}
"""Element type -> types that hold all its values."""


def rewrite(graph: Graph, read: Read) -> Graph:
    """Let the readers of such a node's output read its input."""
    rewriter = Rewriter(graph, read)
    for node in graph.nodes:
        rule = None if node.domain else RULES.get(node.op_type)
        unchanged = rule(rewriter, node) if rule else None
        if unchanged is not None:
            rewriter.rename(node.outputs[0], unchanged)
    return rewriter.finish()


def _always(rewriter: Rewriter, node: Node) -> str | None:
    return node.inputs[0]


def _single(rewriter: Rewriter, node: Node) -> str | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _concat(rewriter: Rewriter, node: Node) -> str | None:
    """The only input that is not empty."""
    shapes = [rewriter.facts.shape(i) for i in node.inputs]
    axis = node.attributes["axis"]
    filled = [i for i, s in zip(node.inputs, shapes, strict=True) if s is None or s[axis] != 0]
    return filled[0] if len(filled) == 1 else None


def _dropout(rewriter: Rewriter, node: Node) -> str | None:
    if any(o in rewriter.uses or o in rewriter.kept for o in node.outputs[1:]):
        return None
    training = node.inputs[2] if len(node.inputs) > 2 else ""
    if training:
        known = rewriter.facts.constant(training)
        return None if known is None or known.any() else node.inputs[0]
    return node.inputs[0]


def _cast(rewriter: Rewriter, node: Node) -> str | None:
    """To the type it has already, or back from a wider one."""
    dtype, target = rewriter.facts.dtype, DTYPES[node.attributes["to"]]
    inner = rewriter.made_by(node.inputs[0], "Cast")
    if inner is not None and dtype(inner.inputs[0]) == target:
        wider = DTYPES[inner.attributes["to"]]
        return inner.inputs[0] if wider in WIDER.get(target, ()) else None
    return node.inputs[0] if dtype(node.inputs[0]) == target else None


def _same_shape(rewriter: Rewriter, node: Node) -> str | None:
    before = rewriter.facts.shape(node.inputs[0])
    after = rewriter.facts.shape(node.outputs[0])
    return node.inputs[0] if before is not None and before == after else None


def _reshape(rewriter: Rewriter, node: Node) -> str | None:
    """A shape that is taken back: the value before the first of two Reshapes."""
    inner = rewriter.made_by(node.inputs[0], "Reshape")
    if inner is not None:
        original = rewriter.facts.shape(inner.inputs[0])
        if original is not None and original == rewriter.facts.shape(node.outputs[0]):
            return inner.inputs[0]
    return _same_shape(rewriter, node)


def _transpose(rewriter: Rewriter, node: Node) -> str | None:
    perm = node.attributes.get("perm")
    if perm is None:
        return None
    if list(perm) == sorted(perm):
        return node.inputs[0]
    inner = rewriter.made_by(node.inputs[0], "Transpose")
    first = inner.attributes.get("perm") if inner else None
    if inner is None or first is None:
        return None
    return inner.inputs[0] if [first[p] for p in perm] == sorted(perm) else None


def _neutral(number: float, *, either: bool) -> Rule:
    """Arithmetic with its neutral element, which must not widen the shape."""

    def rule(rewriter: Rewriter, node: Node) -> str | None:
        a, b = node.inputs
        for kept, other in ((a, b), (b, a)) if either else ((a, b),):
            if rewriter.scalar(other) == number and _covers(rewriter, kept, other):
                return kept
        return None

    return rule


def _and(rewriter: Rewriter, node: Node) -> str | None:
    a, b = node.inputs
    for kept, other in ((a, b), (b, a)):
        known = rewriter.facts.constant(other)
        if known is not None and known.size == 1 and known.all() and _covers(rewriter, kept, other):
            return kept
    return None


def _covers(rewriter: Rewriter, value: str, scalar: str) -> bool:
    shape, other = rewriter.facts.shape(value), rewriter.facts.shape(scalar)
    return other == () or (shape is not None and other is not None and len(shape) >= len(other))


RULES: Mapping[str, Rule] = {
    "Identity": _always, "Dropout": _dropout, "Cast": _cast, "Concat": _concat, "Sum": _single,
    "Max": _single, "Min": _single, "Mean": _single, "Reshape": _reshape, "Expand": _same_shape,
    "Flatten": _same_shape, "Slice": _same_shape, "Transpose": _transpose, "And": _and,
    "Mul": _neutral(1.0, either=True), "Div": _neutral(1.0, either=False),
    "Add": _neutral(0.0, either=True), "Sub": _neutral(0.0, either=False),
}  # fmt: skip
