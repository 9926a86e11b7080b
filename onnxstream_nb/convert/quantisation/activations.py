"""Activations in 8 bits by known ranges: which, their ranges, and the nodes that round them.

A value that is quantised is rounded once, by QuantizeLinear and DequantizeLinear; all operators
that take it in integers read that, others the value itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import UsageError
from ...graph import Node
from ...passes.rewriting import Rewriter
from ...passes.rewriting import captured as captured_by_bodies
from ...progress import Report
from ..draft import Draft, Make
from .calibration import captured
from .integer_weights import TINY, Constant, Constants, Integers, Stored, signed
from .ranges import Range, Seen, by_operator, names_of

Array = np.ndarray[Any, Any]

PRODUCTS = ("Conv", "MatMul", "Gemm")
"""Operators whose constant weights become integers."""

OTHERS = (
    "Add", "Sub", "Mul", "Div", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Relu",
    "LeakyRelu", "Sigmoid", "Tanh", "Softmax",
)  # fmt: skip
"""Operators whose activations may be rounded as well."""

_INT32 = 2**31 - 1


def parameters(found: Range) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 for a range, into which zero is taken: it stays exact. What was
    always zero is taken to be at most 1."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    scale = np.float32(max((high - low) / 255, TINY) if high > low else 1 / 255)
    return scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255))


def quantised_values(
    draft: Draft, products: Mapping[int, Constant], operators: Iterable[str]
) -> list[str]:
    """The values that are rounded: first inputs of products (by the id of their nodes), and what
    other `operators` take, in the graph's order."""
    constants, wanted = draft.graph.initializers, list[str]()
    for node in draft.graph.nodes:
        if id(node) in products:
            wanted.append(node.inputs[0])
        elif node.op_type in operators and node.op_type in OTHERS and not node.domain:
            wanted += [name for name in node.inputs if name]
    return [name for name in dict.fromkeys(wanted) if name not in constants]


def calibrated_values(
    draft: Draft, feeds: Iterable[Mapping[str, Array]], percentile: float, report: Report
) -> dict[str, Range]:
    """The ranges of all floats that the model computes, by operator."""
    known = {o for node in draft.graph.nodes for o in node.outputs if o}
    inner = known & captured_by_bodies(draft.graph)
    floats = [v.name for v in draft.graph.inputs if v.dtype in ("float32", "float16", "")]
    values = [*floats, *(name for name in names_of(draft.graph) if name in known - inner)]
    return by_operator(draft.graph, seen(draft, values, feeds, percentile, report))


def seen(
    draft: Draft,
    values: Iterable[str],
    feeds: Iterable[Mapping[str, Array]],
    percentile: float,
    report: Report,
) -> dict[str, Range]:
    """The ranges of those of the values that are floats, over all feeds; none for a value of which
    no finite element was seen.

    `percentile` % of the elements are clipped at each end. Raises UsageError when there are no
    feeds.
    """
    found = {value: Seen(counted=percentile > 0) for value in values}
    runs = 0
    for run, arrays in enumerate(captured(draft, found, feeds), 1):
        report(f"calibrating, run {run}", None)
        runs = run
        for name, array in arrays.items():
            if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
                found[name].add(array)
    if not runs and found:
        raise UsageError("calibration: there is no data to run the model on")
    ranges = {name: each.range(percentile) for name, each in found.items()}
    return {name: each for name, each in ranges.items() if each is not None}


@dataclass(frozen=True)
class _Factor:
    """A dequantised weight's name, what gives its scales, and lower limits of them, which may be
    added until the weight is made."""

    name: str
    scales: Make
    limits: list[Make]


