"""Hub repositories: listing, downloading and checking through huggingface_hub, and its cache.

A pull keeps a partial record while it lasts. huggingface_hub moves a file into its cache only when
it is whole, so after an interruption the finished files stay, and the interrupted one restarts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import DISK_FULL, DownloadError
from .cache import COMMIT, drop, folder_of, from_cache, remove_orphans, set_main
from .selection import select
from .store import (
    Copy,
    FileRecord,
    Reporter,
    check_disk,
    file_digest,
    read_record,
    unchanged,
    verify,
    write_record,
)


class Unreachable(Exception):
    """The hub cannot be asked: offline by choice, or no answer."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository's files at one commit."""

    commit: str
    files: dict[str, FileRecord]


def fetch(name: str, repository: str, suffix: str, reporter: Reporter) -> Copy:
    """The copy of `repository`'s newest revision, downloading what is missing; without the hub,
    what is complete in the cache. The caller holds the repository's lock.

    Raises DownloadError, or what `select` raises about `suffix`.
    """
    try:
        listing = list_files(repository)
    except Unreachable as reason:
        return from_cache(name, repository, suffix, str(reason), reporter)
    sizes = {path: record.size for path, record in listing.files.items()}
    chosen = select(repository, sizes, suffix)
    files = {path: listing.files[path] for path in chosen.files}
    root = folder_of(repository) / "snapshots" / listing.commit
    copy = _with_known_checks(Copy(name, root, chosen.target, listing.commit, files))
    _check_room(copy, repository, reporter)
    write_record(copy, partial=True)
    remove_orphans(folder_of(repository))
    reporter.begin(copy.size_bytes, len(files))
    for path in files:
        copy = copy.with_file(path, _download(copy, repository, path, reporter))
        write_record(copy, partial=True)
    set_main(repository, listing.commit)
    write_record(copy)
    return copy


def list_files(repository: str) -> Listing:
    """The newest commit of a repository and its files with the hub's sizes and hashes."""
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="onnxstream_nb")
    try:
        info = api.repo_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        tree = list(api.list_repo_tree(repository, revision=info.sha, recursive=True))
    except GatedRepoError as error:
        raise _gated(repository) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no file or folder {repository!r} here, and no such model on the hub "
            "(a private one needs HF_TOKEN)"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (408, 429) or error.response.status_code >= 500:
            raise Unreachable(f"the hub answered {error.response.status_code}") from error
        raise DownloadError(f"{repository}: {_first_line(error)}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise Unreachable(_first_line(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{repository}: {constants.ENDPOINT} does not answer as a hub does: check HF_ENDPOINT"
        ) from error
    if not COMMIT.fullmatch(info.sha or ""):
        raise DownloadError(f"{repository}: the hub names {info.sha!r} as a commit, which is none")
    files = {entry.path: _record(entry) for entry in tree if isinstance(entry, RepoFile)}
    return Listing(str(info.sha), files)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _gated(repository: str) -> DownloadError:
    return DownloadError(f"{repository} is gated: accept its terms on the hub, then set HF_TOKEN")


def _record(entry: Any) -> FileRecord:
    """A listed file: large ones have a sha256, the others are git blobs."""
    if entry.lfs is not None:
        return FileRecord(entry.lfs.size, f"sha256:{entry.lfs.sha256}")
    return FileRecord(entry.size, f"git:{entry.blob_id}")


def _with_known_checks(copy: Copy) -> Copy:
    """`copy` with the checks that earlier records hold of the very same files."""
    for known in (read_record(copy.name), read_record(copy.name, partial=True)):
        for path, record in (known.files if known and known.root == copy.root else {}).items():
            if path in copy.files and replace(record, mtime_ns=None) == copy.files[path]:
                copy = copy.with_file(path, record)
    return copy


def _check_room(copy: Copy, repository: str, reporter: Reporter) -> None:
    """Raise when the missing files do not fit on the disk; remark on a model beyond memory."""
    from ..device import format_size, memory_total

    missing = [r.size for path, r in copy.files.items() if not (copy.root / path).exists()]
    check_disk(folder_of(repository), sum(missing), copy.name, "HF_HOME")
    if copy.size_bytes > memory_total():
        reporter.note(
            f"{copy.name} ({format_size(copy.size_bytes)}) is larger than this machine's "
            f"memory ({format_size(memory_total())}): its weights will be streamed from disk"
        )


def _download(copy: Copy, repository: str, path: str, reporter: Reporter) -> FileRecord:
    """The record of a file that is now in the cache and has the hub's hash."""
    record, pointer = copy.files[path], copy.root / path
    reporter.start(path)
    if not unchanged(pointer, record):
        if pointer.exists() and verify(pointer, record, reporter) is None:
            drop(pointer)  # damaged since, or another program's
        _hub_download(copy, repository, path, reporter)
        checked = verify(pointer, record, reporter)
        if checked is None:
            found = "nothing"
            if pointer.is_file():
                found = file_digest(pointer, record.digest, reporter)
            drop(pointer)
            raise DownloadError(
                f"{repository}: {path} is not what the hub says: it should be {record.digest} "
                f"({record.size} bytes) and came as {found}; it was removed, try again later"
            )
        record = checked
    reporter.finish(record.size)
    return record


def _hub_download(copy: Copy, repository: str, path: str, reporter: Reporter) -> None:
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    bar: Any = _bar_class(reporter)
    try:
        hf_hub_download(
            repository, path, revision=copy.commit, tqdm_class=bar, library_name="onnxstream_nb"
        )
    except GatedRepoError as error:
        raise _gated(repository) from error
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise  # the caller says what to do
        raise DownloadError(
            f"{repository}: {path} could not be fetched ({_first_line(error)}); finished files "
            "are kept: run the same command again"
        ) from error


def _bar_class(reporter: Reporter) -> type:
    """A class with what huggingface_hub calls of a progress bar, which draws nothing."""

    class Bar:
        def __init__(self, *, initial: int = 0, total: int | None = None, **_: object) -> None:
            self.n, self.total = initial, total

        def update(self, amount: float | None = 1) -> None:
            self.n += int(amount or 0)
            reporter.at(self.n)

        def update_transfer(self, amount: float | None = 1) -> None:
            """Bytes on the wire, of which fewer may be needed than are written."""

        def set_postfix_str(self, *_: object, **__: object) -> None:
            """A rate, which the reader of our progress computes."""

        set_transfer_postfix_str = set_postfix_str

        def close(self) -> None:
            """Nothing is drawn."""

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing is drawn."""

    return Bar
