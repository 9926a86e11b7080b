"""Where weights come from. A provider gives the bytes of a reference; nothing else knows how.

Three methods: `get(ref)` returns a `Weight` whose bytes are in memory until `release(ref)`;
`prefetch(refs)` says which ones come next, in order. Kernels and executor never learn which
provider serves them.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import ModelError
from .files import Files, aligned, truncated
from .graph import WeightRef
from .lookup import fetch_all
from .weight import Weight, encoded_bytes, numpy_dtype

__all__ = [
    "DiskProvider", "MmapProvider", "RamProvider", "Weight", "WeightsProvider", "encoded_bytes",
    "numpy_dtype",
]  # fmt: skip


ALIGNMENT = 64  # of a weight in memory
READ = 16 << 20  # bytes that a thread reads at a time
READERS = 4


class WeightsProvider(Protocol):
    """What the executor asks of a source of weights."""

    def get(self, ref: WeightRef) -> Weight:
        """The weight, its bytes in memory until `release`; waits for them where it must.

        Raises ModelError naming the file when it is missing, shorter than it was, or unreadable.
        """

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """These will be asked for next, in this order; what was announced before is forgotten."""

    def release(self, ref: WeightRef) -> None:
        """The bytes that `get` gave are no longer needed; the provider may keep or drop them."""


def in_memory(ref: WeightRef) -> np.ndarray[Any, Any]:
    """The bytes of a weight that has no file."""
    assert isinstance(ref.source, bytes)
    return np.frombuffer(ref.source, np.uint8, ref.nbytes, ref.offset)


def joined(
    ref: WeightRef, bytes_of: Callable[[WeightRef], np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    """The bytes of a weight in parts, one part after the other: at most one is there twice."""
    whole, done = np.empty(ref.nbytes, np.uint8), 0
    for part in ref.parts:
        whole[done : done + part.nbytes] = bytes_of(part)
        done += part.nbytes
    return whole


class DiskProvider:
    """Reads a weight when it is asked for, and drops it when it is released."""

    def __init__(self) -> None:
        self._files = Files()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.stop_on: threading.Event | None = None  # looking up rows may be given up

    def get(self, ref: WeightRef) -> Weight:
        return Weight(ref, self.read(ref, 0, ref.nbytes))

    def read(self, ref: WeightRef, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Bytes `start` to `stop` of a reference, flat."""
        if ref.parts:
            return joined(ref, lambda part: self.read(part, 0, part.nbytes))[start:stop]
        if isinstance(ref.source, bytes):
            return in_memory(ref)[start:stop]
        found = self._files.read(ref, start, stop)
        with self._lock:
            self.bytes_read += stop - start
        return found

    def read_into(self, ref: WeightRef, start: int, place: np.ndarray[Any, Any]) -> None:
        """Bytes of a reference from `start` on into `place` (n,) uint8; several threads may."""
        self._files.fill(ref, place, start)
        with self._lock:
            self.bytes_read += place.nbytes

    def table(self, ref: WeightRef) -> Weight:
        """A weight that stays in its file: only the rows that are looked up are read."""
        return Weight(ref, np.empty(0, np.uint8), partial(self._rows, ref))

    def lasting_table(self, ref: WeightRef) -> Weight:
        """The same for whoever waits for a row until it comes: it is read where it is wanted."""
        if ref.parts or isinstance(ref.source, bytes):
            return self.table(ref)
        each = ref.nbytes // math.prod(ref.stored_shape[:-1])

        def read_row(i: int, place: np.ndarray[Any, Any]) -> None:
            self.read_into(ref, each * i, place)

        rows = partial(self._rows, ref)
        return Weight(ref, np.empty(0, np.uint8), rows, read_row=read_row, lasting=True)

    def _rows(self, ref: WeightRef, ids: Iterable[int]) -> np.ndarray[Any, Any]:
        if ref.parts:
            wanted = [int(i) for i in ids]
            return np.concatenate([self._rows(part, wanted) for part in ref.parts], axis=1)
        each = ref.nbytes // math.prod(ref.stored_shape[:-1])
        wanted = [int(i) for i in ids]
        unique = list(dict.fromkeys(wanted))

        def row(i: int) -> np.ndarray[Any, Any]:
            return self.read(ref, each * i, each * (i + 1))

        if self.stop_on is None:
            rows = [row(i) for i in unique]
        else:
            rows = fetch_all(row, unique, self.stop_on)
        found = dict(zip(unique, rows, strict=True))
        return np.stack([found[i] for i in wanted]) if wanted else np.empty((0, each), np.uint8)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Nothing to read: every read waits for its turn. Files that changed are opened anew."""
        self._files.forget_changed()

    def release(self, ref: WeightRef) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._files.close()


class MmapProvider:
    """Maps the files; the page cache decides what stays in memory."""

    def __init__(self) -> None:
        self._files = Files()
        self._maps: dict[Path, np.ndarray[Any, Any]] = {}

    def get(self, ref: WeightRef) -> Weight:
        if ref.block_axis:
            return Weight(ref, np.empty(0, np.uint8), partial(self._rows, ref))
        if ref.parts:
            return Weight(ref, joined(ref, lambda part: self.get(part).buffer))
        if isinstance(ref.source, bytes):
            return Weight(ref, in_memory(ref), lasting=True)
        # Reading a mapped page behind the end of a file kills the process: look before, every time.
        end, size = ref.offset + ref.nbytes, os.fstat(self._files.descriptor(ref.source)).st_size
        if end > size:
            raise truncated(ref)
        if not ref.nbytes:
            return Weight(ref, np.empty(0, np.uint8))
        whole = self._maps.get(ref.source)
        if whole is None or end > whole.nbytes:
            whole = self._maps[ref.source] = self._map(ref.source)
        return Weight(ref, whole[ref.offset : end], lasting=True)

    def _rows(self, ref: WeightRef, ids: Iterable[int]) -> np.ndarray[Any, Any]:
        """Rows of a table in parts, those of one part behind those of the other."""
        parts = (self.get(part).buffer.reshape(ref.shape[0], -1) for part in ref.parts)
        wanted = list(ids)
        return np.concatenate([part[wanted] for part in parts], axis=1)

    def _map(self, path: Path) -> np.ndarray[Any, Any]:
        try:
            mapped = mmap.mmap(self._files.descriptor(path), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot map the weight file: {error}") from error
        return np.frombuffer(mapped, np.uint8)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Nothing to read, but a look at the files: what is mapped may be used without `get`."""
        for path, whole in self._maps.items():
            if os.fstat(self._files.descriptor(path)).st_size < whole.nbytes:
                raise ModelError(f"{path}: truncated since it was opened; fetch it again")

    def release(self, ref: WeightRef) -> None:
        """Nothing: pages are the kernel's to drop."""

    def close(self) -> None:
        self._maps.clear()
        self._files.close()


