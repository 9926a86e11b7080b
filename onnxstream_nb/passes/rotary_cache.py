"""The cos and sin caches of RotaryEmbedding, (batch, sequence, D/2), from an export's full ones.

Exports compute cos and sin for all D channels although the second half repeats the first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxstream_nb.graph import Node
from onnxstream_nb.passes.evaluate import axes_of
from onnxstream_nb.passes.rewriting import Rewriter
from onnxstream_nb.passes.shape_rules import Shape

TABLE_LIMIT = 1 << 26
"""No table of more bytes is read to see whether its halves are equal."""

_ELEMENTWISE = ("Cos", "Sin", "Cast", "Neg", "Mul", "Div")
_MOVES_ROWS = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast")


class Caches:
    """Makes the caches, each once for the whole graph."""

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._made: dict[tuple[str, bool], str | None] = {}

    def make(self, full: str, x: Shape) -> tuple[str, list[Node]] | None:
        """The cache of `full`, a (batch or 1, 1, T, D) value that multiplies an x of (B, H, T, D).

        Returns its name and the nodes to add for it; None where `full` is something else.
        """
        shape = self._rewriter.facts.shape(full)
        if shape is None or len(shape) != 4 or shape[1] != 1 or shape[3] != x[3]:
            return None
        if not isinstance(x[3], int) or x[3] % 2 or (shape[2] == 1) != (x[2] == 1):
            return None
        spread = shape[0] == 1 and x[0] != 1
        nodes: list[Node] = []
        if (full, spread) not in self._made:
            self._made[full, spread] = self._make(full, spread, x[3], nodes)
        name = self._made[full, spread]
        return None if name is None else (name, nodes)

    def _make(self, full: str, spread: bool, width: int, nodes: list[Node]) -> str | None:
        if spread:  # a cache for one row cannot serve a batch: the operator does not broadcast
            return None
        squeezed = self._squeeze(full, nodes)
        half = self._half(squeezed, nodes)
        if half is None and _repeats(self._rewriter, squeezed):
            half = self._slice(squeezed, width // 2, nodes)
        return half

    def _squeeze(self, full: str, nodes: list[Node]) -> str:
        """Without axis 1, that of the heads."""
        made = self._rewriter.made_by(full, "Unsqueeze")
        if made is not None and _axes(self._rewriter, made) == [1]:
            return made.inputs[0]
        return full

    def _half(self, value: str, nodes: list[Node]) -> str | None:
        """The value computed for the first half only, from before the halves were joined."""
        node = self._rewriter.producer.get(value)
        if node is None or node.domain:
            return None
        if node.op_type == "Concat":
            twice = len(node.inputs) == 2 and node.inputs[0] == node.inputs[1]
            return node.inputs[0] if twice and self._is_last(node, value) else None
        if node.op_type not in _ELEMENTWISE:
            return None
        if any(self._rewriter.scalar(i) is None for i in node.inputs[1:]):
            return None
        half = self._half(node.inputs[0], nodes)
        if half is None:
            return None
        output = self._rewriter.fresh(f"{value}.half")
        inputs = (half, *node.inputs[1:])
        nodes.append(replace(node, inputs=inputs, outputs=(output,), name=output))
        return output

    def _is_last(self, node: Node, value: str) -> bool:
        shape = self._rewriter.facts.shape(value)
        axis = node.attributes["axis"]
        return axis == -1 or (shape is not None and axis == len(shape) - 1)

    def _slice(self, value: str, width: int, nodes: list[Node]) -> str:
        rewriter = self._rewriter
        bounds = [rewriter.constant(f"{value}.{n}", np.array([v], np.int64))
                  for n, v in (("start", 0), ("end", width), ("axis", -1))]  # fmt: skip
        node = rewriter.node("Slice", (value, *bounds), f"{value}.half")
        nodes.append(node)
        return node.outputs[0]


def _axes(rewriter: Rewriter, node: Node) -> list[int] | None:
    listed = rewriter.facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return axes_of(node, listed)


def _repeats(rewriter: Rewriter, value: str) -> bool:
    """Whether the value is rows of a constant table whose second half repeats the first."""
    while value not in rewriter.graph.initializers:
        node = rewriter.made_by(value, *_MOVES_ROWS)
        if node is None or not _keeps_last_axis(rewriter, node):
            return False
        value = node.inputs[0]
    ref = rewriter.graph.initializers[value]
    if not ref.shape or ref.shape[-1] % 2 or int(np.prod(ref.shape)) * 4 > TABLE_LIMIT:
        return False
    table = rewriter.read(ref)
    half = table.shape[-1] // 2
    return bool(np.array_equal(table[..., :half], table[..., half:]))


def _keeps_last_axis(rewriter: Rewriter, node: Node) -> bool:
    """Whether the last axis goes through a node of `_MOVES_ROWS` whole and stays last."""
    before, after = (rewriter.facts.shape(v) for v in (node.inputs[0], node.outputs[0]))
    if before is None or after is None:
        return False
    if node.op_type == "Gather":
        return bool(node.attributes.get("axis", 0) % len(before) < len(before) - 1)
    if node.op_type == "Slice":
        axes = rewriter.facts.constant(node.inputs[3]) if len(node.inputs) > 3 else None
        last = len(before) - 1
        return axes is not None and all(int(a) % len(before) != last for a in axes)
    if node.op_type == "Cast":
        return True
    rank = max(len(before), len(after))
    axes_moved = _axes(rewriter, node)
    return axes_moved is not None and all(a % rank != rank - 1 for a in axes_moved)
