"""What the two normalisations have in common: the mean over the last axis, the weight."""

from __future__ import annotations

from onnxstream_nb.graph import Node
from onnxstream_nb.passes.evaluate import axes_of
from onnxstream_nb.passes.patterns import Num, Pattern, either, op
from onnxstream_nb.passes.rewriting import Rewriter


def square(x: Pattern) -> Pattern:
    """x squared."""
    return either(op("Pow", x, Num(2.0)), op("Mul", x, x))


def normalised(x: Pattern, mean_square: Pattern) -> Pattern:
    """x over the root of the mean square and epsilon, in the spellings of exporters."""
    variance = op("Add", mean_square, Num(name="epsilon"))
    root = op("Sqrt", variance)
    inverse = either(
        op("Div", Num(1.0), root), op("Reciprocal", root), op("Pow", variance, Num(-0.5))
    )
    return either(op("Mul", x, inverse), op("Div", x, root))


def over_last_axis(rewriter: Rewriter, mean: Node) -> bool:
    """Whether a ReduceMean keeps its dimensions and reduces the last one."""
    listed = rewriter.facts.constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    axes = axes_of(mean, listed)
    shape = rewriter.facts.shape(mean.inputs[0])
    if axes is None or len(axes) != 1 or not mean.attributes.get("keepdims", 1):
        return False
    return axes[0] == -1 or (shape is not None and axes[0] == len(shape) - 1)


def is_per_channel(rewriter: Rewriter, weight: str, x: str) -> bool:
    """Whether the weight is one number for each element of x's last axis."""
    shape, channels = rewriter.facts.shape(x), rewriter.facts.shape(weight)
    return shape is not None and len(shape) > 0 and channels == shape[-1:]
