"""The shape of an operator's first output from the shapes and small values of its inputs.

A rule returns None when it cannot tell; None inside a shape is a size it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxstream_nb.graph import Node
from onnxstream_nb.passes.evaluate import axes_of
from onnxstream_nb.passes.symbols import Size, quotient

Shape = tuple[Size, ...]
Partial = Sequence[Size | None]


class Knowledge(Protocol):
    """What a rule may ask about the values before its node."""

    def shape(self, name: str) -> Shape | None:
        """The shape of a value."""

    def value(self, name: str) -> npt.NDArray[Any] | None:
        """The elements of a small value, with symbols in it where they are sizes."""


Rule = Callable[[Knowledge, Node], Partial | None]


def broadcast(shapes: Sequence[Shape | None]) -> Partial | None:
    """numpy's broadcasting; a size is None where two unknown sizes meet that may differ."""
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes):
        return None
    rank = max(map(len, known))
    columns = zip(*[(1,) * (rank - len(s)) + s for s in known], strict=True)
    return [_merge(column) for column in columns]


def _merge(sizes: Sequence[Size]) -> Size | None:
    distinct = {s for s in sizes if s != 1}
    whole = [s for s in distinct if isinstance(s, int)]
    if not distinct:
        return 1
    if len(whole) == 1:
        return whole[0]
    return distinct.pop() if len(distinct) == 1 else None


def _same(known: Knowledge, node: Node) -> Partial | None:
    return known.shape(node.inputs[0])


def _broadcast(known: Knowledge, node: Node) -> Partial | None:
    return broadcast([known.shape(i) for i in node.inputs])