class RamProvider:
    """Reads each weight once and keeps it; tied weights are kept once.

    `refs` are read now, by several threads, into one stretch of memory in large pages; what is
    asked for beside them is read then. Of `tables` only rows are looked up: those that are not
    kept for another use stay in their files.
    """

    def __init__(
        self,
        refs: Iterable[WeightRef] = (),
        progress: Callable[[str, float | None], None] | None = None,
        *,
        tables: Iterable[WeightRef] = (),
    ) -> None:
        self._disk = DiskProvider()
        self._tables = {ref.matrix for ref in tables}
        self._kept: dict[tuple[object, ...], np.ndarray[Any, Any]] = {}
        found = {ref.key: ref for ref in refs if isinstance(ref.source, Path) and not ref.parts}
        if found:
            self._read(found, progress)

    def _read(
        self,
        refs: Mapping[tuple[object, ...], WeightRef],
        progress: Callable[[str, float | None], None] | None,
    ) -> None:
        total, done = sum(-(-ref.nbytes // ALIGNMENT) * ALIGNMENT for ref in refs.values()), 0
        memory, jobs = aligned(total), []
        for key, ref in refs.items():
            self._kept[key] = place = memory[done : done + ref.nbytes]
            jobs += [(ref, at, place[at : at + READ]) for at in range(0, ref.nbytes, READ)]
            done += -(-ref.nbytes // ALIGNMENT) * ALIGNMENT
        pool = ThreadPoolExecutor(READERS)
        try:
            for i, _ in enumerate(pool.map(lambda job: self._disk.read_into(*job), jobs)):
                if progress is not None:
                    progress("reading weights", i / len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)

    @property
    def bytes_read(self) -> int:
        return self._disk.bytes_read

    def get(self, ref: WeightRef) -> Weight:
        buffer = self._kept.get(ref.key)
        if buffer is None and ref.matrix in self._tables:
            return self._disk.lasting_table(ref)
        if buffer is None:
            buffer = self._kept[ref.key] = self._disk.get(ref).buffer
        return Weight(ref, buffer, lasting=True)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Nothing: after the first run all is here, if it was not before."""

    def release(self, ref: WeightRef) -> None:
        """Nothing: all is kept."""

    def close(self) -> None:
        self._kept.clear()
        self._disk.close()
