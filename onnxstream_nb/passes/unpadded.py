"""Masks of a context without padding -> what Attention knows by itself: causal, or a window.

An OnnxStream folder, or a graph taken apart for one, computes a mask from positions and from the
input attention_mask. Who generates text pads nothing: that input is all ones, as long as past and
new tokens together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter
from onnxstream_nb.passes.symbols import Size

PADDING = "attention_mask"
CAUSAL_OPSET, WINDOW_OPSET = 23, 25
HIDDEN = -6e4
"""A number added to scores that is no greater hides a key (float16's least is -65504)."""


@dataclass(frozen=True, slots=True)
class _Line:
    """The integers `offset`, `offset` + 1, ...: `length` of them, None where that is not known."""

    offset: Size
    length: Size | None


def rewrite_unpadded(graph: Graph, read: Read) -> Graph:
    """Let attention over a cache be causal, where its mask says just that if nothing is padded.

    The input attention_mask goes where nothing else reads it.
    """
    rewriter = Rewriter(graph, read)
    opset = 0
    for node in graph.nodes:
        limits = _limits(rewriter, node)
        if limits is None:
            continue
        attributes = {**node.attributes, "is_causal": 1}
        opset = max(opset, CAUSAL_OPSET)
        if limits:
            attributes["left_window_size"] = limits - 1
            opset = WINDOW_OPSET
        inputs = (*node.inputs[:3], "", *node.inputs[4:])
        rewriter.replace(node, replace(node, inputs=inputs, attributes=attributes))
    rewritten = rewriter.finish(opset)
    used = {i for n in rewritten.nodes for i in n.inputs}
    if rewritten is graph or PADDING in used:
        return rewritten
    return rewritten.with_(inputs=tuple(i for i in rewritten.inputs if i.name != PADDING))


def _limits(rewriter: Rewriter, node: Node) -> int | None:
    """The window of a causal attention, 0 for all positions; None for any other node."""
    if node.op_type != "Attention" or node.domain or node.attributes.get("is_causal", 0):
        return None
    if len(node.inputs) != 6 or not all(node.inputs[3:]):
        return None
    condition = _allowed(rewriter, node.inputs[3])
    held, new = (rewriter.facts.shape(node.inputs[i]) for i in (4, 0))
    if condition is None or held is None or new is None or len(held) != 4:
        return None
    causal, window = False, 0
    for part in _parts(rewriter, condition):
        bound = _bound(rewriter, part, held[2], new[-2])
        if bound is None:
            return None
        over, distance = bound
        if over and isinstance(distance, int) and distance > 0 and not window:
            window = distance
        elif over or distance != 0:
            return None
        else:
            causal = True
    return window if causal else None


def _allowed(rewriter: Rewriter, mask: str) -> str | None:
    """The boolean that says what an additive mask leaves, once padding is taken off it."""
    total = rewriter.made_by(mask, "Add")
    if total is not None:
        kept = [i for i in total.inputs if not _is_padding(rewriter, i)]
        mask = kept[0] if len(kept) == 1 else mask
    if rewriter.facts.dtype(mask) == "bool":
        return mask
    where = rewriter.made_by(mask, "Where")
    if where is None:
        return None
    condition, yes, no = where.inputs
    hidden = rewriter.scalar(no)
    hides = rewriter.scalar(yes) == 0 and hidden is not None and hidden <= HIDDEN
    return condition if hides else None


def _is_padding(rewriter: Rewriter, value: str) -> bool:
    """Whether it is (1 - attention_mask) times a number."""
    product = rewriter.made_by(value, "Mul")
    rest = [i for i in product.inputs if rewriter.scalar(i) is None] if product else []
    difference = rewriter.made_by(rest[0], "Sub") if len(rest) == 1 else None
    if difference is None or rewriter.scalar(difference.inputs[0]) != 1:
        return False
    cast = rewriter.made_by(difference.inputs[1], "Cast")
    return cast is not None and cast.inputs[0] == PADDING


def _parts(rewriter: Rewriter, condition: str) -> Iterator[Node | None]:
    """What all has to hold."""
    both = rewriter.made_by(condition, "And")
    if both is None:
        yield rewriter.made_by(condition, "Less", "Greater")
    else:
        for value in both.inputs:
            yield from _parts(rewriter, value)


def _bound(
    rewriter: Rewriter, node: Node | None, past: Size, tokens: Size
) -> tuple[bool, Size] | None:
    """Of key < limit, (False, the first key that it hides beyond the query's own place); of
    key > limit, (True, how many places up to the query's own it leaves). None for others."""
    keys = _line(rewriter, node.inputs[0]) if node else None
    column = rewriter.made_by(node.inputs[1], "Add", "Unsqueeze") if node else None
    limits = _column(rewriter, column) if column else None
    if node is None or keys is None or limits is None or limits.length != tokens:
        return None
    whole = rewriter.facts.shape(PADDING)
    lengths = [past + tokens, *(whole[-1:] if whole is not None else ())]
    if keys.length not in lengths:
        return None
    shift = limits.offset - keys.offset - past
    return (False, shift - 1) if node.op_type == "Less" else (True, -shift)


def _column(rewriter: Rewriter, node: Node) -> _Line | None:
    """Integers one below the other, (T, 1)."""
    if node.op_type == "Unsqueeze":
        axes = rewriter.facts.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        known = axes is not None and axes.tolist() in ([1], [-1])
        return _line(rewriter, node.inputs[0]) if known else None
    for inner, number in (node.inputs, node.inputs[::-1]):
        column = rewriter.made_by(inner, "Unsqueeze")
        line = _column(rewriter, column) if column else None
        added = _number(rewriter, number)
        if line is not None and added is not None:
            return replace(line, offset=line.offset + added)
    return None


def _line(rewriter: Rewriter, value: str) -> _Line | None:
    """Integers side by side: a Range, and what an Add makes of one."""
    node = rewriter.made_by(value, "Range", "Add")
    if node is None:
        return None
    if node.op_type == "Range":
        start, limit, step = (_number(rewriter, i) for i in node.inputs)
        if start is None or step != 1:
            return None
        return _Line(start, None if limit is None else limit - start)
    for inner, number in (node.inputs, node.inputs[::-1]):
        line, added = _line(rewriter, inner), _number(rewriter, number)
        if line is not None and added is not None:
            return replace(line, offset=line.offset + added)
    return None


def _number(rewriter: Rewriter, value: str) -> Size | None:
    """The one integer that a value is, with symbols in it where it follows sizes."""
    known = rewriter.facts.value(value)
    if known is None or known.size != 1 or known.dtype.kind not in "iO":
        return None
    if known.dtype.kind == "i":
        return int(known.item())
    number: Size = known.reshape(-1)[0]
    return number
