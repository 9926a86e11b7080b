"""Normalisations, activations, comparisons and shape operators in operators that OnnxStream has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import pi, sqrt

import numpy as np

from ...passes.evaluate import axes_of
from .emit import Emit

Formula = Callable[[Emit], bool | None]
"""Emits the nodes that replace `emit.node`; False where it can stay as it is."""


def _axes(e: Emit) -> list[int]:
    """The axes from `axis` to the last, counted from the end."""
    rank = len(e.shape(e.node.inputs[0]))
    return list(range(e.node.attributes.get("axis", -1) % rank - rank, 0))


def rms_normalization(e: Emit) -> None:
    """x / sqrt(mean(x ** 2) + epsilon) * scale."""
    x, scale = e.node.inputs
    square = e("Pow", x, e.number(2.0))
    factor = _inverse_root(e, e("ReduceMean", square, axes=tuple(_axes(e)), keepdims=1))
    e("Mul", scale, e("Mul", x, factor), output=e.node.outputs[0])


def _inverse_root(e: Emit, variance: str) -> str:
    epsilon = e.number(e.node.attributes.get("epsilon", 1e-5))
    return e("Div", e.number(1.0), e("Sqrt", e("Add", variance, epsilon)))


def layer_normalization(e: Emit) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias."""
    x, scale, *bias = e.node.inputs
    output, *more = e.node.outputs
    if any(more):
        raise e.error("its mean or deviation is used")
    axes = tuple(_axes(e))
    centred = e("Sub", x, e("ReduceMean", x, axes=axes, keepdims=1))
    square = e("Pow", centred, e.number(2.0))
    factor = _inverse_root(e, e("ReduceMean", square, axes=axes, keepdims=1))
    normal = e("Mul", centred, factor)
    if bias and bias[0]:
        e("Add", e("Mul", normal, scale), bias[0], output=output)
    else:
        e("Mul", normal, scale, output=output)


def swish(e: Emit) -> None:
    """x * sigmoid(alpha * x)."""
    x, alpha = e.node.inputs[0], e.node.attributes.get("alpha", 1.0)
    inner = x if alpha == 1.0 else e("Mul", x, e.number(alpha))
    e("Mul", x, e("Sigmoid", inner), output=e.node.outputs[0])


def gelu(e: Emit) -> None:
    """x / 2 * (1 + erf(x / sqrt(2))), or its approximation by tanh."""
    x = e.node.inputs[0]
    if e.node.attributes.get("approximate", "none") == "tanh":
        cube = e("Mul", e("Pow", x, e.number(3.0)), e.number(0.044715))
        gate = e.tanh(e("Mul", e("Add", x, cube), e.number(sqrt(2 / pi))))
    else:
        gate = e("Erf", e("Div", x, e.number(sqrt(2))))
    product = e("Mul", x, e("Add", gate, e.number(1.0)))
    e("Mul", product, e.number(0.5), output=e.node.outputs[0])


def tanh(e: Emit) -> None:
    """By a sigmoid."""
    e.tanh(e.node.inputs[0], output=e.node.outputs[0])


def reciprocal(e: Emit) -> None:
    """1 / x."""
    e("Div", e.number(1.0), e.node.inputs[0], output=e.node.outputs[0])


def logical_not(e: Emit) -> None:
    """Of booleans as integers."""
    e.logical_not(e.node.inputs[0], output=e.node.outputs[0])


def logical_or(e: Emit) -> None:
    """Of booleans as integers."""
    a, b = e.node.inputs
    e.logical_or(a, b, output=e.node.outputs[0])


def is_nan(e: Emit) -> None:
    """What does not equal itself."""
    x = e.node.inputs[0]
    e.logical_not(e("Equal", x, x), output=e.node.outputs[0])


def compare(e: Emit) -> bool | None:
    """Comparisons that OnnxStream lacks, and those of a column's distance to a row."""
    node, (a, b) = e.node, e.node.inputs
    if _distance(e):
        return None
    strict = {"GreaterOrEqual": "Greater", "LessOrEqual": "Less"}.get(node.op_type)
    if strict is None:
        return False
    if e.is_integer(a):
        opposite = "Less" if strict == "Greater" else "Greater"
        e.logical_not(e(opposite, a, b), output=node.outputs[0])
    else:  # not so for NaN
        e.logical_or(e(strict, a, b), e("Equal", a, b), output=node.outputs[0])
    return None


_SHIFT = {
    "GreaterOrEqual": ("Less", 1), "Greater": ("Less", 0),
    "Less": ("Greater", 0), "LessOrEqual": ("Greater", -1),
}  # fmt: skip
"""column - row OP c  is  row (the other operator) column - c + this."""


