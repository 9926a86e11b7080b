"""A file without a name for what has no room in memory, and the threads that read it ahead."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn, cast

from .device import format_size
from .errors import OnnxstreamError, UsageError
from .kvslot import Array, zeroed

READERS = 4  # reads in flight
ADVICE_BYTES = 1 << 20  # a system reads no more ahead for one request


class SpillFile:
    """A file of `nbytes` in `folder`, set aside at once and gone when the process ends.

    Raises UsageError when the disk has not so much room, OnnxstreamError when it fails later.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder, self.nbytes = folder, nbytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _unnamed_file(folder, nbytes)
        except OSError as error:
            raise UsageError(
                f"{folder}: {format_size(nbytes)} for the context's keys and values cannot be set "
                f"aside on this disk ({error.strerror}): name a folder on another with --kv-spill, "
                "or choose a smaller --context or a larger --ram"
            ) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._pool = ThreadPoolExecutor(READERS, "spill")
        self._begun: list[Future[None]] = []
        self._memory: dict[str, Array] = {}
        self.windows: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # that lie in that memory

    def read(self, into: Array, offset: int) -> None:
        """Fill `into`, flat uint8, from an offset on."""
        view, done = memoryview(cast(Any, into)), 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                self._fail("reading", error)
            if count == 0:
                self._fail("reading", "the file ends before them")
            done += count

    def write(self, data: Array, offset: int) -> None:
        """Write flat uint8 from an offset on."""
        view, done = memoryview(cast(Any, data)), 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                self._fail("writing", error)

    def _fail(self, what: str, problem: object) -> NoReturn:
        raise OnnxstreamError(
            f"{self.folder}: {what} the keys and values that lie there failed ({problem}): "
            "name a folder on another disk with --kv-spill"
        )

    def memory(self, name: str, nbytes: int) -> Array:
        """Working memory, flat uint8; who asks again for the same name gets the same."""
        if name not in self._memory or self._memory[name].nbytes < nbytes:
            self.windows.clear()
            self._memory[name] = zeroed(nbytes)
        return self._memory[name][:nbytes]

    def begin(self, calls: Sequence[Callable[[], None]]) -> None:
        """Begin calls that read, by all readers; none may be under way but of a run given up."""
        wait(self._begun)
        shares = (calls[i::READERS] for i in range(READERS))
        self._begun = [self._pool.submit(_call_all, share) for share in shares if share]

    def settle(self) -> None:
        """Wait for what was begun; raises the first error."""
        for call in self._begun:
            call.result()

    def advise(self, runs: Sequence[tuple[int, int]]) -> None:
        """Have (offset, bytes) read ahead by the system, as far as it has memory to spare."""
        if hasattr(os, "posix_fadvise"):
            self._pool.submit(_advise, self._descriptor, runs)

    def close(self) -> None:
        """Give the room on disk back; slots in the file may not be used any more."""
        self._pool.shutdown()
        self._memory.clear()
        self.windows.clear()
        self._close()


def _unnamed_file(folder: Path, nbytes: int) -> int:
    """The descriptor of a new file so long; where the system can, its blocks are its own."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        return os.dup(file.fileno())


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _advise(descriptor: int, runs: Sequence[tuple[int, int]]) -> None:
    for offset, nbytes in runs:
        for at in range(offset, offset + nbytes, ADVICE_BYTES):
            size = min(ADVICE_BYTES, offset + nbytes - at)
            os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)
