"""What this machine holds: records of finished downloads and their hashes, locks, progress.

A record lists a model's files with size, hash and, once the hash was compared, the modification
time at that moment. So a start compares sizes and times only, and nothing is hashed twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import DISK_FULL, DownloadError

_INTERVAL = 0.1
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is: `file` is being fetched, the `file_index`-th (from 1) of `file_count`;
    `done_bytes` of `total_bytes` count all of the pull's files. `note` is a remark to show."""

    file: str
    done_bytes: int
    total_bytes: int
    file_index: int
    file_count: int
    note: str = ""


ProgressCallback = Callable[[Progress], None]


class Reporter:
    """Counts a pull's bytes and calls back ten times a second at most, and at its end."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self.callback = callback
        self.state = Progress("", 0, 0, 0, 0)
        self.finished_bytes = 0
        self.last = 0.0

    def begin(self, total_bytes: int, file_count: int) -> None:
        """Start counting a pull of `file_count` files."""
        self.state = Progress("", 0, total_bytes, 0, file_count)
        self.finished_bytes = 0

    def start(self, file: str) -> None:
        """The next file begins."""
        self.state = replace(self.state, file=file, file_index=self.state.file_index + 1)
        self.at(0)

    def at(self, bytes_of_file: int) -> None:
        """So many bytes of the current file are there. The count never falls: a file that is
        hashed after its download is read once more."""
        done = min(self.finished_bytes + bytes_of_file, self.state.total_bytes)
        self.state = replace(self.state, done_bytes=max(done, self.state.done_bytes))
        if time.monotonic() - self.last >= _INTERVAL:
            self._call(self.state)

    def finish(self, size: int) -> None:
        """The current file is complete and checked."""
        self.finished_bytes += size
        self.at(0)
        if self.state.file_index == self.state.file_count:
            self._call(self.state)

    def note(self, text: str) -> None:
        """A remark the user should see, whatever the interval."""
        self._call(replace(self.state, note=text))

    def _call(self, state: Progress) -> None:
        self.last = time.monotonic()
        if self.callback is not None:
            self.callback(state)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file: size, hash as `sha256:…` or `git:…` (a git blob's sha1; empty: nobody told), and
    its modification time when that hash was found right (None: not yet compared)."""

    size: int
    digest: str
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A model on this disk: `files` are relative to `root`, and so is `target`, what to load."""

    name: str
    root: Path
    target: str
    commit: str
    files: Mapping[str, FileRecord]

    @property
    def path(self) -> Path:
        """The file or folder to load."""
        return self.root / self.target

    @property
    def size_bytes(self) -> int:
        """All files together."""
        return sum(record.size for record in self.files.values())

    def complete(self) -> bool:
        """Whether every file is there, and unchanged since its hash was found right."""
        return all(unchanged(self.root / path, record) for path, record in self.files.items())

    def with_file(self, path: str, record: FileRecord) -> Copy:
        """A copy of this record with one file's entry replaced."""
        return replace(self, files={**self.files, path: record})


def unchanged(path: Path, record: FileRecord) -> bool:
    """Whether `path` is the file that was verified when `record` was made."""
    if record.mtime_ns is None or not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns)


def verify(path: Path, record: FileRecord, reporter: Reporter) -> FileRecord | None:
    """`record` with the time of this check, or None when `path` has another size or hash."""
    if unchanged(path, record):
        return record
    if not path.is_file() or path.stat().st_size != record.size:
        return None
    mtime_ns = path.stat().st_mtime_ns
    if record.digest and file_digest(path, record.digest, reporter) != record.digest:
        return None
    return replace(record, mtime_ns=mtime_ns)


class Counting(Protocol):
    """Is told how many bytes of a file were read."""

    def at(self, bytes_of_file: int, /) -> None:
        """So many."""


