"""Folders that hold an output while it is written, told apart by whether their process lives.

A staging folder is `.NAME.PID.partial` beside the output NAME, locked by its process. What an
output replaces is `.NAME.PID.replaced` for the moment between two renames: if the process ends
just there, the next one puts it back.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError

PARTIAL, REPLACED = ".partial", ".replaced"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new, locked staging folder for `out`, gone when the block ends; what was left by
    processes that live no more is cleaned away. Raises OutputError when one is writing there."""
    for left in _siblings(out):
        _clear(left, out)
    path, lock = _made(out.with_name(f".{out.name}.{os.getpid()}{PARTIAL}"))
    try:
        yield path
    finally:
        if path.exists():
            shutil.rmtree(path)
        if lock is not None:
            os.close(lock)


def publish(staged: Path, out: Path) -> None:
    """Rename what is complete to `out`; what was there is deleted only after that."""
    _sync(staged if staged.is_dir() else staged.parent)
    old = out.with_name(f".{out.name}.{os.getpid()}{REPLACED}")
    replaced = os.path.lexists(out)
    if replaced:
        out.rename(old)
    try:
        staged.rename(out)
    except BaseException:
        if replaced:
            old.rename(out)
        raise
    _sync(out.parent)
    if replaced:
        delete(old)


def delete(path: Path) -> None:
    """Delete a folder and what it holds, or a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_within(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies somewhere below it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _siblings(out: Path) -> list[Path]:
    found = (p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}."))
    return [p for p in found if _process(p, out) and p.suffix in (PARTIAL, REPLACED)]


def _process(path: Path, out: Path) -> int:
    """The id of the process in a sibling's name; 0 when it is another name."""
    number = path.name.removeprefix(f".{out.name}.").removesuffix(path.suffix)
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else 0


def _clear(left: Path, out: Path) -> None:
    """Remove what another process left, or put back what it was about to replace."""
    if left.suffix == REPLACED:
        if not _runs(_process(left, out)):
            delete(left) if os.path.lexists(out) else left.rename(out)
        return
    lock = _lock(left)
    if lock is None and (_can_lock() or _runs(_process(left, out))):
        raise OutputError(
            f"{out}: process {_process(left, out)} is writing it; wait for it, or name another "
            "output"
        )
    shutil.rmtree(left, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _made(path: Path) -> tuple[Path, int | None]:
    """A new folder and its lock. One that comes upon it before it is locked takes it for left."""
    while True:
        path.mkdir(exist_ok=True)
        lock = _lock(path)
        if lock is None and not _can_lock():
            return path, None
        if lock is not None and path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return path, lock
        if lock is not None:
            os.close(lock)
        time.sleep(0.01)


def _lock(path: Path) -> int | None:
    """An open, locked folder; None when another process holds the lock, or there are no locks."""
    if not _can_lock():
        return None
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def _can_lock() -> bool:
    return os.name == "posix"


def _runs(process: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Have the disk keep a folder's names."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
