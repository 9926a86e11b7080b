"""Weights as 8-bit integers, as OnnxStream's exporter makes them (its onnx2txt.ipynb).

An element is (q - zero_point) * scale. The range is the weight's own without the 0.1 % at each end
(what lies outside is clipped), and holds zero; q is cut off rather than rounded, so an element is
off by up to one step. Diffusion models, which it was made for, bear that. Language models speak
nonsense then: their matrices get the same form, rounded to nearest, and nothing is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ...graph import Graph, WeightRef
from ...passes import find_cache
from ...progress import Report
from ..draft import Draft, Make

Array = np.ndarray[Any, Any]

SHARE = 0.001  # of the elements, clipped at each end
_FLOAT_INPUTS = {"Conv": {2}, "InstanceNormalization": {1, 2}, "Resize": {2}}
"""Operators -> their inputs that stay floats: Conv's bias, InstanceNormalization's, scales."""


class Uint8(NamedTuple):
    """Integers of a weight's shape, and what they stand for: (q - zero_point) * scale."""

    integers: Array
    scale: float
    zero_point: int

    @property
    def values(self) -> Array:
        """The elements that the integers stand for, as float32."""
        return (self.integers.astype(np.float32) - self.zero_point) * np.float32(self.scale)


def exported(weight: Array) -> Uint8 | None:
    """The integers of a float32 weight; None where the exporter leaves it as floats: it has no
    element or no finite one, or its range without the clipped ends is empty (all elements equal).
    """
    if weight.size == 1 and np.isfinite(weight).all():
        value = float(weight.reshape(-1)[0])
        return Uint8(np.ones(1, np.uint8), abs(value), 0 if value >= 0 else 2)
    scope = _range(weight)
    if scope is None:
        return None
    left, right = scope
    scale = (right - left) / 255.0
    zero = min(255, int(abs(left) / scale))
    with np.errstate(all="ignore"):  # infinities are clipped, what is no number becomes anything
        q = np.clip(weight / np.float32(scale) + np.float32(zero), 0, 255).astype(np.uint8)
    return Uint8(q, scale, zero)


def nearest(weight: Array) -> Uint8 | None:
    """Integers of the same form over the whole range, with zero in it, rounded to nearest; None
    where `exported` gives none for lack of a range."""
    finite = weight[np.isfinite(weight)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    scale = (high - low) / 255.0
    if not np.float32(scale):
        return None
    zero = round(-low / scale)
    with np.errstate(all="ignore"):
        q = np.clip(np.rint(weight / np.float32(scale)) + np.float32(zero), 0, 255)
        return Uint8(q.astype(np.uint8), scale, zero)


def _range(weight: Array) -> tuple[float, float] | None:
    finite = weight[np.isfinite(weight)]
    n = len(finite)
    if n < 2:
        return None
    ranks = int(n * SHARE), n + int(n * SHARE * -1 - 1)
    finite.partition(ranks)
    left, right = (float(finite[rank]) for rank in ranks)
    if left > 0 and right > 0:
        left = 0.0
    elif left < 0 and right < 0:
        right = 0.0
    return (left, right) if right > left else None


def as_floats(graph: Graph) -> set[str]:
    """The weights that stay floats: those that the exporter does not quantise, by what any of their
    readers does, and in language models all but matrices.

    The exporter rounds the latter too; but rotary frequencies, which it never met, are of any
    size: most of them would become zero, and a position could not be told from the next.
    """
    names = {
        node.inputs[index]
        for node in graph.nodes
        for index in _FLOAT_INPUTS.get(node.op_type, ())
        if not node.domain and index < len(node.inputs)
    }
    is_language_model = bool(find_cache(graph))
    return names | {
        name
        for name, ref in graph.initializers.items()
        if ref.dtype != "float32" or (is_language_model and sum(size > 1 for size in ref.shape) < 2)
    }


def uint8_weights(draft: Draft, report: Report) -> Draft:
    """The draft with every weight that OnnxStream's exporter quantises as an encoding "uint8"; of a
    language model the matrices.

    Scales are found here, so every weight is read once; its elements, as the integers stand for
    them, are made when they are read. `integers` gives the bytes of a weight's file.
    """
    refs, made = dict(draft.graph.initializers), dict[str, Make]()
    quantise = nearest if find_cache(draft.graph) else exported
    kept = as_floats(draft.graph)
    wanted = [name for name in refs if name not in kept]
    for number, name in enumerate(wanted):
        report(f"quantising {name}", number / len(wanted))
        found = quantise(draft.read(refs[name]))
        if found is not None:
            original, ref = refs[name], _uint8_ref(refs[name], found)
            refs[name], made[name] = ref, _maker(draft, original, quantise)
    report("quantised", 1.0)
    return draft.with_(draft.graph.with_(initializers=refs), made)


def _uint8_ref(ref: WeightRef, found: Uint8) -> WeightRef:
    return replace(
        ref, source=b"", offset=0, nbytes=math.prod(ref.shape), encoding="uint8",
        transposed=False, scale=found.scale, zero_point=found.zero_point, parts=(), block=0,
    )  # fmt: skip


def _maker(draft: Draft, original: WeightRef, quantise: Callable[[Array], Uint8 | None]) -> Make:
    def make() -> Array:
        found = quantise(draft.read(original))
        assert found is not None, original.name
        return found.values.reshape(original.shape)

    return make


def integers(draft: Draft, ref: WeightRef) -> Array:
    """The uint8 elements of a weight of encoding "uint8", of its shape."""
    if not ref.scale:
        return np.ones(ref.shape, np.uint8)  # a single zero
    q = np.rint(draft.read(ref).astype(np.float64) / ref.scale) + ref.zero_point
    return np.asarray(np.clip(q, 0, 255).astype(np.uint8))
