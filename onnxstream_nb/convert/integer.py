"""Weights and activations in 8 bits: products and convolutions of integers.

`dynamic` finds the range of an activation at every run (DynamicQuantizeLinear, MatMulInteger,
ConvInteger), `static` has seen it on calibration data (QuantizeLinear and DequantizeLinear around
the operators, which engines read as products of integers). Weights have a scale for each output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import passes
from ..errors import UnsupportedError, UsageError
from ..graph import Graph, Node
from ..passes.rewriting import Rewriter
from ..progress import Report
from .activations import (
    OTHERS,
    PRODUCTS,
    Activations,
    calibrated_values,
    quantised_values,
    ranges_for,
)
from .batch_norm import fold_batch_norms
from .draft import Draft
from .integer_weights import Constant, Constants, Stored, around_128, signed, unsigned
from .ranges import Range

Array = np.ndarray[Any, Any]

_OPSET = 13  # DequantizeLinear along an axis
_LEAST_SUM = 16  # a convolution whose outputs add up fewer products stays as it is: depthwise ones
_FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True)
class IntegerOptions:
    """`keep` are patterns of names of nodes or weights that stay floats. `asymmetric`: weights of
    dynamic products as uint8 with zero points, not int8.

    Of `static` alone: `ranges`, by operator, or `feeds` to find them, of which `percentile` % are
    clipped at each end; `operators` are those whose constant weights and activations become
    integers, and any other named there has its activations rounded to 8 bits.
    """

    keep: tuple[str, ...] = ()
    asymmetric: bool = False
    operators: tuple[str, ...] = PRODUCTS
    percentile: float = 0.0
    ranges: Mapping[str, Range] | None = None
    feeds: Iterable[Mapping[str, Array]] | None = None


def dynamic(draft: Draft, options: IntegerOptions, report: Report) -> Draft:
    """The draft with MatMulInteger and ConvInteger in the place of products and convolutions with
    constant weights, their activations quantised at every run.

    Raises UsageError when there is nothing to quantise.
    """
    draft = prepared(draft)
    step = _Dynamic(draft, options)
    for node in draft.graph.nodes:
        step.visit(node)
    return _finished(draft, step.stored, report)


def static(draft: Draft, options: IntegerOptions, report: Report) -> Draft:
    """The draft with QuantizeLinear and DequantizeLinear before its products and convolutions, by
    the ranges given or seen: activations uint8, weights int8, biases int32.

    Raises UsageError when there is nothing to quantise, or neither ranges nor feeds.
    """
    draft = prepared(draft)
    step = _Static(draft, options)
    values = quantised_values(draft, step.found, options.operators)
    step.activations.ranges = ranges_for(
        draft, values, options.ranges, options.feeds, options.percentile, report
    )
    for node in draft.graph.nodes:
        step.visit(node)
    return _finished(draft, step.stored, report)


def calibrate(
    draft: Draft, feeds: Iterable[Mapping[str, Array]], percentile: float, report: Report
) -> dict[str, Range]:
    """The ranges of everything that the model computes on the feeds, by operator, for a
    range_data.txt: what `static` takes as `ranges`."""
    return calibrated_values(prepared(draft), feeds, percentile, report)


def prepared(draft: Draft) -> Draft:
    """The draft with constants folded, and batch normalizations in the convolutions before them."""
    if not draft.made:  # a constant that only a draft makes has no bytes to see in another way
        draft = draft.with_(passes.clean(draft.graph, draft.read))
    return fold_batch_norms(draft)


def _finished(draft: Draft, stored: Stored, report: Report) -> Draft:
    if not stored.made:
        raise UsageError(
            "nothing to quantise: the model has no MatMul, Gemm or Conv with a constant float "
            "weight that is not kept"
        )
    graph: Graph = stored.rewriter.finish(_OPSET)
    if graph is draft.graph:
        raise UnsupportedError(
            f"the model's opset {draft.graph.opset.get('')} cannot be raised to {_OPSET}, which "
            "quantisation needs; export it at a newer opset"
        )
    report("quantised", 1.0)
    return draft.with_(graph, stored.made)


class _Dynamic:
    """The edits of `dynamic`."""

    def __init__(self, draft: Draft, options: IntegerOptions) -> None:
        self.rewriter = Rewriter(draft.graph, draft.read)
        self.stored = Stored(self.rewriter)
        self.constants = Constants(draft, self.rewriter, options.keep)
        self.asymmetric = options.asymmetric
        self._inputs: dict[str, Node] = {}
        self._weights: dict[tuple[str, bool], list[str]] = {}

    def visit(self, node: Node) -> None:
        """Replace the node, if it is one with a constant weight."""
        if node.domain or node.op_type not in PRODUCTS:
            return
        weight = self.constants.weight(node)
        if weight is None:
            return
        if node.op_type == "Conv":
            self._conv(node, weight)
        elif len(weight.shape) == 2 and _is_plain(node):
            self._product(node, weight)

    def _product(self, node: Node, weight: Constant) -> None:
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        turned = bool(node.attributes.get("transB", 0))
        integers, scales, *zeros = self._matrix(weight, turned)
        x, new = self._quantised(node.inputs[0])
        inputs = (x.outputs[0], integers, x.outputs[2], *zeros)
        self._put(node, [*new, self._node("MatMulInteger", inputs, node)], x, scales, bias)

    def _matrix(self, weight: Constant, turned: bool) -> list[str]:
        """Names of integers (K, N), scales (N,) and zero points, if there are."""
        key = (weight.name, turned)
        if key not in self._weights:
            if turned:
                weight = replace(
                    weight, shape=weight.shape[::-1], make=_transposed(weight),
                    name=f"{weight.name}.transposed",
                )  # fmt: skip
            n, make = (weight.shape[1],), unsigned if self.asymmetric else signed
            dtype = "uint8" if self.asymmetric else "int8"
            parts = [("int", dtype, weight.shape), ("scale", "float32", n), ("zero", dtype, n)]
            self._weights[key] = self.stored.integers(
                weight, lambda w: make(w, 1), parts[: 3 if self.asymmetric else 2]
            )
        return self._weights[key]

    def _conv(self, node: Node, weight: Constant) -> None:
        bias = self.constants.read(node.inputs[2]) if len(node.inputs) > 2 else None
        absent = len(node.inputs) < 3 or not node.inputs[2]
        if int(np.prod(weight.shape[1:])) < _LEAST_SUM or (bias is None and not absent):
            return
        key, along = (weight.name, False), (-1, *(1,) * (len(weight.shape) - 2))
        if key not in self._weights:
            m = (weight.shape[0], *along[1:])
            parts = [("int", "uint8", weight.shape), ("scale", "float32", m), ("zero", "uint8", ())]
            self._weights[key] = self.stored.integers(weight, lambda w: around_128(w, 0), parts)
        integers, scales, zero = self._weights[key]
        added = "" if bias is None else self._along(bias, along)
        x, new = self._quantised(node.inputs[0])
        inputs = (x.outputs[0], integers, x.outputs[2], zero)
        product = self._node("ConvInteger", inputs, node, **node.attributes)
        self._put(node, [*new, product], x, scales, added)

    def _along(self, bias: Constant, along: tuple[int, ...]) -> str:
        shape = (bias.shape[0], *along[1:])
        make = bias.make
        return self.stored.add(
            f"{bias.name}.column", "float32", shape,
            lambda: np.asarray(make(), np.float32).reshape(shape),
        )  # fmt: skip

    def _quantised(self, value: str) -> tuple[Node, list[Node]]:
        """The DynamicQuantizeLinear of a value, and what has to be put in: it, or nothing."""
        if value in self._inputs:
            return self._inputs[value], []
        outputs = tuple(self.rewriter.fresh(f"{value}.{w}") for w in ("uint8", "scale", "zero"))
        name = self.rewriter.fresh(f"{value}.quantize")
        node = Node("DynamicQuantizeLinear", (value,), outputs, {}, name)
        self._inputs[value] = node
        return node, [node]

    def _node(self, op_type: str, inputs: tuple[str, ...], of: Node, **attributes: Any) -> Node:
        return self.rewriter.node(op_type, inputs, f"{of.outputs[0]}.{op_type}", **attributes)

    def _put(self, node: Node, nodes: list[Node], x: Node, scales: str, bias: str) -> None:
        """Numbers of the integers, the last of `nodes` giving them, in the node's place."""
        number = self._node("Cast", nodes[-1].outputs, node, to=_FLOAT)
        scale = self._node("Mul", (x.outputs[1], scales), node)
        factors = (number.outputs[0], scale.outputs[0])
        if not bias:
            last = Node("Mul", factors, node.outputs, {}, node.name)
            self.rewriter.replace(node, *nodes, number, scale, last)
            return
        scaled = self._node("Mul", factors, node)
        last = Node("Add", (scaled.outputs[0], bias), node.outputs, {}, node.name)
        self.rewriter.replace(node, *nodes, number, scale, scaled, last)


