"""Where a layer's keys or values lie on a GPU: a slot of fixed place, filled as it is used.

Dims: KV key/value heads, P positions there is room for, D their size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kvslot import KVSlot, Slot
from .board import Board
from .device import Array, DeviceMemoryError


class Position:
    """A place in the GPU's memory that holds how many positions count: kernels read it there, so
    that what was captured goes on as it grows."""

    def __init__(self, board: Board) -> None:
        self._board, self._memory = board, board.hold(8)
        self._value: int | None = None

    def set(self, value: int) -> int:
        """Its address, with `value` there."""
        if value != self._value:
            self._board.upload(self._memory.address, np.array([value], np.int64))
            self._value = value
        return self._memory.address


class DeviceSlot(Slot):
    """Keys or values as float16 (KV, P, D) at `address`; `past` is where kernels find its length.

    As an array it is (1, KV, length, D) of `dtype`, as every slot.
    """

    def __init__(self, like: Slot, board: Board, position: Position) -> None:
        super().__init__(like.kind, like.heads, like.size, like.dtype, "f16", like.capacity)
        self.columns = self.size
        self.room_bytes = 2 * self.heads * self.capacity * self.size
        self.board, self._position = board, position
        self._memory = board.hold(self.room_bytes)
        self.address = self._memory.address

    def past(self) -> int:
        """The address of its length, an int64."""
        return self._position.set(self.length)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.board.download(self.address, self.room_bytes).view(np.float16)
        found = found.reshape(1, self.heads, self.capacity, self.size)[:, :, : self.length]
        return found.astype(dtype or self.dtype)

    def write(self, rows: Array) -> None:
        """Put rows (1, KV, T, D) behind what counts: what the CPU computed in the GPU's place."""
        tokens = rows.shape[2]
        self.reserve(self.length + tokens)
        with np.errstate(over="ignore"):
            halves = np.ascontiguousarray(rows[0], np.float16)
        for head in range(self.heads):
            at = 2 * (head * self.capacity + self.length) * self.size
            self.board.upload(self.address + at, halves[head])


class DeviceSlots:
    """Makes the slots of one sequence: on the GPU where its kernels can read them."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._position: Position | None = None

    def __call__(self, slot: Slot) -> KVSlot | DeviceSlot:
        if slot.quantised or slot.size % 16:
            return slot.in_memory()
        try:
            self._position = self._position or Position(self._board)
            return DeviceSlot(slot, self._board, self._position)
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error} for the keys and values of {slot.capacity} positions: a smaller "
                "--context takes less, and without --cuda all the CPU's memory has them"
            ) from error
