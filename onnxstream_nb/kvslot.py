"""Where one layer's keys or values lie: a slot in memory, of a fixed place, filled as it is used.

Dims: KV key/value heads, D their size, positions along the sequence. Batch size is one.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .errors import MemoryBudgetError, UsageError

BLOCK = 32  # positions that are stored together
ROOM = 1 << 16  # positions of a slot of which nobody says how many it is for

Array = np.ndarray[Any, Any]


def capacity_for(positions: int) -> int:
    """Room for so many positions in whole blocks; heads whose distance is a round number would
    meet in the same sets of the processor's caches, so it is never a multiple of 256."""
    blocks = -(-positions // BLOCK)
    return BLOCK * (blocks + (blocks % 8 == 0))


def zeroed(nbytes: int) -> Array:
    """Zeros that take up address space at once and memory where they are touched, flat uint8."""
    flags = {}
    if hasattr(mmap, "MAP_PRIVATE"):
        reserve = getattr(mmap, "MAP_NORESERVE", 0)
        flags["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve
    try:
        memory = mmap.mmap(-1, max(1, nbytes), **flags)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryBudgetError(
            f"the system refuses {nbytes} bytes of address space for keys and values ({error}): "
            "a smaller --context takes less"
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a system without large pages has none to refuse
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


@dataclass(slots=True)
class Fill:
    """How many positions count, and the most that ever did: of a slot, or of several that are
    filled together."""

    length: int = 0
    most: int = 0


class Room:
    """Room for `capacity` positions, `room_bytes` large, of which the first `length` count.

    A run writes behind them and leaves `length` alone: what it wrote counts when the caller says
    so, who may also set it back. It does so for all slots that share a `fill`.
    """

    on_disk = False

    def __init__(self, capacity: int) -> None:
        self.capacity, self.fill = capacity, Fill()
        self.room_bytes = 0

    @property
    def length(self) -> int:
        """Positions that count."""
        return self.fill.length

    @length.setter
    def length(self, length: int) -> None:
        self.fill.length, self.fill.most = length, max(length, self.fill.most)

    @property
    def fills(self) -> tuple[Fill, ...]:
        """Its own: of a group, those of its slots."""
        return (self.fill,)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now: of the most positions that it ever held, in whole blocks."""
        blocks = -(-self.fill.most // BLOCK)
        return self.room_bytes // max(1, self.capacity) * min(self.capacity, BLOCK * blocks)

    def reserve(self, length: int) -> None:
        """UsageError when there is no room for `length` positions."""
        if length > self.capacity:
            raise UsageError(
                f"{length} positions do not fit a cache that was made for {self.capacity}"
            )


class Slot(Room):
    """One layer's keys or values, as Attention's kernels want them.

    Keys are stored in blocks of 32 positions, (KV, capacity / 32, D, 32), values in panels of 32
    columns, (KV, D / 32, capacity, 32), D padded. `encoding` "f16" keeps them as float16; "q8" as
    int8 with a float32 scale for each position and head behind them, (KV, capacity): a little over
    half the bytes, each element off by at most 1/254 of the largest of its position and head.
    As an array it is of `dtype`, the graph's. `tokens` says of how many sequences a run has the
    next token, `places` are (length, capacity) of each: see SlotGroup.
    """

    tokens = 1

    def __init__(
        self,
        kind: str,
        heads: int,
        size: int,
        dtype: np.dtype[Any] | None = None,
        encoding: str = "f16",
        positions: int = ROOM,
    ) -> None:
        super().__init__(capacity_for(positions))
        self.kind, self.heads, self.size = kind, heads, size
        self.dtype = np.dtype(np.float32) if dtype is None else dtype
        self.encoding, self.quantised = encoding, encoding == "q8"
        self.padded = -(-size // 32) * 32
        self.columns = size if kind == "key" else self.padded  # that are stored
        self.room_bytes = heads * self.capacity * self.position_bytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of past and present: (1, KV, length, D)."""
        return (1, self.heads, self.length, self.size)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(length, capacity)."""
        return ((self.length, self.capacity),)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one head."""
        return self.columns + 4 if self.quantised else 2 * self.columns

    def advanced(self, length: int) -> Self:
        """The same memory with `length` positions: a present beside its past."""
        present = copy.copy(self)
        present.fill = Fill(length, max(length, self.fill.most))
        return present

    def in_memory(self) -> KVSlot:
        """Such a slot in memory."""
        return KVSlot(self.kind, self.heads, self.size, self.dtype, self.encoding, self.capacity)

    def runs(self, head: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of each contiguous run of a head's positions, from a block's beginning
        to another's: of the elements, then of the scales."""
        width, positions = 1 if self.quantised else 2, stop - start
        if self.kind == "key":
            row = self.columns * width
            yield (head * self.capacity + start) * row, positions * row
        else:
            panels, row = self.columns // 32, 32 * width
            for panel in range(head * panels, (head + 1) * panels):
                yield (panel * self.capacity + start) * row, positions * row
        if self.quantised:
            scales = self.heads * self.capacity * self.columns
            yield scales + 4 * (head * self.capacity + start), 4 * positions


class KVSlot(Slot):
    """A slot in memory, which is taken as positions are written, or in `memory` that is given.

    `array` and `scales` have the shapes that Slot describes; their addresses never change.
    """

    def __init__(
        self,
        kind: str,
        heads: int,
        size: int,
        dtype: np.dtype[Any] | None = None,
        encoding: str = "f16",
        positions: int = ROOM,
        memory: Array | None = None,
    ) -> None:
        super().__init__(kind, heads, size, dtype, encoding, positions)
        self.memory = (zeroed(self.room_bytes) if memory is None else memory)[: self.room_bytes]
        elements = heads * self.capacity * self.columns
        shape = (heads, self.capacity // 32, size, 32)
        if kind != "key":
            shape = (heads, self.padded // 32, self.capacity, 32)
        width, kept = (1, np.int8) if self.quantised else (2, np.float16)
        self.array: Array = self.memory[: width * elements].view(kept).reshape(shape)
        self.scales: Array = self.memory[width * elements :].view(np.float32)
        self.scales = self.scales.reshape(heads, self.capacity * self.quantised)
        self.address, self.scales_address = self.array.ctypes.data, self.scales.ctypes.data

    def write(self, rows: Array) -> None:
        """Put rows (1, KV, T, D) behind what counts, in float16: keys or values of a layer whose
        others lie elsewhere (gpu/slots.py)."""
        at = np.arange(self.length, self.length + rows.shape[2])
        self.reserve(self.length + len(at))
        padded = np.pad(rows[0], ((0, 0), (0, 0), (0, self.columns - self.size)))
        with np.errstate(over="ignore"):
            if self.kind == "key":
                self.array[:, at // BLOCK, :, at % BLOCK] = padded.transpose(1, 0, 2)
            else:
                panels = padded.reshape(self.heads, len(at), self.columns // BLOCK, BLOCK)
                self.array[:, :, at] = panels.transpose(0, 2, 1, 3)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        order = (0, 1, 3, 2) if self.kind == "key" else (0, 2, 1, 3)
        stored = self.array
        blocks = -(-self.length // BLOCK)
        stored = stored[:, :blocks] if self.kind == "key" else stored[:, :, : BLOCK * blocks]
        filled = stored.transpose(order).reshape(self.heads, BLOCK * blocks, self.columns)
        filled = filled[None, :, : self.length, : self.size]
        if self.quantised:
            filled = filled * self.scales[None, :, : self.length, None]
        return filled.astype(dtype or self.dtype)


class SlotGroup:
    """The slots of several sequences whose tokens lie side by side in one run, fed as one past.

    `parts` are (slot, how many of the run's tokens are its own), in order. Only Attention without
    a mask understands it.
    """

    on_disk = False

    def __init__(self, parts: Sequence[tuple[Slot, int]]) -> None:
        self.parts = tuple(parts)

    @property
    def tokens(self) -> int:
        """How many tokens the run has, if each sequence has one; 0 if not."""
        return len(self.parts) if all(count == 1 for _, count in self.parts) else 0

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(length, capacity) of each sequence."""
        return tuple((slot.length, slot.capacity) for slot, _ in self.parts)

    @property
    def fills(self) -> tuple[Fill, ...]:
        """Those of its slots."""
        return tuple(slot.fill for slot, _ in self.parts)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all pasts together: (1, KV, positions, D)."""
        first = self.parts[0][0]
        return (1, first.heads, sum(slot.length for slot, _ in self.parts), first.size)

    def reserve(self, length: int) -> None:
        """UsageError when a slot has no room for `length` positions."""
        for slot, _ in self.parts:
            slot.reserve(length)

    def advanced(self, length: int) -> SlotGroup:
        """The same memory: what a present is not asked for."""
        return self


class ArraySlot(Room):
    """A past input of a graph that was not rewritten: an array that fills along one axis."""

    def __init__(
        self, shape: Sequence[int], axis: int, dtype: np.dtype[Any], positions: int = ROOM
    ) -> None:
        super().__init__(positions)
        self.axis, self._shape, self._dtype = axis, list(shape), dtype
        whole = [positions if i == axis else n for i, n in enumerate(shape)]
        self.room_bytes = dtype.itemsize * int(np.prod(whole, dtype=np.int64))
        self.array: Array = zeroed(self.room_bytes).view(dtype).reshape(whole)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of past and present, `length` along the axis that grows."""
        return tuple(self.length if i == self.axis else n for i, n in enumerate(self._shape))

    def append(self, new: Array) -> ArraySlot:
        """Write `new` behind what is there."""
        at = self.length
        self.reserve(at + new.shape[self.axis])
        self.length = at + new.shape[self.axis]
        self._view(at, self.length)[...] = new
        return self

    def _view(self, start: int, stop: int) -> Array:
        where = [slice(None)] * len(self._shape)
        where[self.axis] = slice(start, stop)
        return self.array[tuple(where)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self._view(0, self.length).astype(dtype or self._dtype, copy=bool(copy))
