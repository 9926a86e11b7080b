"""What a run must hold at once: the bytes of the values alive at each step, and the most of them.

A value is alive from the step that computes it to the last that reads it; the inputs and the
results of a step are alive during it. A value that is a look at another's memory (`op(...,
view=True)`: Reshape, Transpose, Split ...) takes none of its own and keeps the other's: such
operators are run here on arrays that have a shape and strides but no memory. Weights, constants
and the slots of a cache are counted elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from .graph import Graph, Node
from .passes import find_cache
from .passes.facts import Array
from .plan import Plan
from .registry import Operator, lookup
from .shapes import Shapes, itemsize, symbol_of

_FIRST_ADDRESS = 1 << 32
_GAP = 1 << 12


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a value and of all looks at it: `nbytes`, held from step `first` to `last`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Bound:
    """The most bytes of values that are alive at one step, that step, and which they are.

    `working` is the same with the memory that operators need beside their results. `unknown` are
    the values whose size cannot be told: they are not counted, and the bound is a lower one.
    """

    nbytes: int
    working: int
    step: int
    op_type: str
    alive: tuple[Memory, ...]
    unknown: tuple[str, ...]


def activation_bytes(
    graph: Graph,
    sizes: Mapping[str, int],
    constants: Mapping[str, Array],
    slots: Collection[str] = (),
) -> Bound:
    """The bound of a graph whose open sizes are `sizes`: see `symbol_of` for their names.

    `constants` are the elements of small initializers; the values in `slots` are held by a cache.
    """
    lives = Lives(graph, Shapes(graph, sizes, constants, slots), slots)
    alive = lives.totals()
    step = max(range(len(alive)), key=alive.__getitem__, default=0)
    most = max(map(sum, zip(alive, lives.working, strict=True)), default=0)
    held = sorted(lives.at(step), key=lambda m: -m.nbytes)
    op_type = graph.nodes[step].op_type if graph.nodes else ""
    return Bound(alive[step] if alive else 0, most, step, op_type, tuple(held), lives.unknown)


class _Copied(Exception):
    """No view of an array has the shape that was asked for."""


class _Outline(np.ndarray[Any, Any]):
    """An array without memory: operators that are views may look at its shape and strides."""

    def reshape(self, *shape: Any, order: Any = "C", copy: bool | None = None) -> Any:
        """The view of that shape; raises _Copied where there is none."""
        try:
            return super().reshape(*shape, order=order, copy=False)
        except ValueError:
            raise _Copied from None


class Lives:
    """Every piece of memory that the values of a graph take, and when."""

    def __init__(self, graph: Graph, shapes: Shapes, slots: Collection[str] = ()) -> None:
        self._graph, self._shapes, self._slots = graph, shapes, slots
        self._homes: dict[str, int] = {}  # value -> place in memories
        self._outlines: dict[str, _Outline] = {}
        self._next = _FIRST_ADDRESS
        self._unknown: dict[str, None] = {}
        self.memories: list[Memory] = []
        self.working: list[int] = []
        for name, ref in graph.initializers.items():
            if ref.encoding in ("raw", ref.dtype):  # a look at it is one at the provider's bytes
                self._outline(name, ref.shape, itemsize(ref.dtype))
        for name in (v.name for v in graph.inputs if v.name not in graph.initializers):
            self._place(name, 0)
        for step, node in enumerate(graph.nodes):
            self._take(step, node)
        for output in graph.outputs:
            self._touch(output.name, len(graph.nodes) - 1)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The values whose size cannot be told, in the order of the steps."""
        return tuple(self._unknown)

    def at(self, step: int) -> Iterator[Memory]:
        """What is held during a step."""
        return (m for m in self.memories if m.first <= step <= m.last)

    def totals(self) -> list[int]:
        """Bytes held during each step."""
        steps = len(self._graph.nodes)
        change = [0] * (steps + 2)
        for memory in self.memories:
            change[memory.first] += memory.nbytes
            change[memory.last + 1] -= memory.nbytes
        return list(accumulate(change))[:steps]

    def _take(self, step: int, node: Node) -> None:
        for name in node.inputs:
            self._touch(name, step)
        operator = lookup(node.op_type, node.domain, self._graph.opset.get(node.domain, 1))
        views = self._views(node, operator)
        for name in filter(None, node.outputs):
            view, seen = views.get(name), node.inputs[0] if node.inputs else ""
            if view is None or not np.may_share_memory(view, self._outlines[seen]):
                self._place(name, step)
                continue
            self._outlines[name] = view.view(_Outline)
            if seen in self._homes:
                self._homes[name] = self._homes[seen]
        self.working.append(self._working(node, operator))

    def _touch(self, name: str, step: int) -> None:
        if name in self._homes:
            home = self._homes[name]
            self.memories[home] = replace(self.memories[home], last=step)

    def _place(self, name: str, step: int) -> None:
        """Memory of its own for a value that begins to live."""
        if name in self._slots:
            return
        shape, dtype = self._shapes.sizes(name), self._shapes.dtype(name)
        nbytes = self._shapes.nbytes(name)
        if shape is None or dtype is None or nbytes is None:
            self._unknown[name] = None
            return
        self._homes[name] = len(self.memories)
        self.memories.append(Memory(name, dtype, shape, nbytes, step, step))
        self._outline(name, shape, itemsize(dtype))

    def _outline(self, name: str, shape: tuple[int, ...], size: int) -> None:
        class Place:
            __array_interface__ = {
                "version": 3, "shape": shape, "typestr": f"|V{size}", "data": (self._next, False)
            }  # fmt: skip

        self._outlines[name] = np.asarray(Place()).view(_Outline)
        self._next += math.prod(shape) * size + _GAP

    def _views(self, node: Node, operator: Operator | None) -> Mapping[str, Any]:
        """What an operator of views makes of its first input; nothing when it must copy."""
        if operator is None or not operator.view or not operator.attributes >= set(node.attributes):
            return {}
        source, others = self._outlines.get(node.inputs[0]), node.inputs[1:]
        arguments = [self._shapes.constant(name) if name else None for name in others]
        unknown = any(a is None and name for a, name in zip(arguments, others, strict=True))
        if source is None or unknown or any(self._shapes.sizes(o) is None for o in node.outputs):
            return {}
        attributes = dict(node.attributes)
        if operator.wants_outputs:
            attributes["n_outputs"] = len(node.outputs)
        try:
            result = operator.function(source, *arguments, **attributes)
        except _Copied:
            return {}
        results = result if isinstance(result, (tuple, list)) else (result,)
        return dict(zip(node.outputs, results, strict=False))

    def _working(self, node: Node, operator: Operator | None) -> int:
        if operator is None or operator.working is None:
            return 0
        shapes = [self._shapes.sizes(name) if name else None for name in node.inputs]
        known = all(s is not None for s, name in zip(shapes, node.inputs, strict=True) if name)
        return operator.working(*shapes) if known else 0


