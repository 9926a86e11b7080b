"""The whole model on a GPU: what of it lies there, and how it gets there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..graph import WeightRef
from ..plan import Form, Plan
from ..registry import internal
from ..weights import DiskProvider, WeightsProvider, numpy_dtype
from .board import Board
from .device import ALIGNMENT, Array, Device, DeviceError, DeviceMemoryError
from .slots import DeviceSlots

FLOATS = ("float32", "float16", "bfloat16")


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
        matrices: int = sum(internal("DeviceMatrixBytes")(ref) for ref in whole.values())
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
            flat = kind != "matrices" or len(ref.shape) == 2  # products with a stack are the CPU's
            if operator.device != "cuda" or ref.dtype not in FLOATS or not flat:
                refused.add(ref.matrix)
            else:
                found[kind][ref.matrix] = ref
    initializers = plan.graph.initializers
    refused.update(
        initializers[v.name].matrix for v in plan.graph.outputs if v.name in initializers
    )
    for refs in found.values():
        for matrix in refused & refs.keys():
            del refs[matrix]
    return Placement(**found)


def _as_matrix(table: WeightRef) -> WeightRef:
    """A table (V, K) as the matrix (K, V) whose columns are its rows."""
    return replace(table, shape=table.shape[::-1], transposed=not table.transposed)


REMEDY = (
    "the whole model lies there: run again without --cuda, or with --cuda auto, where the CPU goes "
    "on if the GPU fails"
)


class Alone:
    """A device for whose work nobody can stand in: what it has computed is nowhere else. Its errors
    say what to do; a lack of memory is first of all for whoever asked for it."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        return partial(self._call, name, found) if callable(found) else found

    def _call(self, name: str, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except DeviceError as error:
            if isinstance(error, DeviceMemoryError) and name in ("allocate", "pinned"):
                raise
            raise type(error)(f"{error}; {REMEDY}") from error


class WholeProvider:
    """Gives what operators on the GPU take of a placement; all else comes from `host`.

    Each weight is read from its file once. Raises DeviceError when the device fails, also of memory
    that it said it had.
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
        self.host, self._device = host, device
        self.board = Board(Alone(device), work, tell)
        self._tell, self.bytes_in_use = tell, 0
        self._disk = DiskProvider()
        self._placed: dict[Any, Any] = {}
        self._announced: Sequence[WeightRef] = ()
        self._others: list[WeightRef] = []
        try:
            self._size = placement.nbytes
            self._arena = self.board.hold(self._size)  # one, for a driver rounds each of many up
            self._next = self._arena.address
            self._place_all(placement, progress)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error}, while the model was copied there; {REMEDY}"
            ) from error

    def _place_all(
        self, placement: Placement, progress: Callable[[str, float | None], None] | None
    ) -> None:
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
                    progress(f"copying weights to {self.board.device.name}", done / whole)

    def _hold(self, array: Array) -> int:
        """The address of a copy that stays, behind the others."""
        address = self._next
        self._next += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        assert self._next <= self._arena.address + self._size, "weights are what they said to be"
        self.board.upload(address, array)
        self.board.synchronize()  # the array is not kept
        self.bytes_in_use += array.nbytes
        return address

    def _matrix(self, ref: WeightRef) -> Any:
        weight = self._disk.get(ref)
        return internal("DeviceMatrix")(
            ref, weight, None, lambda: self._disk.get(ref), self._hold, self.board
        )

    def _table(self, ref: WeightRef) -> Any:
        matrix = self._placed.get(_as_matrix(ref).matrix)
        return internal("DeviceLookup")(
            ref, matrix or self._matrix(_as_matrix(ref)), lambda: self._disk.get(ref),
            numpy_dtype(ref.dtype),
        )  # fmt: skip

    def _vector(self, ref: WeightRef) -> Any:
        elements = np.ascontiguousarray(internal("Decode")(self._disk.get(ref)), np.float32)
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
        """Let go of everything. What the device says to that takes nobody's results away."""
        getattr(self.host, "close", lambda: None)()
        self._disk.close()
        self._placed.clear()
        self.board.close()
        try:
            self._device.close()
        except DeviceError as error:
            self._tell(f"{error}, when it was closed")
