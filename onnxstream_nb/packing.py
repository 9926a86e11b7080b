"""Weights packed into panels: once, when a model is loaded, and not held beside as they were.

Products with block encodings read panels of 16 rows at the speed of memory (kernels/panels.py); the
file's own rows they read at half of it. What is only looked up by rows stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .files import aligned
from .graph import WeightRef
from .weights import ALIGNMENT, DiskProvider, Weight, WeightsProvider, encoded_bytes

CHUNK_BYTES = 4_000_000  # read at a time: what is held twice


class Packer(Protocol):
    """What the kernels offer: the size of panels, and filling them."""

    def panel_bytes(self, ref: WeightRef) -> int:
        """Bytes of a panel of 16 rows; 0 when this weight is read as it is stored."""

    def pack(self, ref: WeightRef, rows: np.ndarray[Any, Any], out: int, count: int) -> None:
        """Pack `count` stored rows, flat bytes, into the panels at address `out`."""

    @property
    def piece(self) -> int:
        """A piece of a part begins with a multiple of so many stored rows."""

    def pack_heads(self, ref: WeightRef, out: int, count: int) -> None:
        """Begin the panels of `count` rows of a weight in parts at address `out`."""

    def pack_part(
        self,
        ref: WeightRef,
        index: int,
        piece: Weight,
        out: int,
        first: int,
        count: int,
        start: int,
        stop: int,
    ) -> None:
        """Pack `count` stored rows of a part, from `first` on, into the panels of rows `start` to
        `stop` of the weight, at `out`."""

    @property
    def stamp(self) -> str:
        """What is another one when panels are: those of another stamp are not for these kernels."""


def panels_bytes(ref: WeightRef, panel_bytes: int) -> int:
    """Bytes of all panels of a weight, up to the next one's alignment."""
    panels = -(-ref.shape[1] // 16)
    return -(-panels * panel_bytes // ALIGNMENT) * ALIGNMENT


def as_panels(
    ref: WeightRef, panel_bytes: int, source: Path | bytes = b"", offset: int = 0
) -> WeightRef:
    """The same matrix as panels that lie elsewhere."""
    nbytes = -(-ref.shape[1] // 16) * panel_bytes
    return replace(
        ref, source=source, offset=offset, nbytes=nbytes, transposed=True, parts=(), block=0,
        panel=panel_bytes,
    )  # fmt: skip


def fill_panels(
    ref: WeightRef, packer: Packer, disk: DiskProvider, out: int, start: int, stop: int
) -> None:
    """Read rows `start` to `stop` of the N of a matrix, a few at a time, and pack them into panels
    at address `out`, which hold zeros. `start` is a multiple of 16, of parts of `packer.piece`."""
    if ref.parts:
        packer.pack_heads(ref, out, stop - start)
        for index in range(len(ref.parts)):
            _fill_from_part(ref, index, packer, disk, out, start, stop)
        return
    row_bytes, panel_bytes = ref.nbytes // ref.stored_shape[0], packer.panel_bytes(ref)
    step = max(1, CHUNK_BYTES // row_bytes // 16) * 16
    for first in range(start, stop, step):
        count = min(step, stop - first)
        stored = disk.read(ref, first * row_bytes, (first + count) * row_bytes)
        packer.pack(ref, stored, out + (first - start) // 16 * panel_bytes, count)


def _fill_from_part(
    ref: WeightRef, index: int, packer: Packer, disk: DiskProvider, out: int, start: int, stop: int
) -> None:
    part = ref.parts[index]
    rows, columns = part.stored_shape
    by_rows = part.transposed and part.shape[1] > 1  # else all of it is for any of the rows
    least, most = (start, stop) if by_rows else (0, rows)
    step = max(1, CHUNK_BYTES * rows // part.nbytes // packer.piece) * packer.piece
    for first in range(least, most, step):
        count = min(step, most - first)
        begin, end = (
            encoded_bytes(replace(part, shape=(n, columns))) for n in (first, first + count)
        )
        shape = (columns, count) if part.transposed else (count, columns)
        piece = Weight(replace(part, shape=shape), disk.read(part, begin, end))
        packer.pack_part(ref, index, piece, out, first, count, start, stop)


class PackedProvider:
    """Packs some weights when it is made; others come from a provider that keeps them in place."""

    def __init__(
        self,
        others: WeightsProvider,
        refs: Iterable[WeightRef],
        packer: Packer,
        progress: Callable[[str, float | None], None] | None = None,
    ) -> None:
        self.others = others
        self._disk = DiskProvider()
        self._weights: dict[object, Weight] = {}
        wanted = {ref.matrix: (ref, packer.panel_bytes(ref)) for ref in refs}
        total = sum(panels_bytes(*found) for found in wanted.values())
        memory, done = aligned(total), 0
        for matrix, (ref, panel_bytes) in wanted.items():
            if progress is not None:
                progress("packing weights", done / total)
            size = panels_bytes(ref, panel_bytes)
            weight = Weight(as_panels(ref, panel_bytes), memory[done : done + size], lasting=True)
            fill_panels(ref, packer, self._disk, weight.address, 0, ref.shape[1])
            self._weights[matrix] = weight
            done += size

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._disk.bytes_read + int(getattr(self.others, "bytes_read", 0))

    def get(self, ref: WeightRef) -> Weight:
        """The panels of a weight that was packed, else what the other provider has."""
        packed = self._weights.get(ref.matrix)
        return self.others.get(ref) if packed is None else packed

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """For the other provider: panels are in memory."""
        self.others.prefetch(refs)

    def release(self, ref: WeightRef) -> None:
        """Nothing: all is kept."""

    def close(self) -> None:
        """Let go of the panels and of the files."""
        self._weights.clear()
        self._disk.close()
        getattr(self.others, "close", lambda: None)()
