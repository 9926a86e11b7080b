"""Slots on disk beside the same in memory, for tests that hold one against the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onnxstream_nb.kernels.attention import attention_24
from onnxstream_nb.kvslot import KVSlot, Slot
from onnxstream_nb.spill import SpilledSlot
from onnxstream_nb.spill_file import SpillFile

Array = np.ndarray[Any, Any]


def slots_on_disk(
    folder: Path, heads: int, sizes: tuple[int, int], encoding: str = "f16", positions: int = 1000
) -> tuple[SpilledSlot, SpilledSlot]:
    """Keys and values of these sizes, in a file of their own."""
    kinds = zip(("key", "value"), sizes, strict=True)
    keys, values = (Slot(kind, heads, size, None, encoding, positions) for kind, size in kinds)
    file = SpillFile(folder, keys.room_bytes + values.room_bytes)
    return SpilledSlot(file, 0, keys), SpilledSlot(file, keys.room_bytes, values)


def slots_in_memory(
    heads: int, sizes: tuple[int, int], encoding: str = "f16", positions: int = 1000
) -> tuple[KVSlot, KVSlot]:
    kinds = zip(("key", "value"), sizes, strict=True)
    keys, values = (KVSlot(kind, heads, size, None, encoding, positions) for kind, size in kinds)
    return keys, values


class Twins:
    """A pair of slots in memory and one on disk that are given the same."""

    def __init__(
        self, folder: Path, heads: int, group: int, sizes: tuple[int, int], encoding: str = "f16",
        positions: int = 1000, seed: int = 0,
    ) -> None:  # fmt: skip
        self.heads, self.group, self.sizes = heads, group, sizes
        self.in_memory = slots_in_memory(heads, sizes, encoding, positions)
        self.on_disk = slots_on_disk(folder, heads, sizes, encoding, positions)
        self._rng = np.random.default_rng(seed)

    @property
    def length(self) -> int:
        return self.on_disk[0].length

    def rewind(self, length: int) -> None:
        for slot in (*self.in_memory, *self.on_disk):
            slot.length = length

    def step(
        self, queries: int, new: int | None = None, mask: Array | None = None, **attributes: Any
    ) -> Array:
        """Attention of `queries` over what is there and `new` positions more (as many by default):
        equal to the last bit, and so is what is stored. Returns the result."""
        new = queries if new is None else new
        q = self._normal(self.heads * self.group, queries, self.sizes[0])
        k, v = (self._normal(self.heads, new, size) for size in self.sizes)
        attributes = {"is_causal": int(mask is None), "n_outputs": 3} | attributes
        wanted, got = (
            attention_24(q, k, v, mask, *slots, **attributes)
            for slots in (self.in_memory, self.on_disk)
        )
        np.testing.assert_array_equal(got[0], wanted[0])
        assert np.isfinite(got[0]).all()
        self.rewind(self.length + new)
        for mine, present in zip(self.on_disk, got[1:3], strict=True):
            assert present.shape == mine.shape and present.file is mine.file
        return np.asarray(got[0])

    def assert_same_contents(self) -> None:
        for memory, disk in zip(self.in_memory, self.on_disk, strict=True):
            np.testing.assert_array_equal(np.asarray(disk), np.asarray(memory))

    def _normal(self, *shape: int) -> Array:
        return self._rng.standard_normal((1, *shape), np.float32)
