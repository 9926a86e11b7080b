"""A graph over packed weights: its matrices become references into a file of panels, which is
written first where there is none that fits."""

from __future__ import annotations

import errno
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .device import disk_free, format_size
from .errors import ModelError
from .files import Bytes, aligned
from .graph import Graph, WeightRef
from .packed_file import VERSION, Header, PackedFile, remove, verify
from .packing import Packer, as_panels, fill_panels
from .plan import pack_kernels, packable
from .weights import DiskProvider

STRIPE = 8 << 20  # bytes of panels that are packed before they are written
POLL = 0.2  # seconds between two looks at the lock of another process

Progress = Callable[[str, float | None], None]

_log = logging.getLogger(__name__)


def with_packed_file(
    graph: Graph,
    packer: Packer,
    folder: Path,
    prepare: Callable[[Sequence[str]], None],
    progress: Progress | None = None,
) -> Graph:
    """The graph whose packable weights lie as panels in a file of `folder`.

    That is written first when it is missing or was made from something else; `prepare` makes
    kernels ready. When it cannot be written, a warning says so, and the graph stays as it is.
    Raises ModelError when a file of the model is missing or too short.
    """
    found = {n: ref for n, ref in packable(graph, packer.panel_bytes).items() if _has_file(ref)}
    if not found:
        return graph
    folder = folder.expanduser().absolute()
    file = PackedFile(folder, list(found.values()), packer.panel_bytes, packer.stamp)
    if not file.is_whole():
        prepare([name for ref in found.values() for name in pack_kernels(ref)])
        try:
            write(file, packer, progress)
        except OSError as error:
            _log.warning(
                "the packed weights cannot be kept in %s (%s): going on without",
                folder, error.strerror or error,
            )  # fmt: skip
            return graph
    packed = {name: _in_file(ref, file, packer) for name, ref in found.items()}
    return graph.with_(initializers={**graph.initializers, **packed})


def _has_file(ref: WeightRef) -> bool:
    return any(isinstance(part.source, Path) for part in ref.parts or (ref,))


def _in_file(ref: WeightRef, file: PackedFile, packer: Packer) -> WeightRef:
    return as_panels(ref, packer.panel_bytes(ref), file.path, file.places[ref.matrix][0])


def write(file: PackedFile, packer: Packer, progress: Progress | None = None) -> None:
    """Pack a model's weights into their file, and read it once to check it.

    What was packed from earlier contents of the same files, or by other code, is deleted. One
    process of all writes at a time. Nothing is left of a file that could not be finished.
    Raises OSError when the folder cannot be written or the disk is full.
    """
    folder = file.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, progress):
        if file.is_whole():  # another process has written it
            return
        _remove_former(file, packer.stamp)
        free = disk_free(folder)
        if file.size > free:
            sizes = f"{format_size(file.size)} are needed, {format_size(free)} are free"
            raise OSError(errno.ENOSPC, sizes)
        temporary = file.path.with_suffix(".tmp")
        try:
            _write(file, temporary, packer, progress)
            _check(temporary, progress)
            os.replace(temporary, file.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _remove_former(file: PackedFile, stamp: str) -> None:
    """Delete what nobody will use any more: other packed weights of the same files, the leavings of
    a process that was killed."""
    folder = file.path.parent
    if file.path.exists():
        _log.warning("%s is damaged: packing anew", file.path)
        file.path.unlink()

    def is_former(header: Header) -> bool:
        if header.paths != {source.path for source in file.sources}:
            return False
        if not all(source.is_same for source in header.sources):
            reason = "a file of the model has changed"
        elif (header.version, header.stamp) != (VERSION, stamp):
            reason = "they were packed by another version"
        else:
            return False
        _log.warning("packing weights of %s anew: %s", file.sources[0].path, reason)
        return True

    remove(folder, is_former)
    for path in folder.glob("*.tmp"):
        path.unlink()


@contextmanager
def _alone(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the folder's lock; while another process has it, progress is told."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    while True:
        try:
            lock.acquire(timeout=POLL)
            break
        except Timeout:
            if progress is not None:
                progress("waiting for another process that packs weights", None)
        except NotImplementedError as error:  # a file system without locks
            raise OSError(errno.ENOLCK, str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _check(path: Path, progress: Progress | None) -> None:
    try:
        verify(path, progress)
    except ModelError as error:
        raise OSError(errno.EIO, "what was written reads differently") from error


def _write(file: PackedFile, path: Path, packer: Packer, progress: Progress | None) -> None:
    """The panels one after the other, then the header with their checksums."""
    disk = DiskProvider()
    try:
        with path.open("wb") as out:
            out.truncate(file.size)
            checksums = []
            for ref in file.refs:
                out.seek(file.places[ref.matrix][0])
                checksum = 0
                for panels in _stripes(ref, packer, disk):
                    if progress is not None:
                        progress("packing weights into a file", out.tell() / file.size)
                    checksum = zlib.crc32(panels.data, checksum)
                    out.write(panels.data)
                checksums.append(f"{checksum:08x}")
            out.seek(0)
            out.write(file.header(checksums))
            out.flush()
            os.fsync(out.fileno())
    finally:
        disk.close()


def _stripes(ref: WeightRef, packer: Packer, disk: DiskProvider) -> Iterator[Bytes]:
    """All panels of a weight, some of them at a time, each until the next are asked for."""
    panel, n = packer.panel_bytes(ref), ref.shape[1]
    rows = max(1, STRIPE // (panel * packer.piece // 16)) * packer.piece
    memory = aligned(-(-min(rows, n) // 16) * panel)
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        panels = memory[: -(-(stop - start) // 16) * panel]
        panels[:] = 0
        fill_panels(ref, packer, disk, panels.ctypes.data, start, stop)
        yield panels
