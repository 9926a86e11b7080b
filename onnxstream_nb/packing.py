"""Weights packed into panels: once, when a model is loaded, and not held beside as they were.

Products with block encodings read panels of 16 rows at the speed of memory (kernels/panels.py); the
file's own rows they read at half of it. What is only looked up by rows stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from .graph import WeightRef
from .weights import DiskProvider, Weight, WeightsProvider, encoded_bytes

CHUNK_BYTES = 4_000_000  # read at a time: what is held twice
ALIGNMENT = 64


class Packer(Protocol):
    """What the kernels offer: the size of panels, and filling them."""

    def panel_bytes(self, ref: WeightRef) -> int:
        """Bytes of a panel of 16 rows; 0 when this weight is read as it is stored."""

    def memory(self, size: int) -> np.ndarray[Any, Any]:
        """Zeroed memory for panels (size,) uint8."""

    def pack(self, ref: WeightRef, rows: np.ndarray[Any, Any], out: int, count: int) -> None:
        """Pack `count` stored rows, flat bytes, into the panels at address `out`."""

    @property
    def piece(self) -> int:
        """A piece of a part begins with a multiple of so many stored rows."""

    def pack_part(
        self, ref: WeightRef, index: int, piece: Weight, out: int, first: int, count: int
    ) -> None:
        """Pack `count` stored rows of a part, from `first` on, into all panels at `out`."""


def panels_bytes(ref: WeightRef, panel_bytes: int) -> int:
    """Bytes of all panels of a weight, up to the next one's alignment."""
    panels = -(-ref.shape[1] // 16)
    return -(-panels * panel_bytes // ALIGNMENT) * ALIGNMENT


class PackedProvider:
    """Packs some weights when it is made; others come from a provider that keeps them in place."""

    def __init__(
        self,
        others: WeightsProvider,
        refs: Iterable[WeightRef],
        packer: Packer,
        progress: Callable[[str, float | None], None] | None = None,
        *,
        tables: Iterable[WeightRef] = (),
    ) -> None:
        self.others = others
        self._disk = DiskProvider()
        self._announced: Sequence[WeightRef] = ()
        self._left: list[WeightRef] = []
        self._weights: dict[object, Weight] = {}
        wanted = {ref.matrix: (ref, packer.panel_bytes(ref)) for ref in refs}
        keys = {ref.key for ref, _ in wanted.values()}
        self._tables = {ref.matrix for ref in tables if ref.key in keys}
        total = sum(panels_bytes(*found) for found in wanted.values())
        memory, done = packer.memory(total), 0
        for matrix, (ref, panel_bytes) in wanted.items():
            if progress is not None:
                progress("packing weights", done / total)
            size = panels_bytes(ref, panel_bytes)
            self._weights[matrix] = _packed(ref, panel_bytes, memory[done : done + size])
            self._fill(self._weights[matrix], packer)
            done += size

    def _fill(self, weight: Weight, packer: Packer) -> None:
        if weight.ref.parts:
            self._fill_from_parts(weight, packer)
            return
        ref, rows = weight.ref, weight.ref.stored_shape[0]
        row_bytes = ref.nbytes // rows
        step = max(1, CHUNK_BYTES // row_bytes // 16) * 16
        for first in range(0, rows, step):
            count = min(step, rows - first)
            stored = self._disk.read(ref, first * row_bytes, (first + count) * row_bytes)
            packer.pack(ref, stored, weight.address + first // 16 * weight.row_bytes, count)

    def _fill_from_parts(self, weight: Weight, packer: Packer) -> None:
        for index, part in enumerate(weight.ref.parts):
            rows, columns = part.stored_shape
            step = max(1, CHUNK_BYTES * rows // part.nbytes // packer.piece) * packer.piece
            for first in range(0, rows, step):
                count = min(step, rows - first)
                start, stop = (
                    encoded_bytes(replace(part, shape=(n, columns))) for n in (first, first + count)
                )
                shape = (columns, count) if part.transposed else (count, columns)
                piece = Weight(replace(part, shape=shape), self._disk.read(part, start, stop))
                packer.pack_part(weight.ref, index, piece, weight.address, first, count)

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._disk.bytes_read + int(getattr(self.others, "bytes_read", 0))

    def get(self, ref: WeightRef) -> Weight:
        """The panels of a weight that was packed, else what the other provider has.

        Of a table whose bytes are packed as well (an embedding tied to the head) only the rows
        that are looked up are read.
        """
        if ref.matrix in self._weights:
            return self._weights[ref.matrix]
        if ref.matrix in self._tables:
            return self._disk.table(ref)
        return self.others.get(ref)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """For the other provider: panels are in memory."""
        if refs is not self._announced:  # the same for every token: looked through once
            mine = self._tables | self._weights.keys()
            self._announced = refs
            self._left = [r for r in refs if r.matrix not in mine]
        self.others.prefetch(self._left)

    def release(self, ref: WeightRef) -> None:
        """Nothing: all is kept."""

    def close(self) -> None:
        """Let go of the panels and of the files."""
        self._weights.clear()
        self._disk.close()
        getattr(self.others, "close", lambda: None)()


def _packed(ref: WeightRef, panel_bytes: int, memory: np.ndarray[Any, Any]) -> Weight:
    weight = Weight(ref, memory)
    weight.packed, weight.row_bytes, weight.lasting = True, panel_bytes, True
    return weight
