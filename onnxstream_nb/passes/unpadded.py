"""Masks of a context without padding -> what Attention knows by itself: causal, or a window.

Exports, and graphs taken apart for OnnxStream, compute a mask from positions and from the input
attention_mask. Who generates text pads nothing: that input is all ones, as long as past and new
tokens together.
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


_COMPARISONS = {"Less": (False, 0), "LessOrEqual": (False, 1), "Greater": (True, 0),
                "GreaterOrEqual": (True, -1)}  # fmt: skip
"""Comparison -> whether its second side is a lower limit, and what makes that exclusive."""
_MOVES = frozenset({
    "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Gather", "GatherND",
    "Transpose", "Identity", "Slice",
})  # fmt: skip
"""Operators whose result has no other elements than their first input's."""


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
    held, new = (rewriter.facts.shape(node.inputs[i]) for i in (4, 0))
    if held is None or new is None or len(held) != 4:
        return None
    mask, past = _without_padding(rewriter, node.inputs[3]), held[2]
    square = _behind_zeros(rewriter, mask, new[-2], past)
    mask, past = (square, 0) if square else (mask, past)
    condition = _allowed(rewriter, mask)
    if condition is None:
        return None
    causal, window = False, 0
    for part in _parts(rewriter, condition):
        bound = _bound(rewriter, part, past, new[-2])
        if bound is None:
            return None
        is_lower, distance = bound
        if is_lower and isinstance(distance, int) and distance > 0 and not window:
            window = distance
        elif is_lower or distance != 0:
            return None
        else:
            causal = True
    return window if causal else None


def _without_padding(rewriter: Rewriter, mask: str) -> str:
    """An additive mask without the term that hides what is padded."""
    total = rewriter.made_by(mask, "Add")
    kept = [i for i in total.inputs if not _is_zero(rewriter, i)] if total else []
    return kept[0] if len(kept) == 1 else mask


def _behind_zeros(rewriter: Rewriter, mask: str, tokens: Size, past: Size) -> str:
    """The mask (T, T) of the new tokens, where zeros (T, P) stand before it; "" elsewhere."""
    inner = rewriter.made_by(mask, "Unsqueeze")
    joined = rewriter.made_by(inner.inputs[0] if inner else mask, "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attributes["axis"] not in (-1, 1):
        return ""
    zeros, square = joined.inputs
    shapes = [rewriter.facts.shape(i) for i in joined.inputs]
    fits = shapes == [(tokens, past), (tokens, tokens)]
    return square if fits and _filling(rewriter, zeros) == 0 else ""


def _filling(rewriter: Rewriter, value: str) -> float | None:
    """The one number of which a value has nothing but copies."""
    node = rewriter.made_by(value, "ConstantOfShape")
    if node is None:
        return rewriter.scalar(value)
    number = node.attributes.get("value")
    return 0.0 if number is None else float(number.item())


def _allowed(rewriter: Rewriter, mask: str) -> str | None:
    """The boolean that says what a mask leaves."""
    if rewriter.facts.dtype(mask) == "bool":
        return mask
    where = rewriter.made_by(mask, "Where")
    if where is None:
        return None
    condition, yes, no = where.inputs
    hidden = _filling(rewriter, no)
    hides = _filling(rewriter, yes) == 0 and hidden is not None and hidden <= HIDDEN
    return condition if hides else None


def _is_one(rewriter: Rewriter, value: str) -> bool:
    """Whether it is all ones, or true, when attention_mask is."""
    if value == PADDING:
        return True
    node = rewriter.producer.get(value)
    moved = node is not None and not node.domain and node.op_type in _MOVES
    return node is not None and moved and _is_one(rewriter, node.inputs[0])


def _is_zero(rewriter: Rewriter, value: str) -> bool:
    """Whether it is all zeros, or false, when attention_mask is ones: made of 1 - that."""
    node = rewriter.producer.get(value)
    if node is None or node.domain:
        return False
    if node.op_type == "Sub":
        return rewriter.scalar(node.inputs[0]) == 1 and _is_one(rewriter, node.inputs[1])
    if node.op_type == "Mul":
        zeros = [i for i in node.inputs if rewriter.scalar(i) is None]
        return len(zeros) == 1 and _is_zero(rewriter, zeros[0])
    if node.op_type == "Where":
        return all(_is_zero(rewriter, node.inputs[i]) for i in (0, 2))
    return node.op_type in _MOVES and _is_zero(rewriter, node.inputs[0])


def _parts(rewriter: Rewriter, condition: str) -> Iterator[Node | None]:
    """What all has to hold, without that nothing is padded."""
    both = rewriter.made_by(condition, "And")
    if both is not None:
        for value in both.inputs:
            yield from _parts(rewriter, value)
    elif not _is_one(rewriter, condition):
        yield rewriter.made_by(condition, *_COMPARISONS)


def _bound(
    rewriter: Rewriter, node: Node | None, past: Size, tokens: Size
) -> tuple[bool, Size] | None:
    """Of key < limit, (False, how many places beyond the query's own it leaves); of key > limit,
    (True, how many places up to the query's own it leaves). None for others."""
    if node is None:
        return None
    keys, limits = (_line(rewriter, i) for i in node.inputs)
    if keys is None or limits is None or limits.length != tokens:
        return None
    if not (_runs_along(rewriter, node.inputs[0], 1) and _runs_along(rewriter, node.inputs[1], 2)):
        return None
    whole = rewriter.facts.shape(PADDING)
    others = whole[-1:] if whole is not None and past != 0 else ()
    if keys.length not in [past + tokens, *others]:
        return None
    is_lower, exclusive = _COMPARISONS[node.op_type]
    shift = limits.offset + exclusive - keys.offset - past
    return (True, -shift) if is_lower else (False, shift - 1)


def _runs_along(rewriter: Rewriter, value: str, axis: int) -> bool:
    """Whether a value has more than one element along this axis only, counted from the end."""
    shape = rewriter.facts.shape(value)
    if shape is None or len(shape) < axis:
        return False
    return all(s == 1 for i, s in enumerate(reversed(shape), 1) if i != axis)


def _line(rewriter: Rewriter, value: str) -> _Line | None:
    """A Range, what additions make of one, along whichever axis."""
    node = rewriter.made_by(value, "Range", "Add", "Sub", "Unsqueeze", "Reshape")
    if node is None:
        return None
    if node.op_type in ("Unsqueeze", "Reshape"):  # which axis it is along, `_runs_along` sees
        return _line(rewriter, node.inputs[0])
    if node.op_type == "Range":
        start, limit, step = (_number(rewriter, i) for i in node.inputs)
        if start is None or step != 1:
            return None
        return _Line(start, None if limit is None else limit - start)
    orders = [node.inputs] if node.op_type == "Sub" else [node.inputs, node.inputs[::-1]]
    for inner, number in orders:
        line, added = _line(rewriter, inner), _number(rewriter, number)
        if line is not None and added is not None:
            added = added * -1 if node.op_type == "Sub" else added
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
