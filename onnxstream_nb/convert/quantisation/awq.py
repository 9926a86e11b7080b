"""Activation-aware quantisation: channels that matter are made larger before they are rounded.

After Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978): the columns
of a group's matrices are multiplied by s = mean |x| ** alpha, which what comes before divides by;
alpha is the one of a grid whose outputs on a sample of inputs are nearest to the right ones.
Beyond the paper, scales are searched by the importance of each column, its mean square input.

Dims: a matrix is (N, K), inputs x (T, K), s (K,).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..draft import Draft
from .folding import Fold, Folding, folded, shared
from .integer_forms import values
from .layers import Calibration, Group, Layer, nearest, scaled
from .matrices import Matrix, read_rows

Array = np.ndarray[Any, Any]

ALPHAS = tuple(i / 10 for i in range(11))
SAMPLED = 256  # inputs by which the alphas of a group are compared


@dataclass(frozen=True)
class Scaling:
    """What a group's inputs are divided by: `factor` (K,), folded into `folds`. `readers` are all
    matrices that multiply them, `importance` (K,) the mean squares of what is left."""

    factor: Array
    folds: tuple[Fold, ...]
    readers: tuple[Matrix, ...]
    importance: Array


class _Inputs:
    """What is kept of a group's inputs."""

    def __init__(self, inputs: Iterable[Array], windows: int) -> None:
        self.count, self.absolute, self.squares = 0, np.zeros(1), np.zeros(1)
        sample = []
        for x in inputs:
            self.count += len(x)
            self.absolute = self.absolute + np.abs(x).sum(axis=0, dtype=np.float64)
            self.squares = self.squares + np.square(x).sum(axis=0, dtype=np.float64)
            sample.append(x[:: max(1, len(x) * windows // SAMPLED)].copy())
        self.sample = np.concatenate(sample)

    @property
    def magnitude(self) -> Array:
        """The mean |x| of each channel, (K,)."""
        return np.maximum(self.absolute / self.count, 1e-8)

    @property
    def importance(self) -> Array:
        """The mean square of each channel, (K,), nowhere zero: else its weights were arbitrary."""
        mean = self.squares / self.count
        return np.maximum(mean, 1e-6 * max(float(mean.mean()), 1e-30))


def search(
    calibration: Calibration, matrices: Iterable[Matrix], search: bool, windows: int
) -> dict[str, Scaling]:
    """The scaling of every group, by the name of each of its layers."""
    draft, found = calibration.draft, {}
    folding = Folding(draft.graph, matrices)
    for group in calibration:
        inputs = _Inputs(calibration.inputs(group), windows)
        rows = [read_rows(draft, layer.matrix) for layer in group.layers]
        scaling = _best(group, rows, inputs, folding, search)
        for layer, own in zip(group.layers, rows, strict=True):
            calibration.put(layer, _effective(own, layer, scaling, search))
            found[layer.name] = scaling
    return found


def _best(
    group: Group, rows: Sequence[Array], inputs: _Inputs, folding: Folding, search: bool
) -> Scaling:
    """The scaling with the least error; s is one where it cannot be folded."""
    readers = folding.readers(group.input) or []
    nodes = [m.products[0] for m in readers]
    size = rows[0].shape[1]
    folds = folding.into(group.input, size, nodes) if readers else ()
    best, least = Scaling(np.ones(size), (), (), inputs.importance), np.inf
    for alpha in ALPHAS if folds else ():
        factor = inputs.magnitude**alpha
        factor = shared(folds, factor / np.sqrt(factor.max() * factor.min()))
        tried = Scaling(factor, folds, tuple(readers), inputs.importance / factor**2)
        error = sum(
            _error(own, _effective(own, layer, tried, False), inputs.sample)
            for own, layer in zip(rows, group.layers, strict=True)
        )
        if error < least:
            best, least = tried, error
    return best


def _effective(rows: Array, layer: Layer, scaling: Scaling, search: bool) -> Array:
    """What a matrix (N, K) is to inputs that are not divided, once it is rounded."""
    factor = scaling.factor.astype(np.float32)
    rounded = nearest(rows * factor, scaling.importance, layer.grid, search)
    result: Array = values(rounded, layer.grid.length(rows.shape[1]))
    result /= factor
    return result


def _error(rows: Array, effective: Array, sample: Array) -> float:
    """The squared error of a layer's outputs on a sample of inputs."""
    return float(np.square(sample @ (effective - rows).T, dtype=np.float64).sum())


def fold(draft: Draft, found: Mapping[str, Scaling]) -> Draft:
    """The same function in floats, its matrices multiplied and what comes before them divided."""
    factors: dict[str, dict[int, Array]] = {}

    def multiply(name: str, axis: int, factor: Array) -> None:
        by_axis = factors.setdefault(name, {})
        by_axis[axis] = (by_axis.get(axis, 1) * factor).astype(np.float32)

    for scaling in {id(s): s for s in found.values()}.values():
        for each in scaling.folds:
            multiply(each.name, each.axis, folded(each, scaling.factor))
        for matrix in scaling.readers:
            multiply(matrix.name, int(matrix.by_rows), scaling.factor)
    return scaled(draft, factors)
