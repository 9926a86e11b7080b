"""The layers that calibration looks at, in the graph's order, and what they are given to multiply.

Dims: a layer's matrix is (N, K), its input x (T, K) for each window of the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import ModelError
from ...progress import Report
from ...session import internal
from ...weight import numpy_dtype
from ..draft import Draft, placeholder
from .calibration import Feeds, Walk
from .integer_forms import Grid, Rounded
from .matrices import Matrix

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """A matrix that has one product, and the integers that it is to have."""

    matrix: Matrix
    grid: Grid

    @property
    def name(self) -> str:
        """The matrix's."""
        return self.matrix.name


@dataclass(frozen=True)
class Group:
    """The layers that multiply one value."""

    input: str
    layers: tuple[Layer, ...]


class Calibration:
    """A pass over the calibration text, from one group of layers to the next.

    What a group's layers become is told by `put`: so the inputs of those behind are the ones that
    they will have in the quantised model.
    """

    def __init__(
        self, draft: Draft, layers: Iterable[Layer], feeds: Iterable[Feeds], report: Report
    ) -> None:
        self.draft = draft
        by_input: dict[str, list[Layer]] = {}
        for layer in layers:
            by_input.setdefault(layer.matrix.input, []).append(layer)
        order = [v.name for v in draft.graph.inputs]
        order += [o for node in draft.graph.nodes for o in node.outputs]
        self._groups = [Group(x, tuple(by_input[x])) for x in order if x in by_input]
        self._walk = Walk(draft, feeds, [group.input for group in self._groups])
        self._report = report
        self._put: dict[str, tuple[Matrix, Array]] = {}

    def __iter__(self) -> Iterator[Group]:
        for i, group in enumerate(self._groups):
            self._report(f"calibrating {group.layers[0].name}", i / len(self._groups))
            yield group

    def inputs(self, group: Group) -> Iterator[Array]:
        """What a group is given, (T, K) float32 for each window; to be read to its end, once.

        Raises ModelError when it is not finite.
        """
        for found in self._walk.run_to([group.input], self._changed()):
            x = found[group.input]
            rows = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)
            if not np.isfinite(rows).all():
                raise ModelError(
                    f"{group.input}: the model computes numbers that are not finite on the "
                    "calibration text; its file is damaged, or its numbers overflow"
                )
            yield rows
        ran = self._walk.ran
        self._put = {k: v for k, v in self._put.items() if v[0].products[0].outputs[0] not in ran}

    def put(self, layer: Layer, rows: Array) -> None:
        """From here on a layer's matrix is `rows` (N, K) float32."""
        self._put[layer.name] = layer.matrix, rows

    def _changed(self) -> Draft:
        """The draft with what was put; only what the next piece reads is in memory."""
        made, refs = {}, dict(self.draft.graph.initializers)
        for name, (matrix, rows) in self._put.items():
            refs[name] = placeholder(name, matrix.ref.dtype, matrix.ref.shape)
            made[name] = _laid(matrix, rows)
        return self.draft.with_(self.draft.graph.with_(initializers=refs), made)


def _laid(matrix: Matrix, rows: Array) -> Any:
    kind = numpy_dtype(matrix.ref.dtype)
    return lambda: (rows if matrix.by_rows else rows.T).astype(kind, copy=False)


def nearest(rows: Array, importance: Array | None, grid: Grid, search: bool) -> Rounded:
    """(N, K) float32 rounded to nearest; by `importance` (K,) of its columns where it is known."""
    found = internal("RoundToBlocks")(rows, importance, *how(rows, grid, search))
    return Rounded(found.integers, found.scales, found.zeros)


def how(rows: Array, grid: Grid, search: bool) -> tuple[int, int, int, bool, bool]:
    """How the kernels are to round a matrix (N, K): block, range, search, scales of float16.

    With 8 bits the scale that covers a block's range is as good as the best.
    """
    length, searched = grid.length(rows.shape[1]), search and grid.bits == 4
    return length, grid.low, grid.high, searched, grid.scales == "float16"


def scaled(draft: Draft, factors: Mapping[str, Mapping[int, Array]]) -> Draft:
    """The draft with initializers multiplied: by name, a vector along each axis that is named."""
    made, refs = {}, dict(draft.graph.initializers)
    for name, by_axis in factors.items():
        refs[name] = placeholder(name, refs[name].dtype, refs[name].shape)
        made[name] = _multiplied(draft, name, by_axis)
    return draft.with_(draft.graph.with_(initializers=refs), made)


def _multiplied(draft: Draft, name: str, by_axis: Mapping[int, Array]) -> Any:
    ref = draft.graph.initializers[name]

    def make() -> Array:
        array = draft.read(ref)
        result = array.astype(np.float32)
        for axis, factor in by_axis.items():
            result *= factor.reshape([-1 if i == axis else 1 for i in range(result.ndim)])
        return result.astype(array.dtype, copy=False)

    return make
