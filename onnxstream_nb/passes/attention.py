"""softmax(q k^T * scale + mask) v -> Attention (opset 23), four-dimensional and without a cache.

Source: Vaswani et al., "Attention Is All You Need", arXiv:1706.03762. A row that is masked out
entirely gives 0 in the operator, as it does in exports that replace NaN by 0.
"""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.patterns import (
    Match,
    Num,
    Pattern,
    Var,
    either,
    matches,
    maybe,
    op,
)
from onnxstream_nb.passes.rewriting import CLOSE, Rewriter
from onnxstream_nb.passes.shape_rules import Shape
from onnxstream_nb.passes.symbols import Size

OPSET = 23
FLOAT = 1
TRANSPOSED = (0, 1, 3, 2)
FROM_SPLIT = (0, 2, 3, 1)
"""Keys of (B, T, H, D) split and transposed at once, as an exporter joins the two."""


def _scaled(inner: Pattern, name: str) -> Pattern:
    """The inner pattern, times or over a constant, or as it is."""
    times, over = Num(name=f"{name}*"), Num(name=f"{name}/")
    return either(op("Mul", inner, times), op("Div", inner, over), inner)


_KEYS = op("Transpose", _scaled(Var("k"), "k inner"), bind="transpose")
_SCORES = _scaled(op("MatMul", _scaled(Var("q"), "q"), _scaled(_KEYS, "k")), "qk")
_CAPPED = either(
    op("Mul", op("Tanh", op("Div", _SCORES, Num(name="cap"))), Num(name="cap again")), _SCORES
)
_MASKED = either(
    op("Add", op("Add", _CAPPED, Var("mask")), Var("second mask")),
    op("Add", _CAPPED, Var("mask")),
    _CAPPED,
)
_SOFTMAX = op("Softmax", maybe("Cast", _MASKED, bind="widened"), bind="softmax")
_WITHOUT_NAN = either(op("Where", op("IsNaN", _SOFTMAX), Num(0.0), _SOFTMAX), _SOFTMAX)
PATTERN = op("MatMul", maybe("Cast", _WITHOUT_NAN, bind="narrowed"), Var("v"))


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse the pattern over (batch, heads, sequence, channels) values."""
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        for match in matches(rewriter, PATTERN, root) if root.op_type == "MatMul" else ():
            if _fits(rewriter, match):
                rewriter.replace(root, *_fused(rewriter, root, match))
                break
    return rewriter.finish(OPSET)


def _fits(rewriter: Rewriter, match: Match) -> bool:
    shapes = [rewriter.facts.shape(match.values[name]) for name in "qkv"]
    q, k, v = ((s if s is not None and len(s) == 4 else None) for s in shapes)
    if k is not None and match.bound["transpose"].attributes.get("perm") == FROM_SPLIT:
        k = (k[0], k[2], k[1], k[3])
    if q is None or k is None or v is None or rewriter.graph.opset.get("", 0) < 13:
        return False
    return (
        match.bound["softmax"].attributes.get("axis", -1) in (-1, 3)
        and match.bound["transpose"].attributes.get("perm") in (TRANSPOSED, FROM_SPLIT)
        and k[1] == v[1]
        and _is_group(q[1], k[1])
        and _scale(match) > 0
        and _softcap(match) is not None
        and _fits_types(rewriter, match)
        and all(_fits_mask(rewriter, match.values[m], q, k) for m in _masks(match))
    )


def _is_group(q_heads: Size, kv_heads: Size) -> bool:
    """Whether a batched product of these head counts is one that the operator knows."""
    return q_heads == kv_heads or (kv_heads == 1 and isinstance(q_heads, int))


def _masks(match: Match) -> list[str]:
    return [name for name in ("mask", "second mask") if name in match.values]


def _fits_mask(rewriter: Rewriter, mask: str, q: Shape, k: Shape) -> bool:
    """Whether a mask added to the scores broadcasts as the operator's does.

    The operator pads a mask that is shorter than the keys instead of stretching it.
    """
    shape = rewriter.facts.shape(mask)
    if shape is None or len(shape) not in (2, 4) or (shape[-1] == 1 and k[2] != 1):
        return False
    scores = (q[0], q[1], q[2])[4 - len(shape) :]
    return all(a == b or not isinstance(a, int) or a == 1 or not isinstance(b, int)
               for a, b in zip(shape[:-1], scores, strict=True))  # fmt: skip


def _fits_types(rewriter: Rewriter, match: Match) -> bool:
    """One type throughout, or a softmax in float32 between two Casts."""
    dtype = rewriter.facts.dtype(match.values["q"])
    masks = [rewriter.facts.dtype(match.values[m]) for m in _masks(match)]
    if dtype is None or any(m != dtype for m in masks):
        return False
    if "widened" in match.bound or "narrowed" in match.bound:
        casts = [match.bound[c] for c in ("widened", "narrowed") if c in match.bound]
        narrow = rewriter.facts.dtype(casts[-1].outputs[0])
        return len(casts) == 2 and casts[0].attributes["to"] == FLOAT and narrow == dtype
    return True


def _scale(match: Match) -> float:
    scale = 1.0
    for name, number in match.numbers.items():
        scale *= number if name.endswith("*") else 1.0
        scale /= number if name.endswith("/") else 1.0
    return scale


def _softcap(match: Match) -> float | None:
    """The bound of the scores, 0 for none; None when the two constants differ."""
    cap, again = (match.numbers.get(name, 0.0) for name in ("cap", "cap again"))
    return cap if cap >= 0 and abs(cap - again) <= CLOSE * cap else None


def _fused(rewriter: Rewriter, root: Node, match: Match) -> list[Node]:
    inputs = [match.values[name] for name in "qkv"]
    nodes: list[Node] = []
    if match.bound["transpose"].attributes["perm"] == FROM_SPLIT:
        keys = rewriter.node("Transpose", [inputs[1]], f"{root.outputs[0]}.keys", perm=(0, 2, 1, 3))
        nodes.append(keys)
        inputs[1] = keys.outputs[0]
    masks = [match.values[m] for m in _masks(match)]
    if len(masks) == 2:
        nodes.append(rewriter.node("Add", masks, f"{root.outputs[0]}.mask"))
        inputs.append(nodes[-1].outputs[0])
    elif masks:
        inputs.append(_allowed(rewriter, masks[0]) or masks[0])
    attributes: dict[str, float | int] = {"scale": _scale(match)}
    if softcap := _softcap(match):
        attributes["softcap"] = softcap
    if "widened" in match.bound:
        attributes["softmax_precision"] = FLOAT
    return [*nodes, Node("Attention", tuple(inputs), root.outputs, attributes, root.name)]


def _allowed(rewriter: Rewriter, mask: str) -> str | None:
    """The boolean behind a mask that is 0 where it holds and minus infinity elsewhere."""
    node = rewriter.made_by(mask, "Where")
    if node is None:
        return None
    condition, yes, no = node.inputs
    exact = rewriter.scalar(yes) == 0.0 and rewriter.scalar(no) == float("-inf")
    same = rewriter.facts.shape(condition) == rewriter.facts.shape(mask)
    return condition if exact and same else None