def file_digest(path: Path, like: str, reporter: Counting) -> str:
    """The hash of a file, of the kind that `like` is (`sha256:…` or `git:…`)."""
    kind = like.partition(":")[0]
    digest = hashlib.sha256()
    if kind == "git":
        header = b"blob %d\0" % path.stat().st_size
        digest = hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            reporter.at(file.tell())
    return f"{kind}:{digest.hexdigest()}"


def cache_dir() -> Path:
    """The folder of this program's records and files: ONNXSTREAM_CACHE, or the user's cache."""
    if chosen := os.environ.get("ONNXSTREAM_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("onnxstream_nb", appauthor=False))


def spill_dir(given: str | Path | None = None) -> Path | None:
    """The folder of keys and values that do not fit in memory: the one that was given, one in the
    cache, or None for "off"."""
    if given is None:
        return cache_dir() / "tmp"
    return None if str(given) == "off" else Path(given).expanduser()


def packed_dir() -> Path:
    """The folder of weights that are kept as they are packed for the kernels."""
    return cache_dir() / "packed"


def slug(name: str) -> str:
    """A file name for a model's name: readable, of bounded length, and never another model's."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _record_path(name: str, *, partial: bool) -> Path:
    suffix = ".partial.json" if partial else ".json"
    return cache_dir() / "models" / (slug(name) + suffix)


def read_record(name: str, *, partial: bool = False) -> Copy | None:
    """The record of a finished copy, or of one that is being fetched (`partial`)."""
    return _parse(_record_path(name, partial=partial))


def _parse(path: Path) -> Copy | None:
    """A record, or None for one that is missing or damaged: its files are then checked afresh."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in data["files"].items()}
        return Copy(data["name"], Path(data["root"]), data["target"], data["commit"], files)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_record(copy: Copy, *, partial: bool = False) -> None:
    """Store a record. A finished one replaces that of the pull that it ends."""
    path = _record_path(copy.name, partial=partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**asdict(copy), "root": str(copy.root)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
    os.replace(temporary, path)
    if not partial:
        _record_path(copy.name, partial=True).unlink(missing_ok=True)


def forget_records(name: str) -> None:
    """Remove a model's records, not its files."""
    for partial in (False, True):
        _record_path(name, partial=partial).unlink(missing_ok=True)


def records() -> list[tuple[Copy, bool]]:
    """All records by name, each with whether its pull was finished (finished ones first)."""
    paths = sorted((cache_dir() / "models").glob("*.json"))
    found = [
        (copy, not path.name.endswith(".partial.json")) for path in paths if (copy := _parse(path))
    ]
    return sorted(found, key=lambda pair: (not pair[1], pair[0].name))


@contextmanager
def hold_lock(name: str, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of a repository or model, so that two processes do not fetch the same."""
    from filelock import FileLock, Timeout

    path = cache_dir() / "locks" / (slug(name) + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = FileLock(path)
        try:
            handle.acquire(timeout=0)
        except Timeout:
            reporter.note(f"waiting for another process that is fetching {name}")
            handle.acquire()
    except OSError as error:
        raise DownloadError(
            f"the cache folder {cache_dir()} cannot be written ({error.strerror or error}): "
            "set ONNXSTREAM_CACHE to a folder that can"
        ) from error
    try:
        yield
    finally:
        handle.release()


@contextmanager
def storing(name: str) -> Iterator[None]:
    """Within, a disk that is full is a DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DownloadError(
            f"{name} could not be stored ({error}): free some space, or set ONNXSTREAM_CACHE and "
            "HF_HOME to folders on a larger disk; finished files are kept"
        ) from error


def check_disk(folder: Path, needed: int, what: str, variable: str) -> None:
    """Raise DownloadError when `needed` bytes do not fit on the disk that will hold `folder`."""
    from ..device import disk_free, format_size

    free = disk_free(folder)
    if needed > free:
        raise DownloadError(
            f"{what} needs {format_size(needed)} on the disk of {folder}, where "
            f"{format_size(free)} are free: free some, or set {variable} to a folder on a larger "
            "disk"
        )
