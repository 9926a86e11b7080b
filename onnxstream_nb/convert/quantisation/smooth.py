"""Outliers of activations moved into weights, before both become 8-bit integers.

After Xiao et al. 2022, "SmoothQuant" (arXiv 2211.10438): a few channels of a language model's
activations are a hundred times larger than the others, and take all steps of a scale for
themselves. So channels are divided by s = sqrt(max |x| / max |w|), by what comes before them, and
the matrices that multiply them are multiplied by it.

Dims: an input x (..., K) of matrices (N, K), s (K,).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...progress import Report
from ..draft import Draft
from . import awq
from .calibration import captured
from .folding import Fold, Folding, shared
from .matrices import Matrix, find, read_rows

Array = np.ndarray[Any, Any]

_LEAST = 1e-5  # of the largest channel: what is hardly ever used is not made large


def smoothed(draft: Draft, feeds: Iterable[Mapping[str, Array]], report: Report) -> Draft:
    """The same function in floats, with activations whose channels are nearer to each other,
    wherever the factor can go into what is constant before them."""
    ways = _ways(draft)
    largest: dict[str, Array] = {}
    for run, arrays in enumerate(captured(draft, ways, feeds), 1):
        report(f"looking for outliers, run {run}", None)
        for name, x in arrays.items():
            most = np.abs(x.reshape(-1, x.shape[-1])).max(axis=0, initial=0)
            largest[name] = np.maximum(largest.get(name, 0), most)
    found: dict[str, awq.Scaling] = {}
    for name, x in largest.items():
        readers, folds = ways[name]
        factor = shared(folds, _factor(x, [read_rows(draft, matrix) for matrix in readers]))
        scaling = awq.Scaling(factor, folds, tuple(readers), np.ones(len(factor)))
        found.update((matrix.name, scaling) for matrix in readers)
    return awq.fold(draft, found)


def _ways(draft: Draft) -> dict[str, tuple[Sequence[Matrix], tuple[Fold, ...]]]:
    """The values that can be divided, the matrices that read them, and where the factor goes."""
    matrices = find(draft)
    folding = Folding(draft.graph, matrices)
    ways: dict[str, tuple[Sequence[Matrix], tuple[Fold, ...]]] = {}
    for value in dict.fromkeys(m.input for m in matrices if m.input):
        readers = folding.readers(value)
        if readers:
            nodes = [matrix.products[0] for matrix in readers]
            folds = folding.into(value, readers[0].rows[1], nodes)
            if folds:
                ways[value] = readers, folds
    return ways


def _factor(largest: Array, matrices: Iterable[Array]) -> Array:
    """s (K,), of which the geometric mean is one."""
    weights = np.max([np.abs(rows).max(axis=0) for rows in matrices], axis=0).astype(np.float64)
    x, w = (np.maximum(v, _LEAST * (v.max() or 1.0)) for v in (largest.astype(np.float64), weights))
    factor: Array = np.sqrt(x / w)
    factor /= np.exp(np.log(factor).mean())
    return factor
