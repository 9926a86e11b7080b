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


class _File:
    """A file as it was when it was opened; closed when nobody reads it any more."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.descriptor, self.head = _open(path, direct)
        weakref.finalize(self, os.close, self.descriptor)
        self.status = self._status()

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    @property
    def changed(self) -> bool:
        """Whether it was written to since."""
        return self._status() != self.status


class Files:
    """Open files by path, closed when it is dropped. Errors name the file and the weight.

    One that failed, or was written to, is opened anew the next time: it may have been put back.
    It must begin with the same page then, where headers are, or it is refused.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], _File] = {}
        self._known: dict[Path, bytes] = {}  # its first page
        self._lock = threading.Lock()

    def descriptor(self, path: Path, direct: bool = False) -> int:
        """An open file; `direct` for reads past the page cache, if its file system has them."""
        return self._file(path, direct).descriptor

    def _file(self, path: Path, direct: bool) -> _File:
        with self._lock:
            found = self._open.get((path, direct))
        if found is not None:
            return found
        try:
            file = _File(path, direct)  # without the lock: the disk may not answer, and others wait
        except OSError as error:
            raise ModelError(f"{path}: cannot open the weight file: {_reason(error)}") from error
        with self._lock:
            known = self._known.get(path, b"")
            if not file.head.startswith(known) and not known.startswith(file.head):
                raise ModelError(
                    f"{path}: this is another file than the one that was opened; put that "
                    "back, or load the model again"
                )
            self._known[path] = max(known, file.head, key=len)
            return self._open.setdefault((path, direct), file)

    def forget(self, path: Path) -> None:
        """Open this file anew when it is wanted next; reads under way are not disturbed."""
        with self._lock:
            for direct in (True, False):
                self._open.pop((path, direct), None)

    def forget_changed(self) -> bool:
        """Open those files anew that were written to since they were; whether there were any."""
        with self._lock:
            changed = {path for (path, _), file in self._open.items() if file.changed}
        for path in changed:
            self.forget(path)
        return bool(changed)

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
        file, done = self._file(ref.source, direct), 0
        view = memoryview(cast(Any, memory))
        while done < needed:
            try:
                count = os.preadv(file.descriptor, [view[done : done + MOST]], offset + done)
            except OSError as error:
                self.forget(ref.source)
                raise ModelError(
                    f"{ref.source}: reading {ref.name} failed: {_reason(error)}"
                ) from error
            arrived = done + count
            if direct and arrived < needed:
                arrived -= arrived % PAGE  # a direct read goes on at a page
            if arrived <= done:
                self.forget(ref.source)
                raise truncated(ref)
            done = arrived

    def close(self) -> None:
        """Close all files, each after the reads under way."""
        with self._lock:
            self._open.clear()


def _open(path: Path, direct: bool) -> tuple[int, bytes]:
    """A descriptor, and the file's first page or what there is of it."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return _opened(path, flags | os.O_DIRECT)  # some file systems do, and then read nothing
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return _opened(path, flags)


def _opened(path: Path, flags: int) -> tuple[int, bytes]:
    descriptor, page = os.open(path, flags), aligned(PAGE)
    try:
        return descriptor, bytes(page[: os.preadv(descriptor, [memoryview(cast(Any, page))], 0)])
    except BaseException:
        os.close(descriptor)
        raise


def _reason(error: OSError) -> str:
    """What went wrong, and the remedy."""
    remedy = "look after the disk, then try again"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        remedy = "put it back, or fetch it again"
    if isinstance(error, PermissionError):
        remedy = "make it readable"
    return f"{error.strerror or error}; {remedy}"


def truncated(ref: WeightRef) -> ModelError:
    """What to say of a file that is too short for a weight."""
    return ModelError(
        f"{ref.source!s}: the file ends before {ref.name} (bytes {ref.offset} to "
        f"{ref.offset + ref.nbytes}); it is truncated, fetch it again"
    )
