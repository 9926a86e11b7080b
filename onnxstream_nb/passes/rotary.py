"""x * cos + rotate_half(x) * sin -> RotaryEmbedding (opset 23).

Source: Su et al., "RoFormer", arXiv:2104.09864, in the half-split layout of GPT-NeoX and Llama.
"""

from __future__ import annotations

from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.patterns import Match, Var, either, matches, op
from onnxstream_nb.passes.rewriting import Rewriter
from onnxstream_nb.passes.rotary_cache import Caches

OPSET = 23

_X = Var("x")
_LOW = either(op("Slice", _X, bind="low", rest=True), op("Split", _X, bind="split", rest=True))
_HIGH = either(
    op("Slice", _X, bind="high", rest=True),
    op("Split", _X, bind="split", rest=True, output=1),
)
_ROTATED = op("Concat", op("Neg", _HIGH), _LOW, bind="concat")
PATTERN = op("Add", op("Mul", _X, Var("cos")), op("Mul", _ROTATED, Var("sin")))
PARTIAL = op(
    "Concat",
    op("RotaryEmbedding", op("Slice", _X, bind="low", rest=True), bind="rotary", rest=True),
    op("Slice", _X, bind="high", rest=True),
    bind="concat",
)


def rewrite(graph: Graph, read: Read) -> Graph:
    """Fuse the rotation of whole heads, then of heads whose last channels pass unrotated."""
    return _rewrite_partial(_rewrite_whole(graph, read), read)


def _rewrite_whole(graph: Graph, read: Read) -> Graph:
    rewriter = Rewriter(graph, read)
    caches = Caches(rewriter)
    for root in graph.nodes:
        for match in matches(rewriter, PATTERN, root) if root.op_type == "Add" else ():
            nodes = _fused(rewriter, caches, root, match)
            if nodes:
                rewriter.replace(root, *nodes)
                break
    return rewriter.finish(OPSET)


def _fused(rewriter: Rewriter, caches: Caches, root: Node, match: Match) -> list[Node]:
    x = match.values["x"]
    shape = rewriter.facts.shape(x)
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
        return []
    if not _splits_in_half(rewriter, match, shape[3]):
        return []
    cos = caches.make(match.values["cos"], shape)
    sin = caches.make(match.values["sin"], shape)
    if cos is None or sin is None:
        return []
    inputs = (x, cos[0], sin[0])
    return [*cos[1], *sin[1], Node("RotaryEmbedding", inputs, root.outputs, {}, root.name)]


def _splits_in_half(rewriter: Rewriter, match: Match, width: int) -> bool:
    """Whether the rotation swaps the two halves of the last axis of a 4-D x."""
    if match.bound["concat"].attributes["axis"] not in (-1, 3):
        return False
    split = match.bound.get("split")
    if split is not None:
        half = rewriter.facts.shape(split.outputs[0])
        return split.attributes.get("axis", 0) in (-1, 3) and half is not None \
            and half[3] == width // 2 and len(split.outputs) == 2  # fmt: skip
    if "low" not in match.bound or "high" not in match.bound:
        return False
    low, high = (_window(rewriter, match.bound[name], width) for name in ("low", "high"))
    return low == (0, width // 2) and high == (width // 2, width)


def _window(rewriter: Rewriter, node: Node, width: int) -> tuple[int, int] | None:
    """The (start, end) of a Slice of the last axis of a 4-D value with step 1."""
    bounds = [rewriter.facts.constant(i) for i in node.inputs[1:]]
    if len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, axis, *step = (int(b.item()) for b in bounds if b is not None)
    window = range(width)[start:end]
    if axis not in (-1, 3) or step not in ([], [1]) or not window:
        return None
    return window.start, window.stop


def _rewrite_partial(graph: Graph, read: Read) -> Graph:
    rewriter = Rewriter(graph, read)
    for root in graph.nodes:
        for match in matches(rewriter, PARTIAL, root) if root.op_type == "Concat" else ():
            shape = rewriter.facts.shape(match.values["x"])
            rotary = match.bound["rotary"]
            if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
                continue
            low, high = (_window(rewriter, match.bound[n], shape[3]) for n in ("low", "high"))
            whole = low and high and low[0] == 0 and high == (low[1], shape[3])
            if whole and low and root.attributes["axis"] in (-1, 3):
                attributes = {**rotary.attributes, "rotary_embedding_dim": low[1]}
                inputs = (match.values["x"], *rotary.inputs[1:])
                fused = Node("RotaryEmbedding", inputs, root.outputs, attributes, root.name)
                rewriter.replace(root, fused)
                break
    return rewriter.finish(OPSET)
