"""Constant weights of products and convolutions as 8-bit integers with a scale for each output.

Dims: a weight has N outputs along `axis`; scales and zero points are (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...errors import ModelError
from ...graph import Node, WeightRef
from ...passes.rewriting import Rewriter
from ..draft import FLOATS, Draft, Make, placeholder

Array = np.ndarray[Any, Any]

Part = tuple[str, str, tuple[int, ...]]
"""What a part of a quantised weight is called, its type and shape."""

Keep = Callable[..., bool]
"""Whether something of these names stays in floats."""

PIECE = 1 << 22  # elements
TINY = float(np.finfo(np.float32).tiny)
"""The least scale: below it processors may take numbers for zero."""

_FLOAT32 = 1  # TensorProto.FLOAT


class Integers(NamedTuple):
    """(q - zeros) * scales is the weight; `zeros` are of q's type."""

    q: Array
    scales: Array
    zeros: Array


def signed(weight: Array, axis: int, least: Array | None = None) -> Integers:
    """int8 from -127 to 127, without zero points; `least` (N,) are lower limits of the scales.

    Outputs that are all zero take the largest scale of the others: a bias that shares it stays
    as exact as theirs. Raises ValueError when an element is not finite.
    """
    largest = _least_and_greatest(weight, axis)
    scales = np.maximum(-largest[0], largest[1]) / 127
    scales[scales == 0] = scales.max(initial=0) or 1.0
    scales = np.maximum(scales, TINY if least is None else np.maximum(least, TINY))
    scales, zeros = scales.astype(np.float32), np.zeros(len(scales), np.int8)
    return Integers(_rounded(weight, axis, scales, zeros, (-127, 127)), scales, zeros)


def around_128(weight: Array, axis: int) -> Integers:
    """The integers of `signed`, as uint8 with one zero point, 128: onnxruntime's ConvInteger takes
    nothing else."""
    found = signed(weight, axis)
    return Integers(found.q.view(np.uint8) ^ 128, found.scales, np.array(128, np.uint8))


def unsigned(weight: Array, axis: int) -> Integers:
    """uint8 with zero points: each output's own range, with zero in it."""
    low, high = _least_and_greatest(weight, axis)
    scales = np.maximum((high - low) / 255, TINY).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, 255).astype(np.uint8)
    return Integers(_rounded(weight, axis, scales, zeros, (0, 255)), scales, zeros)


