"""Where weights come from. A provider gives the bytes of a reference; nothing else knows how.

Three methods: `get(ref)` returns a `Weight` whose bytes are in memory until `release(ref)`;
`prefetch(refs)` says which ones come next, in order. Kernels and executor never learn which
provider serves them.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from .errors import ModelError
from .graph import WeightRef
from .weight import Weight, encoded_bytes, numpy_dtype

__all__ = [
    "BudgetProvider", "DiskProvider", "MmapProvider", "PrefetchProvider", "RamProvider", "Weight",
    "WeightsProvider", "encoded_bytes", "numpy_dtype",
]  # fmt: skip


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


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class _Files:
    """Open files by path, closed when it is dropped. Positioned reads; errors name the file."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                except OSError as error:
                    raise ModelError(f"{path}: cannot open the weight file: {error}") from error
            return self._open[path]

    def read(self, ref: WeightRef, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        """The bytes of a reference, or those from `start` to `stop`, read into a new buffer."""
        assert isinstance(ref.source, Path)
        size, offset = (ref.nbytes if stop is None else stop) - start, ref.offset + start
        buffer = np.empty(size, np.uint8)
        view, done, descriptor = memoryview(cast(Any, buffer)), 0, self.descriptor(ref.source)
        while done < size:
            try:
                count = os.preadv(descriptor, [view[done : done + (1 << 26)]], offset + done)
            except OSError as error:
                raise ModelError(f"{ref.source}: reading {ref.name} failed: {error}") from error
            if count == 0:
                raise _truncated(ref)
            done += count
        return buffer

    def close(self) -> None:
        _close_all(self._open)


def _truncated(ref: WeightRef) -> ModelError:
    return ModelError(
        f"{ref.source!s}: the file ends before {ref.name} (bytes {ref.offset} to "
        f"{ref.offset + ref.nbytes}); it is truncated, fetch it again"
    )


def _in_memory(ref: WeightRef) -> np.ndarray[Any, Any]:
    assert isinstance(ref.source, bytes)
    return np.frombuffer(ref.source, np.uint8, ref.nbytes, ref.offset)


def _joined(
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
        self._files = _Files()
        self.bytes_read = 0

    def get(self, ref: WeightRef) -> Weight:
        return Weight(ref, self.read(ref, 0, ref.nbytes))

    def read(self, ref: WeightRef, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Bytes `start` to `stop` of a reference, flat."""
        if ref.parts:
            return _joined(ref, lambda part: self.read(part, 0, part.nbytes))[start:stop]
        if isinstance(ref.source, bytes):
            return _in_memory(ref)[start:stop]
        self.bytes_read += stop - start
        return self._files.read(ref, start, stop)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Nothing: every read waits for its turn."""

    def release(self, ref: WeightRef) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._files.close()


class _ReadAhead:
    """What a PrefetchProvider and its thread share: the thread may not keep the provider alive."""

    def __init__(self, ahead: int) -> None:
        self.disk = DiskProvider()
        self._ahead = ahead
        self._queue: list[WeightRef] = []  # uses announced and not asked for yet, in order
        self._ready: OrderedDict[tuple[object, ...], np.ndarray[Any, Any] | BaseException] = (
            OrderedDict()
        )
        self._held = 0
        self._change = threading.Condition()
        self._closed = False
        self._reading: tuple[object, ...] | None = None
        self._thread: threading.Thread | None = None

    def announce(self, refs: Sequence[WeightRef]) -> None:
        """Replace the queue, and forget what it does not want."""
        with self._change:
            self._queue = [r for r in refs if isinstance(r.source, Path)]
            keep = self._window()
            for key, found in list(self._ready.items()):
                if key not in keep or isinstance(found, BaseException):
                    self._drop(key)
            if self._thread is None and self._queue:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _window(self) -> set[tuple[object, ...]]:
        """The front of the queue, as much as may be held: what came later makes room for it."""
        sums = accumulate({r.key: r.nbytes for r in self._queue}.values())
        keys = dict.fromkeys(r.key for r in self._queue)
        return {key for key, total in zip(keys, sums, strict=True) if total <= self._ahead}

    def _drop(self, key: tuple[object, ...]) -> None:
        dropped = self._ready.pop(key)
        self._held -= 0 if isinstance(dropped, BaseException) else dropped.nbytes

    def _next(self) -> WeightRef | None:
        """The next reference to read, when there is room for it."""
        ref = next((r for r in self._queue if r.key not in self._ready), None)
        if ref is not None and (self._held == 0 or self._held + ref.nbytes <= self._ahead):
            return ref
        return None

    def _work(self) -> None:
        while True:
            with self._change:
                ref = self._next()
                while ref is None and not self._closed:
                    self._change.wait()
                    ref = self._next()
                if ref is None or self._closed:
                    return
                self._reading = ref.key
            result: np.ndarray[Any, Any] | BaseException
            try:
                result = self.disk.get(ref).buffer
            except BaseException as error:  # handed to the thread that asks for the weight
                result = error
            with self._change:
                if any(r.key == ref.key for r in self._queue):
                    self._ready[ref.key] = result
                    self._held += 0 if isinstance(result, BaseException) else result.nbytes
                self._reading = None
                self._change.notify_all()
            del result  # or this thread would keep the bytes until the next read

    def take(self, ref: WeightRef) -> np.ndarray[Any, Any] | None:
        """The bytes that were read ahead, or are being read; None when the caller has to."""
        with self._change:
            while self._reading == ref.key:
                self._change.wait()
            first = next((i for i, r in enumerate(self._queue) if r.key == ref.key), None)
            if first is not None:  # this use only: a tied weight comes again
                del self._queue[first]
            found = self._ready.get(ref.key)
            if found is not None:
                self._drop(ref.key)
                self._change.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """Let the thread end after the read it is at."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def close(self) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self.disk.close()


class PrefetchProvider:
    """Reads ahead in execution order on its own thread, within a number of bytes."""

    def __init__(self, ahead: int = 64_000_000) -> None:
        self._state = _ReadAhead(ahead)
        weakref.finalize(self, self._state.stop)

    @property
    def bytes_read(self) -> int:
        return self._state.disk.bytes_read

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """The order in which weights will be asked for; replaces what was announced before."""
        self._state.announce(refs)

    def get(self, ref: WeightRef) -> Weight:
        found = self._state.take(ref)
        return self._state.disk.get(ref) if found is None else Weight(ref, found)

    def release(self, ref: WeightRef) -> None:
        """The bytes were handed over by `get`; nothing is kept."""

    def close(self) -> None:
        self._state.close()


class MmapProvider:
    """Maps the files; the page cache decides what stays in memory."""

    in_place = True  # a weight stays where it is from one `get` to the next

    def __init__(self) -> None:
        self._files = _Files()
        self._maps: dict[Path, np.ndarray[Any, Any]] = {}

    def get(self, ref: WeightRef) -> Weight:
        if ref.parts:
            return Weight(ref, _joined(ref, lambda part: self.get(part).buffer))
        if isinstance(ref.source, bytes):
            return Weight(ref, _in_memory(ref))
        # Reading a mapped page behind the end of a file kills the process: look before, every time.
        end, size = ref.offset + ref.nbytes, os.fstat(self._files.descriptor(ref.source)).st_size
        if end > size:
            raise _truncated(ref)
        if not ref.nbytes:
            return Weight(ref, np.empty(0, np.uint8))
        whole = self._maps.get(ref.source)
        if whole is None or end > whole.nbytes:
            whole = self._maps[ref.source] = self._map(ref.source)
        return Weight(ref, whole[ref.offset : end])

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
    """Reads each weight once and keeps it; tied weights are kept once."""

    in_place = True  # a weight stays where it is from one `get` to the next

    def __init__(self) -> None:
        self._disk = DiskProvider()
        self._kept: dict[tuple[object, ...], np.ndarray[Any, Any]] = {}

    @property
    def bytes_read(self) -> int:
        return self._disk.bytes_read

    def get(self, ref: WeightRef) -> Weight:
        buffer = self._kept.get(ref.key)
        if buffer is None:
            buffer = self._kept[ref.key] = self._disk.get(ref).buffer
        return Weight(ref, buffer)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Nothing: after the first run all is here."""

    def release(self, ref: WeightRef) -> None:
        """Nothing: all is kept."""

    def close(self) -> None:
        self._kept.clear()
        self._disk.close()


class BudgetProvider:
    """Keeps the pinned weights in RAM and streams the others: the way to a byte budget."""

    def __init__(self, pinned: Iterable[WeightRef], ahead: int) -> None:
        self._pinned = {ref.key for ref in pinned}
        self._ram = RamProvider()
        self._stream = PrefetchProvider(ahead)

    @property
    def bytes_read(self) -> int:
        return self._ram.bytes_read + self._stream.bytes_read

    def _of(self, ref: WeightRef) -> RamProvider | PrefetchProvider:
        return self._ram if ref.key in self._pinned else self._stream

    def get(self, ref: WeightRef) -> Weight:
        return self._of(ref).get(ref)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        self._stream.prefetch([r for r in refs if r.key not in self._pinned])

    def release(self, ref: WeightRef) -> None:
        self._of(ref).release(ref)

    def close(self) -> None:
        self._ram.close()
        self._stream.close()