class _Static:
    """The edits of `static`."""

    def __init__(self, draft: Draft, options: IntegerOptions) -> None:
        self.rewriter = Rewriter(draft.graph, draft.read)
        self.stored = Stored(self.rewriter)
        self.constants = Constants(draft, self.rewriter, options.keep)
        self.activations = Activations(self.rewriter, self.stored, self.constants)
        self.found = {id(n): w for n in draft.graph.nodes if (w := self._weight(n, options))}
        self.others = set(options.operators).intersection(OTHERS)
        unknown = set(options.operators) - {*PRODUCTS, *OTHERS}
        if unknown:
            raise UsageError(
                f"--operators: {', '.join(sorted(unknown))} cannot be computed in 8 bits; known "
                f"are {', '.join((*PRODUCTS, *OTHERS))}"
            )

    def _weight(self, node: Node, options: IntegerOptions) -> Constant | None:
        if node.domain or node.op_type not in options.operators or node.op_type not in PRODUCTS:
            return None
        weight = self.constants.weight(node)
        return weight if weight and (node.op_type != "MatMul" or len(weight.shape) == 2) else None

    def visit(self, node: Node) -> None:
        """Put the integers in before a node that was found."""
        weight = self.found.get(id(node))
        if weight is not None:
            self.activations.product(node, weight)
        elif node.op_type in self.others and not node.domain:
            self.activations.other(node)


def _is_plain(node: Node) -> bool:
    """Whether a product is x W + bias as it stands."""
    known = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    return all(node.attributes.get(name, value) == value for name, value in known.items())


def _transposed(weight: Constant) -> Any:
    return lambda: weight.make().T
