"""Weights packed into panels: once, when a model is loaded, and not held beside as they were.

Products with block encodings read panels of 16 rows at the speed of memory (kernels/panels.py); the
file's own rows they read at half of it. What is only looked up by rows stays as it is stored.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from .graph import WeightRef
from .weights import DiskProvider, MmapProvider, Weight, WeightsProvider

CHUNK_BYTES = 4_000_000  # read at a time: what is held twice
ALIGNMENT = 64

Key = tuple[Any, ...]


class Packer(Protocol):
    """What the kernels offer: the size of panels, and filling them."""

    def panel_bytes(self, ref: WeightRef) -> int:
        """Bytes of a panel of 16 rows; 0 when this weight is read as it is stored."""

    def pack(self, ref: WeightRef, rows: np.ndarray[Any, Any], out: int, count: int) -> None:
        """Pack `count` stored rows, flat bytes, into the panels at address `out`."""


def _key(ref: WeightRef) -> Key:
    return (*ref.key, ref.shape, ref.transposed)


def _size(ref: WeightRef, panel_bytes: int) -> int:
    """Bytes of all panels of a weight, up to the next one's alignment."""
    panels = -(-ref.stored_shape[0] // 16)
    return -(-panels * panel_bytes // ALIGNMENT) * ALIGNMENT


class PackedProvider:
    """Packs some weights when it is made; others come from a provider that keeps them in place."""

    in_place = True  # a weight stays where it is from one `get` to the next

    def __init__(
        self,
        others: WeightsProvider,
        refs: Iterable[WeightRef],
        packer: Packer,
        progress: Callable[[str, float | None], None] | None = None,
    ) -> None:
        self.others = others
        self.bytes_read = 0
        self._tables = MmapProvider()  # rows of what is packed as well: an embedding that is tied
        self._weights: dict[Key, Weight] = {}
        self._keys: set[Key] = set()
        wanted = {_key(ref): (ref, packer.panel_bytes(ref)) for ref in refs}
        total = sum(_size(*found) for found in wanted.values())
        memory = _memory(total)
        done, disk = 0, DiskProvider()
        try:
            for key, (ref, panel_bytes) in wanted.items():
                if progress is not None:
                    progress("packing weights", done / total)
                size = _size(ref, panel_bytes)
                self._weights[key] = _packed(ref, panel_bytes, memory[done : done + size])
                self._fill(self._weights[key], disk, packer)
                self._keys.add(ref.key)
                done += size
        finally:
            self.bytes_read = disk.bytes_read
            disk.close()

    def _fill(self, weight: Weight, disk: DiskProvider, packer: Packer) -> None:
        ref, rows = weight.ref, weight.ref.stored_shape[0]
        row_bytes = ref.nbytes // rows
        step = max(1, CHUNK_BYTES // row_bytes // 16) * 16
        for first in range(0, rows, step):
            count = min(step, rows - first)
            stored = disk.read(ref, first * row_bytes, (first + count) * row_bytes)
            packer.pack(ref, stored, weight.address + first // 16 * weight.row_bytes, count)

    def get(self, ref: WeightRef) -> Weight:
        """The panels of a weight that was packed, else what the other provider has."""
        found = self._weights.get(_key(ref))
        if found is not None:
            return found
        return (self._tables if ref.key in self._keys else self.others).get(ref)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """For the other provider: panels are in memory."""
        self._tables.prefetch(())
        self.others.prefetch([r for r in refs if r.key not in self._keys])

    def release(self, ref: WeightRef) -> None:
        """Nothing: all is kept."""

    def close(self) -> None:
        """Let go of the panels and of the files."""
        self._weights.clear()
        self._tables.close()
        getattr(self.others, "close", lambda: None)()


def _memory(size: int) -> np.ndarray[Any, Any]:
    """Zeroed private memory, in large pages where the system has them."""
    if size == 0:
        return np.zeros(0, np.uint8)
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _packed(ref: WeightRef, panel_bytes: int, memory: np.ndarray[Any, Any]) -> Weight:
    weight = Weight(ref, memory)
    weight.packed, weight.row_bytes = True, panel_bytes
    return weight
