"""The output of a conversion: a folder, or one file, that has its name only once it is complete.

Everything is written into a staging folder beside it, `.NAME.PID.partial`, which is locked while
its process lives, and renamed at the end. What a process that was killed has left is removed by
the next one that writes to the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..device import disk_free, format_size
from ..errors import DISK_FULL, OutputError, UsageError
from ..formats.sink import Data, view_of
from . import staging

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
IN_FLIGHT = 64 << 20  # bytes that wait to be written
COPY = 8 << 20  # bytes at a time


class Worker:
    """A thread that does what it is given in order, and holds up whoever gives it too much."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._in_flight = 0

    def do(self, work: Callable[[], None], nbytes: int = 0) -> None:
        """Do this behind what was given before; raises what went wrong with that."""
        self._waiting.append((self._pool.submit(work), nbytes))
        self._in_flight += nbytes
        while self._in_flight > IN_FLIGHT or (self._waiting and self._waiting[0][0].done()):
            self._settle_one()

    def settle(self) -> None:
        """Wait until all is done; raises what went wrong."""
        while self._waiting:
            self._settle_one()

    def _settle_one(self) -> None:
        done, size = self._waiting.popleft()
        self._in_flight -= size
        done.result()

    def stop(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(cancel_futures=True)


class OutputFile:
    """A file under construction, hashed as it is written: a thread does both, and another waits
    for the disk."""

    def __init__(self, path: Path, writer: Worker, syncer: Worker) -> None:
        self._file = path.open("xb", buffering=0)
        self._writer, self._syncer = writer, syncer
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """The hash of what was written, hexadecimal; all of it when the writer has settled."""
        return self._digest.hexdigest()

    def write(self, data: Data) -> None:
        """Append bytes, which must not change afterwards: they may be written later."""
        view = view_of(data)
        self.size += len(view)
        self._writer.do(partial(self._append, view), len(view))

    def _append(self, view: memoryview) -> None:
        self._digest.update(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Have it brought to the disk and closed, behind what is yet to be written."""
        self._writer.do(lambda: self._syncer.do(self._sync))

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close it, complete or not; nobody may be writing."""
        self._file.close()


class OutputFolder:
    """The staging folder `path`. `files` are those that were begun, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, OutputFile] = {}
        self.needed = 0
        self._writer, self._syncer = Worker("writer"), Worker("syncer")

    @contextmanager
    def file(self, name: str) -> Iterator[OutputFile]:
        """A new file in the folder. It need not be on the disk when the block ends."""
        file = self.files[name] = OutputFile(self.path / name, self._writer, self._syncer)
        yield file
        file.finish()

    def settle(self) -> None:
        """Wait until all files are on the disk; raises what went wrong."""
        self._writer.settle()
        self._syncer.settle()

    def close(self) -> None:
        """Let go of all files, whatever their state."""
        self._writer.stop()
        self._syncer.stop()
        for file in self.files.values():
            file.close()

    def write_text(self, name: str, text: str) -> None:
        """A file of UTF-8 text."""
        with self.file(name) as file:
            file.write(text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """A JSON file, indented."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, source: Path, name: str | None = None) -> None:
        """A copy of another file, under its own name or another."""
        with source.open("rb") as original, self.file(name or source.name) as file:
            while data := original.read(COPY):
                file.write(data)

    def reserve(self, nbytes: int) -> None:
        """Say how much will be written; raises OutputError when the disk has not so much free."""
        self.needed += nbytes
        free = disk_free(self.path)
        if nbytes > free:
            raise OutputError(
                f"{self.path.parent}: the output takes {format_size(nbytes)}, and this disk has "
                f"{format_size(free)} free; free some, or name an output on another disk"
            )


def is_file(out: Path) -> bool:
    """Whether an output of this name is one file, and not a folder."""
    return out.suffix.lower() == ".onnx"


def check_out(out: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that exists, or that holds the source; raises UsageError.

    With `overwrite`, a folder must be one that a conversion wrote: it is deleted as a whole.
    """
    if source is not None and staging.is_within(source, out):
        raise UsageError(f"-o {out}: the model that is read lies there; name another output")
    if not os.path.lexists(out):
        if out.absolute().parent.is_dir():
            return
        raise UsageError(f"-o {out}: there is no folder {out.absolute().parent}; make it first")
    if not overwrite:
        raise UsageError(f"-o {out} exists; name another output, or give --overwrite")
    if out.is_file() and not is_file(out):
        raise UsageError(
            f"-o {out}: --overwrite puts no folder in the place of a file; name another output, or "
            "one that ends in .onnx"
        )
    if out.is_dir() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise UsageError(
            f"-o {out}: --overwrite deletes a folder only if it holds a {MANIFEST}, as outputs "
            "do; delete it yourself, or name another output"
        )


@contextmanager
def output_folder(
    out: Path, *, overwrite: bool = False, single: str = "", source: Path | None = None
) -> Iterator[OutputFolder]:
    """A folder to fill, which becomes `out` when the block ends, with a manifest of its files.

    With `single`, the file of that name becomes `out`, and the others are dropped. An error or
    Ctrl-C within the block leaves nothing. Raises UsageError for what `check_out` refuses,
    OutputError when the disk is full or cannot be written to.
    """
    check_out(out, overwrite=overwrite, source=source)
    out = Path(os.path.abspath(out))
    folder: OutputFolder | None = None
    try:
        with staging.staged(out) as path:
            folder = OutputFolder(path)
            with closing(folder):
                yield folder
                folder.settle()
                if not single:
                    _write_manifest(folder)
                    folder.settle()
            check_out(out, overwrite=overwrite)
            staging.publish(path / single if single else path, out)
    except OSError as error:
        raise _output_error(out, folder, error) from error


def _write_manifest(folder: OutputFolder) -> None:
    files = {
        name: {"size": file.size, "sha256": file.sha256}
        for name, file in sorted(folder.files.items())
    }
    producer = f"onnxstream_nb {__version__}"
    folder.write_json(MANIFEST, {"format": MANIFEST_FORMAT, "producer": producer, "files": files})


def _output_error(out: Path, folder: OutputFolder | None, error: OSError) -> Exception:
    """What to raise for an error of the system, which may as well be that of reading a model."""
    if error.errno in DISK_FULL:
        needed = f"the output takes {format_size(folder.needed)}, and " if folder else ""
        return OutputError(
            f"{out}: {error.strerror}: {needed}{out.parent} has "
            f"{format_size(disk_free(out.parent))} free; free some, or name an output on another "
            "disk; nothing was left there"
        )
    if error.filename is not None and not _is_ours(Path(os.path.abspath(error.filename)), out):
        return error
    return OutputError(
        f"{out} cannot be written ({error.strerror or error}); name an output in a folder that "
        "you may write to"
    )


def _is_ours(path: Path, out: Path) -> bool:
    """Whether a path is the output, one of those that stand for it meanwhile, or in one of them."""
    first = path.relative_to(out.parent).parts[:1] if path.is_relative_to(out.parent) else ()
    return path == out.parent or any(p == out.name or p.startswith(f".{out.name}.") for p in first)
