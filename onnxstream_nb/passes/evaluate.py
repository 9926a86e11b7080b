"""Evaluating small nodes with numpy, for constants and for shapes with unknown sizes in them.

An int64 array with an unknown element is an object array of `symbols.Size`; the same numpy code
moves its elements about. A result that cannot be known is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxstream_nb.graph import DTYPES, Node
from onnxstream_nb.passes.symbols import Poly, divide, is_nonnegative

Array = npt.NDArray[Any]
Evaluator = Callable[..., Array | None]

LIMIT = 1 << 16
"""No constant with more elements than this is read or made."""


def evaluate(node: Node, args: Sequence[Array | None]) -> Array | None:
    """The node's only output, from its inputs (None: omitted), or None when it is not known."""
    function = EVALUATORS.get(node.op_type)
    if function is None or node.domain or len(node.outputs) != 1:
        return None
    with np.errstate(all="ignore"):
        result = function(node, *args)
    if result is None or result.size > LIMIT:
        return None
    return _concrete(result)


def is_symbolic(array: Array) -> bool:
    """Whether an element of the array is known only at run time."""
    return array.dtype == object


def _concrete(array: Array) -> Array:
    if array.dtype != object or any(isinstance(e, Poly) for e in array.flat):
        return array
    return array.astype(np.int64)


def _ints(array: Array | None) -> list[int] | None:
    """The elements as integers; None when one is unknown or the input is omitted."""
    if array is None or is_symbolic(array):
        return None
    return [int(e) for e in array.flat]


def axes_of(node: Node, axes: Array | None) -> list[int] | None:
    """The axes of Squeeze, Unsqueeze or a reduction: an input, before opset 13/18 an attribute."""
    if "axes" in node.attributes:
        return [int(a) for a in node.attributes["axes"]]
    return _ints(axes)


def _elementwise(function: Callable[..., Any]) -> Evaluator:
    def run(node: Node, *args: Array) -> Array:
        return np.asarray(function(*args))

    return run


def _typed(function: Callable[..., Any]) -> Evaluator:
    def run(node: Node, *args: Array) -> Array | None:
        if any(map(is_symbolic, args)):
            return None
        return np.asarray(function(*args)).astype(args[0].dtype)

    return run


def _div(node: Node, a: Array, b: Array) -> Array | None:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    if any(isinstance(e, int | np.integer) and e == 0 for e in b.flat):
        return None
    if is_symbolic(a) or is_symbolic(b):
        return np.asarray(np.frompyfunc(divide, 2, 1)(a.astype(object), b.astype(object)), object)
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)


def _compare(a: Any, b: Any) -> bool | None:
    if a == b:
        return True
    difference = a - b
    if isinstance(difference, int):
        return False
    for one in (difference - 1, -difference - 1):
        if is_nonnegative(one):
            return False
    return None


def _equal(node: Node, a: Array, b: Array) -> Array | None:
    if not (is_symbolic(a) or is_symbolic(b)):
        return np.asarray(a == b)
    known = np.asarray(np.frompyfunc(_compare, 2, 1)(a.astype(object), b.astype(object)), object)
    return None if any(e is None for e in known.flat) else known.astype(bool)


def _where(node: Node, condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


def _cast(node: Node, x: Array) -> Array | None:
    name = DTYPES[node.attributes["to"]]
    if is_symbolic(x):
        return x if name == "int64" else None
    try:
        return x.astype(np.dtype(name)) if name != "string" else None
    except TypeError:  # a type that numpy does not have
        return None


def _concat(node: Node, *args: Array) -> Array:
    return np.concatenate(args, axis=node.attributes["axis"])


def _gather(node: Node, x: Array, indices: Array) -> Array | None:
    if is_symbolic(indices):
        return None
    axis = node.attributes.get("axis", 0)
    count = x.shape[axis]
    if np.any(indices < -count) or np.any(indices >= count):
        return None
    return np.asarray(np.take(x, indices, axis=axis), x.dtype)


def _slice(node: Node, x: Array, *bounds: Array) -> Array | None:
    lists = [_ints(b) for b in bounds]
    if len(lists) < 2 or any(b is not None and is_symbolic(b) for b in bounds):
        return None
    starts, ends = lists[0] or [], lists[1] or []
    axes = lists[2] if len(lists) > 2 and lists[2] is not None else list(range(len(starts)))
    steps = lists[3] if len(lists) > 3 and lists[3] is not None else [1] * len(starts)
    window = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            return None
        window[axis] = slice(start, end, step)
    return x[tuple(window)]


def _squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    listed = axes_of(node, axes)
    return np.squeeze(x, None if listed is None else tuple(listed))


def _unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array | None:
    listed = axes_of(node, axes)
    return None if listed is None else np.expand_dims(x, tuple(listed))


def _reshape(node: Node, x: Array, shape: Array) -> Array | None:
    target = _ints(shape)
    if target is None:
        return None
    if not node.attributes.get("allowzero", 0):
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return x.reshape(target)


def _transpose(node: Node, x: Array) -> Array:
    return np.transpose(x, node.attributes.get("perm"))


def _expand(node: Node, x: Array, shape: Array) -> Array | None:
    target = _ints(shape)
    if target is None or np.prod(target, dtype=float) * max(x.size, 1) > LIMIT:
        return None
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(target)))


def _constant_of_shape(node: Node, shape: Array) -> Array | None:
    target = _ints(shape)
    if target is None or np.prod(target, dtype=float) > LIMIT:
        return None
    value = np.asarray(node.attributes.get("value", np.zeros(1, np.float32)))
    return np.full(target, value.reshape(-1)[0], value.dtype)


def _range(node: Node, start: Array, limit: Array, delta: Array) -> Array | None:
    if any(map(is_symbolic, (start, limit, delta))) or delta == 0:
        return None
    if abs((float(limit) - float(start)) / float(delta)) > LIMIT:
        return None
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


EVALUATORS: Mapping[str, Evaluator] = {
    "Add": _elementwise(np.add), "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply), "Neg": _elementwise(np.negative),
    "Identity": _elementwise(np.asarray), "Div": _div,
    "Sqrt": _typed(np.sqrt), "Pow": _typed(np.power), "Reciprocal": _typed(np.reciprocal),
    "Not": _typed(np.logical_not), "And": _typed(np.logical_and), "Or": _typed(np.logical_or),
    "Equal": _equal, "Where": _where, "Cast": _cast, "Concat": _concat, "Gather": _gather,
    "Slice": _slice, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Reshape": _reshape,
    "Transpose": _transpose, "Expand": _expand, "ConstantOfShape": _constant_of_shape,
    "Range": _range,
}  # fmt: skip
