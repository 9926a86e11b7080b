"""Writing the nodes that take the place of one, in the notation of a formula."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import UnsupportedError
from ...graph import Node
from ...passes.rewriting import Rewriter
from ...passes.shape_rules import Shape
from ...passes.symbols import Size

FLOAT, INT64, BOOL = 1, 7, 9
"""onnx.TensorProto's numbers of the targets of Cast."""

_ROLES = re.compile(r"\.(out|rotated|biased)$")


class Emit:
    """The nodes that replace `node`, so far. Names tell where in the model they belong, as those
    of PyTorch's exporter do: /model/layers.0/input_layernorm/Pow.

    `padding` is the input that says which positions of the context are padding, (1, P + T), or "".
    """

    def __init__(self, rewriter: Rewriter, node: Node, padding: str = "") -> None:
        self.rewriter, self.node, self.padding = rewriter, node, padding
        self.nodes: list[Node] = []
        stem = _ROLES.sub("", (node.name or node.outputs[0]).lstrip("/"))
        self._scope = "/" + re.sub(r"\.(?!\d)", "/", stem)

    def __call__(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node; the name of its output, a new one unless it is given."""
        name = self.rewriter.fresh(f"{self._scope}/{op_type}")
        output = output or self.rewriter.fresh(f"{name}_output_0")
        self.nodes.append(Node(op_type, inputs, (output,), attributes, name))
        return output

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self._constant(np.array(value, np.float32))

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant(np.array(value, np.int64))

    def integers(self, *values: int) -> str:
        """An int64 vector."""
        return self._constant(np.array(values, np.int64))

    def _constant(self, array: np.ndarray[Any, Any]) -> str:
        return self.rewriter.constant(f"{self._scope}/Constant_output_0", array)

    # -- what is known of values from before the rewriting

    def shape(self, value: str) -> Shape:
        """The shape of a value that was there before; UnsupportedError where it is not known."""
        shape = self.rewriter.facts.shape(value)
        if shape is None:
            raise self.error(f"the shape of {value!r} is not known")
        return shape

    def size(self, size: Size, what: str) -> int:
        """A size that has to be a number."""
        if not isinstance(size, int):
            raise self.error(f"{what} is not a fixed size")
        return size

    def is_integer(self, value: str) -> bool:
        """Whether a value holds integers."""
        return self.rewriter.facts.dtype(value) in ("int64", "int32")

    def error(self, what: str) -> UnsupportedError:
        """An error that names the node."""
        node = self.node
        return UnsupportedError(
            f"{node.op_type} {node.name or node.outputs[0]!r} cannot be written in operators of "
            f"opset 14: {what}"
        )

    # -- small formulas

    def size_of(self, value: str, axis: int) -> str:
        """One dimension of a value as an int64 scalar."""
        return self("Gather", self("Shape", value), self.integer(axis), axis=0)

    def window(self, value: str, start: int, stop: int, axis: int) -> str:
        """`value` from `start` to `stop` along one axis."""
        bounds = (self.integers(start), self.integers(stop), self.integers(axis))
        return self("Slice", value, *bounds)

    def concat(self, axis: int, *values: str, output: str = "") -> str:
        """Values one behind the other."""
        return self("Concat", *values, axis=axis, output=output)

    def reshape(self, value: str, target: Sequence[int], output: str = "") -> str:
        """`value` in a shape in which 0 copies a size and -1 is the rest."""
        return self("Reshape", value, self.integers(*target), output=output)

    def split_heads(self, value: str, heads: int, width: int) -> str:
        """(B, T, H * D) -> (B, H, T, D)."""
        split = self.reshape(value, (0, 0, heads, width))
        return self("Transpose", split, perm=(0, 2, 1, 3))

    def merge_heads(self, value: str, width: int, output: str = "") -> str:
        """(B, H, T, D) -> (B, T, H * D = width)."""
        merged = self("Transpose", value, perm=(0, 2, 1, 3))
        return self.reshape(merged, (0, 0, width), output=output)

    def logical_not(self, value: str, output: str = "") -> str:
        """1 - value, since there is no Not."""
        negative = self("Neg", self("Cast", value, to=INT64))
        return self("Cast", self("Add", negative, self.integer(1)), to=BOOL, output=output)

    def logical_or(self, a: str, b: str, output: str = "") -> str:
        """a + b, since there is no Or."""
        total = self("Add", *(self("Cast", v, to=INT64) for v in (a, b)))
        return self("Cast", total, to=BOOL, output=output)

    def tanh(self, value: str, output: str = "") -> str:
        """2 sigmoid(2 x) - 1, since there is no Tanh."""
        two = self.number(2.0)
        doubled = self("Mul", self("Sigmoid", self("Mul", value, two)), two)
        return self("Sub", doubled, self.number(1.0), output=output)
