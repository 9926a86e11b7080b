"""The whole model on a GPU: what of it lies there, and how it gets there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..graph import WeightRef
from ..plan import Form, Plan
from ..registry import lookup
from ..weights import DiskProvider, WeightsProvider, numpy_dtype
from .board import Board
from .device import ALIGNMENT, Array, Device
from .slots import DeviceSlots

FLOATS = ("float32", "float16", "bfloat16")


def _service(name: str) -> Callable[..., Any]:
    found = lookup(name, "onnxstream_nb", 1)
    assert found is not None, name
    return found.function


@dataclass(frozen=True)
class Placement:
    """The weights that operators on the GPU read, by how they do: as matrices (K, N), as tables of
    which rows are looked up, or element by element."""

    matrices: Mapping[Any, WeightRef]
    tables: Mapping[Any, WeightRef]
    vectors: Mapping[Any, WeightRef]

    @property
    def refs(self) -> list[WeightRef]:
        """All of them."""
        return [*self.matrices.values(), *self.tables.values(), *self.vectors.values()]

    @property
    def nbytes(self) -> int:
        """The memory that they take; a table that is also a matrix lies there once."""
        whole = {_as_matrix(ref).matrix: _as_matrix(ref) for ref in self.tables.values()}
        whole.update(self.matrices)
        matrices: int = sum(_service("DeviceMatrixBytes")(ref) for ref in whole.values())
        vectors = sum(4 * int(np.prod(ref.shape)) for ref in self.vectors.values())
        return matrices + vectors + 2 * ALIGNMENT * (len(whole) + len(self.vectors))


def placement_of(plan: Plan) -> Placement:
    """What of a plan for a GPU lies there: what nobody but its operators reads as it is stored."""
    found: dict[str, dict[Any, WeightRef]] = {"matrices": {}, "tables": {}, "vectors": {}}
    refused = set()
    for step in plan.steps:
        for i, (name, form) in enumerate(step.inputs):
            ref = plan.graph.initializers.get(name)
            if ref is None or form is Form.ARRAY:
                continue
            operator = step.operator
            kind = (
                "matrices" if i in operator.packs
                else "tables" if i in operator.lookups and len(ref.shape) == 2
                else "vectors"
            )  # fmt: skip
            if operator.device != "cuda" or ref.dtype not in FLOATS:
                refused.add(ref.matrix)
            else:
                found[kind][ref.matrix] = ref
    for refs in found.values():
        for matrix in refused & refs.keys():
            del refs[matrix]
    return Placement(**found)


def _as_matrix(table: WeightRef) -> WeightRef:
    """A table (V, K) as the matrix (K, V) whose columns are its rows."""
    return replace(table, shape=table.shape[::-1], transposed=not table.transposed)


class WholeProvider:
    """Gives what operators on the GPU take of a placement; all else comes from `host`.

    Each weight is read from its file once. Raises DeviceMemoryError when one finds no room.
    """

    def __init__(
        self,
        host: WeightsProvider,
        device: Device,
        placement: Placement,
        work: int,
        tell: Callable[[str], None],
        progress: Callable[[str, float | None], None] | None = None,
    ) -> None:
        self.host, self.board = host, Board(device, work, tell)
        self.bytes_in_use = 0
        self._disk = DiskProvider()
        self._placed: dict[Any, Any] = {}
        self._memory: list[Any] = []
        self._announced: Sequence[WeightRef] = ()
        self._others: list[WeightRef] = []
        whole, done = sum(ref.nbytes for ref in placement.refs) or 1, 0
        kinds = (
            (placement.matrices, self._matrix), (placement.tables, self._table),
            (placement.vectors, self._vector),
        )  # fmt: skip
        for refs, place in kinds:
            for matrix, ref in refs.items():
                found = place(ref)
                if found is not None:
                    self._placed[matrix] = found
                done += ref.nbytes
                if progress is not None:
                    progress(f"copying weights to {device.name}", done / whole)

    def _hold(self, array: Array) -> int:
        """The address of a copy that stays."""
        memory = self.board.hold(array.nbytes)
        self._memory.append(memory)
        self.board.upload(memory.address, array)
        self.board.synchronize()  # the array is not kept
        self.bytes_in_use += array.nbytes
        return memory.address

    def _matrix(self, ref: WeightRef) -> Any:
        weight = self._disk.get(ref)
        return _service("DeviceMatrix")(
            ref, weight, None, lambda: self._disk.get(ref), self._hold, self.board
        )

    def _table(self, ref: WeightRef) -> Any:
        matrix = self._placed.get(_as_matrix(ref).matrix)
        return _service("DeviceLookup")(
            ref, matrix or self._matrix(_as_matrix(ref)), lambda: self._disk.get(ref),
            numpy_dtype(ref.dtype),
        )  # fmt: skip

    def _vector(self, ref: WeightRef) -> Any:
        elements = np.ascontiguousarray(_service("Decode")(self._disk.get(ref)), np.float32)
        return self.board.array(ref.shape, numpy_dtype(ref.dtype), self._hold(elements))

    def slots(self) -> DeviceSlots:
        """What makes the slots of a sequence's cache."""
        return DeviceSlots(self.board)

    def get(self, ref: WeightRef) -> Any:
        placed = self._placed.get(ref.matrix)
        return self.host.get(ref) if placed is None else placed

    def stop_on(self, stop: threading.Event | None) -> None:
        """What of the host's waits for the disk may be given up when this is set."""
        getattr(self.host, "stop_on", lambda stop: None)(stop)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """A pass begins; only what is not on the device has to be read."""
        self.board.begin()
        if refs is not self._announced:  # a session announces the same ones every time
            self._announced = refs
            self._others = [ref for ref in refs if ref.matrix not in self._placed]
        self.host.prefetch(self._others)

    def release(self, ref: WeightRef) -> None:
        if ref.matrix not in self._placed:
            self.host.release(ref)

    def close(self) -> None:
        getattr(self.host, "close", lambda: None)()
        self._disk.close()
        self._placed.clear()
        self.board.close()
        self.board.device.close()