class Activations:
    """The edits that round activations and put integer weights before their operators."""

    def __init__(self, rewriter: Rewriter, stored: Stored, constants: Constants) -> None:
        self.rewriter, self.stored, self.constants = rewriter, stored, constants
        self.ranges: Mapping[str, Range] = {}
        self._rounded: dict[str, str] = {}
        self._factors: dict[tuple[str, int], _Factor] = {}
        self._biases: dict[tuple[str, str, float], str] = {}

    def product(self, node: Node, weight: Constant) -> None:
        """A product or convolution of rounded factors, if the activation's range is known."""
        if node.inputs[0] not in self.ranges:
            return
        new = list[Node]()
        x = self._round(node.inputs[0], new)
        axis = 0 if node.op_type == "Conv" or node.attributes.get("transB", 0) else 1
        if (weight.name, axis) not in self._factors:
            self._factors[weight.name, axis] = self._factor(weight, axis, new)
        factor, inputs = self._factors[weight.name, axis], list(node.inputs)
        inputs[:2] = x, factor.name
        bias = self._bias(node, weight.shape[axis])
        if bias is not None:
            inputs[2] = self._shared_scale(factor, bias, node.inputs[0], new)
        self._put(node, new, tuple(inputs))

    def other(self, node: Node) -> None:
        """An operator whose inputs are rounded as far as their ranges are known."""
        new = list[Node]()
        inputs = [self._round(i, new) if i in self.ranges else i for i in node.inputs]
        self._put(node, new, tuple(inputs))

    def _round(self, value: str, new: list[Node]) -> str:
        """The name of the rounded value; the nodes that make it are added to `new` once."""
        if value not in self._rounded:
            scale, zero = parameters(self.ranges[value])
            names = (
                self.rewriter.constant(f"{value}.scale", np.array(scale)),
                self.rewriter.constant(f"{value}.zero", np.array(zero)),
            )
            q = self.rewriter.node("QuantizeLinear", (value, *names), f"{value}.uint8")
            self._rounded[value] = self._dequantised((q.outputs[0], *names), new, q)
        return self._rounded[value]

    def _dequantised(
        self, parts: Sequence[str], new: list[Node], *before: Node, **attributes: int
    ) -> str:
        stem = f"{parts[0].removesuffix('.uint8')}.rounded"
        node = self.rewriter.node("DequantizeLinear", parts, stem, **attributes)
        new += [*before, node]
        return node.outputs[0]

    def _bias(self, node: Node, outputs: int) -> Constant | None:
        """The constant bias, if it can share the scale of the sum of products."""
        name = node.inputs[2] if len(node.inputs) > 2 else ""
        scaled = {node.attributes.get(factor, 1.0) for factor in ("alpha", "beta")} != {1.0}
        bias = None if scaled or not name else self.constants.read(name)
        return bias if bias is not None and bias.shape == (outputs,) else None

    def _factor(self, weight: Constant, axis: int, new: list[Node]) -> _Factor:
        """A dequantised weight, which `new` makes."""
        n, limits = (weight.shape[axis],), list[Make]()

        def quantise(floats: Array) -> Integers:
            least = np.max([limit() for limit in limits], axis=0) if limits else None
            return signed(floats, axis, least)

        parts = [("int", "int8", weight.shape), ("scale", "float32", n), ("zero", "int8", n)]
        names = self.stored.integers(weight, quantise, parts)
        made = self._dequantised(names, new, axis=axis)
        return _Factor(made, self.stored.made[names[1]], limits)

    def _shared_scale(self, factor: _Factor, bias: Constant, x: str, new: list[Node]) -> str:
        """The name of a bias as int32 in steps of the sum of products, which `new` makes; the
        weight's steps become large enough for it."""
        scale = float(parameters(self.ranges[x])[0])
        key = (factor.name, bias.name, scale)
        if key in self._biases:
            return self._biases[key]

        def steps() -> Array:
            return np.asarray(factor.scales() * np.float32(scale), np.float32)

        def integers() -> Array:
            rounded = np.rint(np.asarray(bias.make(), np.float64) / steps())
            return np.clip(rounded, -_INT32, _INT32).astype(np.int32)

        def limits() -> Array:
            within = np.abs(bias.make()).astype(np.float64) / (scale * _INT32)
            return np.maximum(within, TINY / scale)

        factor.limits.append(limits)
        names = (
            self.stored.add(f"{bias.name}.int", "int32", bias.shape, integers),
            self.stored.add(f"{bias.name}.scale", "float32", bias.shape, steps),
        )
        self._biases[key] = self._dequantised(names, new, axis=0)
        return self._biases[key]

    def _put(self, node: Node, new: list[Node], inputs: tuple[str, ...]) -> None:
        self.rewriter.replace(node, *new, replace(node, inputs=inputs))
