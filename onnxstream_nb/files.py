"""Reading weight files: positioned reads, directly from the disk where that pays.

A direct read moves whole pages past the page cache, between the disk and memory that is aligned
like the file: what lies beside a weight in its first and last page comes along.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np

from .errors import ModelError
from .graph import WeightRef

PAGE = 4096  # bytes: what direct reads are aligned to, on every file system that has them
MOST = 1 << 26  # bytes a system call

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _close_all(descriptors: dict[tuple[Path, bool], int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def room(size: int) -> int:
    """Bytes of memory, from a page on, in which `size` bytes from anywhere in a file can be read
    directly."""
    return (-(-size // PAGE) + 1) * PAGE


def aligned(size: int) -> Bytes:
    """Zeroed memory that begins at a page, in large pages where the system has them."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(1, size), **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class Files:
    """Open files by path, closed when it is dropped. Errors name the file and the weight."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def descriptor(self, path: Path, direct: bool = False) -> int:
        """An open file; `direct` for reads past the page cache, if its file system has them."""
        with self._lock:
            if (path, direct) not in self._open:
                try:
                    self._open[path, direct] = _open(path, direct)
                except OSError as error:
                    raise ModelError(f"{path}: cannot open the weight file: {error}") from error
            return self._open[path, direct]

    def read(self, ref: WeightRef, start: int = 0, stop: int | None = None) -> Bytes:
        """The bytes of a reference, or those from `start` to `stop`, read into a new buffer."""
        size = (ref.nbytes if stop is None else stop) - start
        buffer = np.empty(size, np.uint8)
        self.fill(ref, buffer, start)
        return buffer

    def fill(self, ref: WeightRef, memory: Bytes, start: int = 0) -> None:
        """Fill memory (n,) with the bytes of a reference from `start` on."""
        self._fill(ref, memory, ref.offset + start, memory.nbytes, direct=False)

    def read_into(self, memory: Bytes, ref: WeightRef, start: int, stop: int) -> Bytes:
        """Bytes `start` to `stop` of a reference, read directly into memory that begins at a page
        and has `room(stop - start)` bytes; the result is a part of it."""
        offset, size = ref.offset + start, stop - start
        skip = offset % PAGE
        whole = -(-(skip + size) // PAGE) * PAGE
        self._fill(ref, memory[:whole], offset - skip, skip + size, direct=True)
        return memory[skip : skip + size]

    def _fill(self, ref: WeightRef, memory: Bytes, offset: int, needed: int, direct: bool) -> None:
        """Read at least `needed` bytes; what comes after them may be beyond the end of the file."""
        assert isinstance(ref.source, Path)
        descriptor, done = self.descriptor(ref.source, direct), 0
        view = memoryview(cast(Any, memory))
        while done < needed:
            try:
                count = os.preadv(descriptor, [view[done : done + MOST]], offset + done)
            except OSError as error:
                raise ModelError(f"{ref.source}: reading {ref.name} failed: {error}") from error
            arrived = done + count
            if direct and arrived < needed:
                arrived -= arrived % PAGE  # a direct read goes on at a page
            if arrived <= done:
                raise truncated(ref)
            done = arrived

    def close(self) -> None:
        """Close all files."""
        _close_all(self._open)


def _open(path: Path, direct: bool) -> int:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if direct and hasattr(os, "O_DIRECT"):
        try:
            descriptor = os.open(path, flags | os.O_DIRECT)
            try:  # some file systems open it, and then read nothing
                os.preadv(descriptor, [memoryview(cast(Any, aligned(PAGE)))], 0)
                return descriptor
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags)


def truncated(ref: WeightRef) -> ModelError:
    """What to say of a file that is too short for a weight."""
    return ModelError(
        f"{ref.source!s}: the file ends before {ref.name} (bytes {ref.offset} to "
        f"{ref.offset + ref.nbytes}); it is truncated, fetch it again"
    )
