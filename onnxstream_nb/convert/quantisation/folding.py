"""Where a factor on a layer's inputs can go: into what is constant before it.

The input x (..., K) of some layers may be divided by a factor (K,), if their matrices are
multiplied by it: the product is the same. The division itself is folded into the weight of a norm,
or into the matrix of a layer, from which x comes channel by channel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph import Graph, Node
from ...passes.rewriting import captured
from .matrices import Matrix

Array = np.ndarray[Any, Any]

_NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class Fold:
    """An initializer that a factor divides along one of its axes.

    `heads`: (key/value heads, query heads for each, head size) where the channels of a head are
    read by several, which therefore must have one factor.
    """

    name: str
    axis: int
    heads: tuple[int, int, int] | None = None


def shared(folds: Iterable[Fold], factor: Array) -> Array:
    """The factor (K,) that the folds allow: where heads are shared, their geometric mean."""
    for fold in folds:
        if fold.heads is not None:
            mean = np.exp(np.log(factor).reshape(fold.heads).mean(axis=1, keepdims=True))
            factor = np.broadcast_to(mean, fold.heads).reshape(-1)
    return factor


def folded(fold: Fold, factor: Array) -> Array:
    """What the fold's initializer is multiplied by: one over the factor, once for shared heads."""
    if fold.heads is not None:
        factor = factor.reshape(fold.heads)[:, 0].reshape(-1)
    return 1 / factor


class Folding:
    """Finds the way of a factor through a graph whose matrices are known."""

    def __init__(self, graph: Graph, matrices: Iterable[Matrix]) -> None:
        self._refs = graph.initializers
        self._producers, self._uses = graph.producers(), graph.consumers()
        self._kept = {v.name for v in graph.outputs} | captured(graph)
        self._matrices = {id(m.products[0]): m for m in matrices if m.input}

    def readers(self, value: str) -> list[Matrix] | None:
        """The matrices that multiply a value; None when it is read in another way, too."""
        found = [self._matrices.get(id(node)) for node in self._uses.get(value, ())]
        known = [m for m in found if m is not None and m.input == value]
        return known if known and len(known) == len(found) and value not in self._kept else None

    def into(self, value: str, size: int, readers: Collection[Node]) -> tuple[Fold, ...]:
        """The folds that divide a value (..., size); () when there is no way, among others because
        it has another reader than those."""
        known = {id(node) for node in readers}
        others = [n for n in self._uses.get(value, ()) if id(n) not in known]
        node = self._producers.get(value)
        if node is None or node.domain or others or value in self._kept:
            return ()
        if node.op_type in _NORMS:
            return self._of_norm(node, value, size)
        if node.op_type in ("Mul", "Add"):
            return self._of_elements(node, size)
        if node.op_type == "Attention":
            return self._of_attention(node, value, size)
        return self._of_product(node, size)

    def _vector(self, name: str, size: int) -> tuple[Fold, ...]:
        """The fold into a vector (size,) that is read once."""
        ref = self._refs.get(name)
        alone = len(self._uses.get(name, ())) == 1 and name not in self._kept
        return (Fold(name, 0),) if ref is not None and alone and ref.shape == (size,) else ()

    def _vectors(self, names: Iterable[str], size: int) -> tuple[Fold, ...]:
        """The folds into all of them, or none."""
        found = [self._vector(name, size) for name in names if name]
        return sum(found, ()) if all(found) else ()

    def _of_norm(self, node: Node, value: str, size: int) -> tuple[Fold, ...]:
        if node.outputs[0] != value or node.attributes.get("axis", -1) not in (-1, 2):
            return ()
        return self._vectors(node.inputs[1:], size)

    def _of_elements(self, node: Node, size: int) -> tuple[Fold, ...]:
        first, second = node.inputs
        vectors = self._vector(first, size) or self._vector(second, size)
        if node.op_type == "Mul":
            return vectors or self.into(second, size, [node]) or self.into(first, size, [node])
        other = second if vectors and vectors[0].name == first else first
        further = self.into(other, size, [node]) if vectors else ()
        return (*vectors, *further) if further else ()

    def _of_attention(self, node: Node, value: str, size: int) -> tuple[Fold, ...]:
        """Through the values of an Attention over (batch, T, heads x size of a head)."""
        heads, kv = (int(node.attributes.get(f"{k}_num_heads", 0)) for k in ("q", "kv"))
        if not heads or not kv or node.outputs[0] != value or node.inputs[:2].count(node.inputs[2]):
            return ()
        each = size // heads
        folds = self.into(node.inputs[2], kv * each, [node])
        if any(fold.heads for fold in folds):
            return ()
        return tuple(Fold(f.name, f.axis, (kv, heads // kv, each)) for f in folds)

    def _of_product(self, node: Node, size: int) -> tuple[Fold, ...]:
        matrix = self._matrices.get(id(node))
        if matrix is None or math.prod(matrix.rows) != size * matrix.rows[1]:
            return ()
        own = Fold(matrix.name, 0 if matrix.by_rows else 1)
        biases = node.inputs[2:3]
        further = self._vectors(biases, size)
        return (own, *further) if len(further) == len([b for b in biases if b]) else ()