def _pieces(weight: Array, axis: int) -> Iterator[tuple[slice, Array]]:
    """The weight (N, ...) as pieces of its outputs, so that little is held beside it."""
    by_output = np.moveaxis(weight, axis, 0)
    each = max(1, weight.size // max(1, len(by_output)))
    step = max(1, PIECE // each)
    for start in range(0, len(by_output), step):
        yield slice(start, start + step), by_output[start : start + step]


def _least_and_greatest(weight: Array, axis: int) -> tuple[Array, Array]:
    """Each output's least and greatest element, with 0 among them, (N,) float64."""
    low, high = np.zeros((2, weight.shape[axis]))
    for at, piece in _pieces(weight, axis):
        inner = tuple(range(1, piece.ndim))
        low[at] = piece.min(inner, initial=0)
        high[at] = piece.max(inner, initial=0)
    if not np.isfinite(high - low).all():
        raise ValueError("not finite")
    return low, high


def _rounded(
    weight: Array, axis: int, scales: Array, zeros: Array, bounds: tuple[int, int]
) -> Array:
    """The weight in steps of its outputs' scales above their zeros, of their type."""
    q = np.empty(weight.shape, zeros.dtype)
    by_output = np.moveaxis(q, axis, 0)
    for at, piece in _pieces(weight, axis):
        shape = (-1, *(1,) * (piece.ndim - 1))
        steps = np.rint(piece / scales[at].reshape(shape)) + zeros[at].reshape(shape)
        by_output[at] = np.clip(steps, *bounds)
    return q


@dataclass(frozen=True)
class Constant:
    """A constant factor of a node: its floats, and where they are stored."""

    name: str
    shape: tuple[int, ...]
    make: Make
    ref: WeightRef


class Constants:
    """The weights of a graph that may become integers: float matrices and convolution kernels that
    nothing else reads in another role (an embedding that is also the head stays as it is)."""

    def __init__(self, draft: Draft, rewriter: Rewriter, keep: Keep) -> None:
        self._draft, self._rewriter, self._keep = draft, rewriter, keep
        self._tied = _read_otherwise(draft)

    def weight(self, node: Node, index: int = 1) -> Constant | None:
        """The constant input of a product or convolution; None when there is none, or it or the
        node is to be kept."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        found = self.read(node.inputs[index])
        if found is None or _key(self._draft, found.ref) in self._tied:
            return None
        kept = self._keep(node.name, node.outputs[0], found.name, found.ref.name)
        return None if kept else found

    def read(self, value: str) -> Constant | None:
        """The floats that a value always is: an initializer's, cast to float32 or transposed."""
        ref = self._draft.graph.initializers.get(value)
        if ref is not None:
            if ref.dtype not in FLOATS.values():
                return None
            return Constant(value, ref.shape, lambda: self._draft.read(ref), ref)
        node = self._rewriter.made_by(value, "Cast", "Transpose", "Identity")
        inner = self.read(node.inputs[0]) if node else None
        if node is None or inner is None:
            return None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm") or tuple(range(len(inner.shape)))[::-1]
            shape = tuple(inner.shape[axis] for axis in perm)
            return Constant(value, shape, lambda: inner.make().transpose(perm), inner.ref)
        if node.op_type == "Cast" and node.attributes["to"] != _FLOAT32:
            return None
        return Constant(value, inner.shape, inner.make, inner.ref)


def _read_otherwise(draft: Draft) -> set[tuple[object, ...]]:
    """Keys of the weights that something but a product, a convolution or a cast reads."""
    graph, plain = draft.graph, ("MatMul", "Gemm", "Conv", "Cast", "Transpose", "Identity")
    names = {i for n in graph.nodes if n.op_type not in plain for i in n.inputs}
    names |= {output.name for output in graph.outputs}
    return {_key(draft, ref) for name, ref in graph.initializers.items() if name in names}


def _key(draft: Draft, ref: WeightRef) -> tuple[object, ...]:
    """Equal for the same stored bytes; what a draft makes is stored by its own name."""
    return (ref.name,) if ref.name in draft.made else ref.key


class Latest:
    """What was computed last, so that the integers and the scales of a weight, which are written
    one after the other, are computed once and no second weight is held."""

    def __init__(self) -> None:
        self._key: object = None
        self._value: Integers | None = None

    def get(self, key: object, make: Callable[[], Integers]) -> Integers:
        """`make()`, unless it was the last one with that key."""
        if self._value is None or self._key is not key:
            self._value = None
            self._key, self._value = key, make()
        return self._value


class Stored:
    """Integer weights that are being added to a graph, with what makes them."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.made: dict[str, Make] = {}
        self._latest = Latest()

    def add(self, stem: str, dtype: str, shape: tuple[int, ...], make: Make) -> str:
        """The name of a new initializer that `make` gives."""
        name = self.rewriter.fresh(stem)
        self.rewriter.add_initializer(placeholder(name, dtype, shape))
        self.made[name] = make
        return name

    def integers(
        self, weight: Constant, quantise: Callable[[Array], Integers], parts: Sequence[Part]
    ) -> list[str]:
        """The names of a weight's integers, its scales, and its zero points where there are three
        `parts`, which say of which type and shape they are to be."""
        key = object()

        def compute() -> Integers:
            elements = np.asarray(weight.make(), np.float32)
            try:
                return quantise(elements)
            except ValueError as e:
                raise ModelError(
                    f"weight {weight.ref.name!r} cannot be quantised: it holds infinities or NaN"
                ) from e

        def part(index: int, shape: tuple[int, ...]) -> Make:
            return lambda: np.asarray(self._latest.get(key, compute)[index]).reshape(shape)

        return [
            self.add(f"{weight.name}.{what}", dtype, shape, part(index, shape))
            for index, (what, dtype, shape) in enumerate(parts)
        ]