def _matmul(known: Knowledge, node: Node) -> Partial | None:
    a, b = (known.shape(i) for i in node.inputs)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    batch = broadcast([a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else []
    return None if batch is None else [*batch, a[-2], b[-1]]


def _gemm(known: Knowledge, node: Node) -> Partial | None:
    a, b = (known.shape(i) for i in node.inputs[:2])
    if a is None or b is None:
        return None
    return [a[node.attributes.get("transA", 0)], b[1 - node.attributes.get("transB", 0)]]


def _transpose(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    if x is None:
        return None
    return [x[i] for i in node.attributes.get("perm", range(len(x))[::-1])]


def _reshape(known: Knowledge, node: Node) -> Partial | None:
    target = known.value(node.inputs[1])
    x = known.shape(node.inputs[0])
    if target is None:
        count = known.shape(node.inputs[1])
        return [None] * count[0] if count and isinstance(count[0], int) else None
    sizes: list[Size | None] = list(target.tolist())
    if not node.attributes.get("allowzero", 0):
        for i, size in enumerate(sizes):
            if isinstance(size, int) and size == 0:
                sizes[i] = x[i] if x is not None and i < len(x) else None
    if -1 in sizes:
        others = [s for s in sizes if s is not None and s != -1]
        complete = x is not None and len(others) == len(sizes) - 1
        sizes[sizes.index(-1)] = quotient(x, others) if x is not None and complete else None
    return sizes


def _axes(known: Knowledge, node: Node) -> list[int] | None:
    listed = known.value(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    return axes_of(node, listed)


def _unsqueeze(known: Knowledge, node: Node) -> Partial | None:
    x, axes = known.shape(node.inputs[0]), _axes(known, node)
    if x is None or axes is None:
        return None
    rank = len(x) + len(axes)
    added = {a % rank for a in axes}
    sizes = iter(x)
    return [1 if i in added else next(sizes) for i in range(rank)]


def _squeeze(known: Knowledge, node: Node) -> Partial | None:
    x, axes = known.shape(node.inputs[0]), _axes(known, node)
    if x is None or axes is None:
        return None
    removed = {a % len(x) for a in axes}
    return [s for i, s in enumerate(x) if i not in removed]


def _reduce(known: Knowledge, node: Node) -> Partial | None:
    x, axes = known.shape(node.inputs[0]), _axes(known, node)
    if x is None or axes is None:
        return None
    removed = {a % len(x) for a in axes}
    if node.attributes.get("keepdims", 1):
        return [1 if i in removed else s for i, s in enumerate(x)]
    return [s for i, s in enumerate(x) if i not in removed]


def _concat(known: Knowledge, node: Node) -> Partial | None:
    shapes = [s for i in node.inputs if (s := known.shape(i)) is not None]
    if len(shapes) != len(node.inputs):
        return None
    axis = node.attributes["axis"] % len(shapes[0])
    total: Size = 0
    for shape in shapes:
        total = total + shape[axis]
    # Every other axis is equal in all inputs: an integer says most.
    sizes: list[Size | None] = [
        next((s[i] for s in shapes if isinstance(s[i], int)), shapes[0][i])
        for i in range(len(shapes[0]))
    ]
    sizes[axis] = total
    return sizes


def _gather(known: Knowledge, node: Node) -> Partial | None:
    x, indices = (known.shape(i) for i in node.inputs)
    if x is None or indices is None:
        return None
    axis = node.attributes.get("axis", 0) % len(x)
    return [*x[:axis], *indices, *x[axis + 1 :]]


def _gather_nd(known: Knowledge, node: Node) -> Partial | None:
    x, indices = (known.shape(i) for i in node.inputs)
    if x is None or indices is None or not isinstance(indices[-1], int):
        return None
    return [*indices[:-1], *x[node.attributes.get("batch_dims", 0) + indices[-1] :]]


def _slice(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    if x is None or len(node.inputs) < 3:
        return None
    bounds = [known.value(i) if i else None for i in node.inputs[1:]]
    count = known.shape(node.inputs[1])
    axes: Iterable[int] | None = range(count[0]) if count and isinstance(count[0], int) else None
    if len(node.inputs) > 3 and node.inputs[3]:
        axes = None if bounds[2] is None else [int(a) for a in bounds[2]]
    if axes is None:
        return [None] * len(x)
    sizes: list[Size | None] = list(x)
    for i, axis in enumerate(axes):
        sizes[axis] = _sliced(x[axis], [None if b is None else b[i] for b in bounds])
    return sizes


def _sliced(size: Size, bounds: Sequence[Any]) -> Size | None:
    if len(bounds) > 3 and (bounds[3] is None or bounds[3] != 1):
        return None
    start, end = bounds[:2]
    if not isinstance(start, int | np.integer) or not isinstance(end, int | np.integer):
        return end if isinstance(start, int | np.integer) and start == 0 and end == size else None
    if isinstance(size, int):
        return len(range(size)[int(start) : int(end)])
    return size if start == 0 and end >= 1 << 31 else None


def _expand(known: Knowledge, node: Node) -> Partial | None:
    target = known.value(node.inputs[1])
    return None if target is None else broadcast([known.shape(node.inputs[0]), (*target.tolist(),)])


def _constant_of_shape(known: Knowledge, node: Node) -> Partial | None:
    target = known.value(node.inputs[0])
    return None if target is None else target.tolist()


def _shape(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    if x is None:
        return [None]
    return [len(x[node.attributes.get("start", 0) : node.attributes.get("end", len(x))])]


def _range(known: Knowledge, node: Node) -> Partial | None:
    start, limit, delta = (known.value(i) for i in node.inputs)
    if start is None or limit is None or delta is None or limit.dtype.kind == "f":
        return [None]
    return [limit.item() if start.item() == 0 and delta.item() == 1 else None]


def _flatten(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    if x is None:
        return [None, None]
    axis = node.attributes.get("axis", 1)
    axis += len(x) if axis < 0 else 0
    return [quotient(x[:axis], ()), quotient(x[axis:], ())]


def _conv(known: Knowledge, node: Node) -> Partial | None:
    x, weight = known.shape(node.inputs[0]), known.shape(node.inputs[1])
    if x is None or weight is None:
        return None
    return [x[0], weight[0], *[None] * (len(x) - 2)]


def _pool(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    return None if x is None else [*x[:2], *[None] * (len(x) - 2)]


def _rank_only(known: Knowledge, node: Node) -> Partial | None:
    x = known.shape(node.inputs[0])
    return None if x is None else [None] * len(x)


def _attention(known: Knowledge, node: Node) -> Partial | None:
    q, v = known.shape(node.inputs[0]), known.shape(node.inputs[2])
    if q is None or v is None:
        return None
    if len(q) == 4:
        return [*q[:3], v[3]]
    width = quotient([v[2], node.attributes["q_num_heads"]], [node.attributes["kv_num_heads"]])
    return [*q[:2], width]


_SAME = (
    "Abs", "Cast", "Ceil", "Clip", "Cos", "CumSum", "Dropout", "Elu", "Erf", "Exp", "Floor",
    "Gelu", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Neg", "Not", "RMSNormalization",
    "Reciprocal", "Relu", "RotaryEmbedding", "Round", "ScatterElements", "ScatterND", "Selu",
    "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Swish", "Tanh", "Trilu",
    "BatchNormalization",
)  # fmt: skip
_BROADCAST = (
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "And", "Or", "Xor", "Where", "Equal",
    "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
)  # fmt: skip
_REDUCE = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2",
    "ReduceSumSquare",
)  # fmt: skip

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME, _same), **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_REDUCE, _reduce),
    "MatMul": _matmul, "Gemm": _gemm, "Transpose": _transpose, "Reshape": _reshape,
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Concat": _concat, "Gather": _gather,
    "GatherND": _gather_nd, "Slice": _slice, "Expand": _expand, "Shape": _shape,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Flatten": _flatten,
    "Attention": _attention, "Conv": _conv, "MaxPool": _pool, "AveragePool": _pool,
    "Resize": _rank_only, "Pad": _rank_only, "Tile": _rank_only,
}  # fmt: skip