def _distance(e: Emit) -> bool:
    """Write `column - row OP c` of integers (T, 1) and (L) as a comparison of two (T, L).

    OnnxStream subtracts only scalars from integers and does not broadcast comparisons.
    """
    difference = e.rewriter.made_by(e.node.inputs[0], "Sub")
    bound = e.rewriter.scalar(e.node.inputs[1])
    if difference is None or bound is None or not e.is_integer(e.node.inputs[1]):
        return False
    column, row = difference.inputs
    shapes = e.rewriter.facts.shape(column), e.rewriter.facts.shape(row)
    if shapes[0] is None or shapes[1] is None or [len(s) for s in shapes if s] != [2, 1]:
        return False
    if shapes[0][1] != 1:
        return False
    op_type, shift = _SHIFT[e.node.op_type]
    limit = e("Add", column, e.integer(shift - int(bound)))
    full = e.concat(0, e.window(e("Shape", column), 0, 1, 0), e("Shape", row))
    e(op_type, e("Expand", row, full), e("Expand", limit, full), output=e.node.outputs[0])
    return True


def shape(e: Emit) -> bool | None:
    """Shape of some axes only: a Slice of the whole."""
    a = e.node.attributes
    if "start" not in a and "end" not in a:
        return False
    rank = len(e.shape(e.node.inputs[0]))
    window = range(rank)[a.get("start", 0) : a.get("end", rank)]
    whole = e("Shape", e.node.inputs[0])
    bounds = (e.integers(window.start), e.integers(window.stop), e.integers(0))
    e("Slice", whole, *bounds, output=e.node.outputs[0])
    return None


def squeeze(e: Emit) -> bool | None:
    """The axes written out."""
    if len(e.node.inputs) > 1 and e.node.inputs[1]:
        return False
    axes = [i for i, size in enumerate(e.shape(e.node.inputs[0])) if size == 1]
    e("Squeeze", e.node.inputs[0], e.integers(*axes), output=e.node.outputs[0])
    return None


def reduce(e: Emit) -> bool | None:
    """Axes as an attribute, as before opset 18."""
    node = e.node
    if len(node.inputs) < 2 and "noop_with_empty_axes" not in node.attributes:
        return False
    listed = e.rewriter.facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = axes_of(node, listed)
    if axes is None and len(node.inputs) > 1 and node.inputs[1]:
        raise e.error("its axes are computed")
    attributes = {k: v for k, v in node.attributes.items() if k != "noop_with_empty_axes"}
    if not axes and node.attributes.get("noop_with_empty_axes", 0):
        raise e.error("it reduces nothing")
    if axes:
        attributes["axes"] = tuple(axes)
    e(node.op_type, node.inputs[0], output=node.outputs[0], **attributes)
    return None


def split(e: Emit) -> bool | None:
    """Sizes written out, as before opset 18; a Slice for each part where some are not used."""
    node = e.node
    used = [bool(o) and (o in e.rewriter.uses or o in e.rewriter.kept) for o in node.outputs]
    if all(used) and "num_outputs" not in node.attributes:
        return False
    x, axis = node.inputs[0], node.attributes.get("axis", 0)
    whole = e.size(e.shape(x)[axis], "what it splits")
    sizes = e.rewriter.facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if len(node.inputs) > 1 and node.inputs[1] and sizes is None:
        raise e.error("its sizes are computed")
    each = -(-whole // len(node.outputs))
    parts = [each] * (len(used) - 1) + [whole - each * (len(used) - 1)]
    parts = parts if sizes is None else [int(s) for s in sizes]
    if all(used):
        e.nodes.append(replace(node, inputs=(x, e.integers(*parts)), attributes={"axis": axis}))
        return None
    starts = [sum(parts[:i]) for i in range(len(parts))]
    for start, size, output in zip(starts, parts, node.outputs, strict=True):
        if output and used[node.outputs.index(output)]:
            bounds = (e.integers(start), e.integers(start + size), e.integers(axis))
            e("Slice", x, *bounds, output=output)
    return None


def constant_of_shape(e: Emit) -> bool | None:
    """The value written out, which OnnxStream asks for."""
    if "value" in e.node.attributes:
        return False
    value = np.zeros(1, np.float32)
    e("ConstantOfShape", *e.node.inputs, value=value, output=e.node.outputs[0])
    return None


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip

FORMULAS: Mapping[str, Formula] = {
    "RMSNormalization": rms_normalization, "LayerNormalization": layer_normalization,
    "Swish": swish, "Gelu": gelu, "Tanh": tanh, "Reciprocal": reciprocal, "Not": logical_not,
    "Or": logical_or, "IsNaN": is_nan, **dict.fromkeys(_SHIFT, compare), "Shape": shape,
    "Squeeze": squeeze, "Split": split, "ConstantOfShape": constant_of_shape,
    **dict.fromkeys(_REDUCTIONS, reduce),
}  # fmt: skip