# -- language models


def cache_slots(graph: Graph) -> frozenset[str]:
    """The values that a cache holds: pasts, and the presents that Attention writes in place."""
    readers = graph.consumers()
    names: set[str] = set()
    for pair in find_cache(graph):
        names.add(pair.past_input)
        if any(node.op_type == "Attention" for node in readers.get(pair.past_input, ())):
            names.add(pair.present_output)
    return frozenset(names)


def sizes_for_tokens(graph: Graph, tokens: int, past: int = 0) -> dict[str, int]:
    """A number for every open size of the inputs: one sequence of `tokens` behind `past` others.

    The first axis counts sequences, of which there is one, but for inputs that have no other open
    size and no more than two axes: rows, of which there are `tokens`. Any other size is `tokens`.
    """
    pasts = {pair.past_input for pair in find_cache(graph)}
    sizes: dict[str, int] = {}
    for value in graph.inputs:
        named = [symbol_of(value, axis) for axis in range(len(value.shape or ()))]
        rows = len(named) <= 2 and not any(named[1:]) and value.name != "logit_rows"
        for axis, name in enumerate(named):
            if name is not None:
                size = past if value.name in pasts else tokens
                size += past if value.name == "attention_mask" else 0
                sizes.setdefault(name, 1 if axis == 0 and not rows else size)
    return sizes


def token_bound(graph: Graph, constants: Mapping[str, Array], tokens: int, past: int = 0) -> Bound:
    """The bound of one pass over `tokens` behind `past` others, the cache not counted."""
    sizes = sizes_for_tokens(graph, tokens, past)
    return activation_bytes(graph, sizes, constants, cache_slots(graph))


def bound_for_tokens(plan: Plan, tokens: int, past: int = 0) -> int | None:
    """Bytes that a pass over `tokens` behind `past` others holds at the most, the working memory of
    its operators included and the cache not; None when the size of a value cannot be told."""
    bound = token_bound(plan.graph, plan.constants, tokens, past)
    return None if bound.unknown else bound.working
