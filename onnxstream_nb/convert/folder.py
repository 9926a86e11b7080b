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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from .. import __version__
from ..device import disk_free, format_size
from ..errors import DISK_FULL, OutputError, UsageError
from ..formats.sink import Data
from . import staging

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
IN_FLIGHT = 64 << 20  # bytes that wait to be written
COPY = 8 << 20  # bytes at a time


class OutputFile:
    """A file under construction, hashed as it is written: a thread does both, in order."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._file = path.open("xb", buffering=0)
        self._pool = pool
        self._digest = hashlib.sha256()
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._in_flight = 0
        self.size = 0

    @property
    def sha256(self) -> str:
        """The hash of what was written, hexadecimal; all of it once the file is closed."""
        return self._digest.hexdigest()

    def write(self, data: Data) -> None:
        """Append bytes, which must not change afterwards: they may be written later."""
        view = memoryview(cast(Any, data)).cast("B")
        self.size += len(view)
        self._waiting.append((self._pool.submit(self._append, view), len(view)))
        self._in_flight += len(view)
        while self._in_flight > IN_FLIGHT:
            self._settle_one()

    def _append(self, view: memoryview) -> None:
        self._digest.update(view)
        while view:
            view = view[self._file.write(view) :]

    def _settle_one(self) -> None:
        done, size = self._waiting.popleft()
        self._in_flight -= size
        done.result()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        try:
            while self._waiting and kind is None:
                self._settle_one()
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            for done, _ in self._waiting:
                done.cancel()
            self._pool.submit(self._file.close).result()  # behind what is being written


class OutputFolder:
    """The staging folder `path`. `files` are those that are complete: name -> size and hash."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self.path, self._pool = path, pool
        self.files: dict[str, dict[str, Any]] = {}
        self.needed = 0

    @contextmanager
    def file(self, name: str) -> Iterator[OutputFile]:
        """A new file in the folder, on the disk when the block ends."""
        with OutputFile(self.path / name, self._pool) as file:
            yield file
        self.files[name] = {"size": file.size, "sha256": file.sha256}

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

    @property
    def size_bytes(self) -> int:
        """All complete files together."""
        return sum(int(entry["size"]) for entry in self.files.values())


def check_out(out: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output that exists, or that holds the source; raises UsageError.

    With `overwrite`, a folder must be one that a conversion wrote: it is deleted as a whole.
    """
    if source is not None and staging.is_within(source, out):
        raise UsageError(f"-o {out}: the model that is read lies there; name another output")
    if not out.exists():
        if out.absolute().parent.is_dir():
            return
        raise UsageError(f"-o {out}: there is no folder {out.absolute().parent}; make it first")
    if not overwrite:
        raise UsageError(f"-o {out} exists; name another output, or give --overwrite")
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
    out = out.absolute()
    pool = ThreadPoolExecutor(1, "output")
    folder: OutputFolder | None = None
    try:
        with staging.staged(out) as path:
            folder = OutputFolder(path, pool)
            yield folder
            if not single:
                _write_manifest(folder)
            check_out(out, overwrite=overwrite)
            staging.publish(path / single if single else path, out)
    except OSError as error:
        raise _output_error(out, folder, error) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_manifest(folder: OutputFolder) -> None:
    files = {name: folder.files[name] for name in sorted(folder.files)}
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
    mine = (str(out), str(out.with_name(f".{out.name}.")))
    if error.filename is not None and not str(error.filename).startswith(mine):
        return error
    return OutputError(
        f"{out} cannot be written ({error.strerror or error}); name an output in a folder that "
        "you may write to"
    )
