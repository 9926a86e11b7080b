"""Products and convolutions of integers, their activations quantised at every run.

Dims: a matrix (K, N), a convolution's kernel (M, C/G, *K).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...graph import Node
from ...passes.rewriting import Rewriter
from ..draft import Draft, Make
from .activations import PRODUCTS
from .integer_weights import (
    Constant,
    Constants,
    Keep,
    Stored,
    around_128,
    signed,
    unsigned,
)

_LEAST_SUM = 16  # a convolution whose outputs add up fewer products stays as it is: depthwise ones
_FLOAT = 1  # TensorProto.FLOAT


class DynamicProducts:
    """The edits: DynamicQuantizeLinear, MatMulInteger or ConvInteger, Cast, Mul, Add for a bias.
    `asymmetric`: matrices as uint8 with zero points, not int8."""

    def __init__(self, draft: Draft, keep: Keep, asymmetric: bool) -> None:
        self.rewriter = Rewriter(draft.graph, draft.read)
        self.stored = Stored(self.rewriter)
        self.constants = Constants(draft, self.rewriter, keep)
        self.asymmetric = asymmetric
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


def _is_plain(node: Node) -> bool:
    """Whether a product is x W + bias as it stands."""
    known = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    return all(node.attributes.get(name, value) == value for name, value in known.items())


def _transposed(weight: Constant) -> Make:
    return lambda: weight.make().T
