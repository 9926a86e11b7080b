"""The hub's cache on this disk, as huggingface_hub lays it out: what is complete, what may go."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import DownloadError, UsageError
from .selection import select
from .store import Copy, FileRecord, Reporter, read_record, verify, write_record

COMMIT = re.compile(r"[0-9a-f]{40}")


def folder_of(repository: str) -> Path:
    """The repository's folder in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repository, repo_type="model")


def set_main(repository: str, commit: str) -> None:
    """Note the commit as the branch's, as huggingface_hub does for a download by branch: without
    it the revision counts as detached, and a prune of the hub's cache would take it."""
    ref = folder_of(repository) / "refs" / "main"
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit, encoding="utf-8")


def remove_orphans(folder: Path) -> None:
    """Delete temporaries of killed downloads: those whose lock in the hub's cache is free."""
    from filelock import FileLock, Timeout

    locks = folder.parent / ".locks" / folder.name
    for temporary in (folder / "blobs").glob("*.incomplete"):
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(locks / f"{temporary.name.partition('.')[0]}.lock", timeout=0):
                temporary.unlink(missing_ok=True)
        except Timeout:  # another program is writing it at this moment
            continue


def drop(pointer: Path) -> None:
    """Remove a cached file: the link in the snapshot and each thing it leads to."""
    while pointer.is_symlink():
        target = pointer.parent / pointer.readlink()
        pointer.unlink()
        pointer = target
    pointer.unlink(missing_ok=True)


def from_cache(name: str, repository: str, suffix: str, reason: str, reporter: Reporter) -> Copy:
    """A copy that is complete without the hub; DownloadError when there is none."""
    copy = _recorded(name) or _snapshot(name, repository, suffix)
    if copy is None:
        raise DownloadError(
            f"the hub cannot be asked for {name} ({reason}), and the cache holds no complete copy: "
            "connect, unset HF_HUB_OFFLINE if it is set, and run the same command again"
        )
    reporter.begin(copy.size_bytes, len(copy.files))
    for path, record in copy.files.items():
        reporter.start(path)
        checked = verify(copy.root / path, record, reporter)
        if checked is None:
            raise DownloadError(
                f"{copy.root / path} is damaged, and the hub cannot be asked for it ({reason}): "
                "connect and run the same command again"
            )
        copy = copy.with_file(path, checked)
        reporter.finish(record.size)
    write_record(copy)
    return copy


def _recorded(name: str) -> Copy | None:
    """A recorded copy of which every file is there."""
    for copy in (read_record(name), read_record(name, partial=True)):
        if copy and all((copy.root / path).is_file() for path in copy.files):
            return copy
    return None


def _snapshot(name: str, repository: str, suffix: str) -> Copy | None:
    """A copy another program left in the hub's cache, of a kind whose completeness shows: a GGUF
    is one file, and shards say how many they are."""
    folder = folder_of(repository)
    ref = folder / "refs" / "main"
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    root = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not root.is_dir():
        return None
    paths = [path for path in root.rglob("*") if path.is_file()]
    files = {path.relative_to(root).as_posix(): _cached_record(path) for path in paths}
    try:
        chosen = select(repository, {path: r.size for path, r in files.items()}, suffix)
    except (UsageError, DownloadError):  # the cache holds another part of the repository
        return None
    if chosen.kind not in ("gguf", "safetensors"):
        return None
    return Copy(name, root, chosen.target, commit, {path: files[path] for path in chosen.files})


def _cached_record(pointer: Path) -> FileRecord:
    """A cached file with the hash after which the hub's cache names its blob, where it does."""
    name = pointer.readlink().name if pointer.is_symlink() else ""
    kind = {64: "sha256:", 40: "git:"}.get(len(name) if re.fullmatch(r"[0-9a-f]+", name) else 0)
    return FileRecord(pointer.stat().st_size, kind + name if kind else "")


def delete(copy: Copy, keep: set[Path]) -> int:
    """Remove a copy's files from the hub's cache but for those in `keep`, and return the bytes
    freed. When nothing else is in its revision, that goes as a whole."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    cache = copy.root.parents[2]
    remove_orphans(copy.root.parents[1])
    try:
        scan = scan_cache_dir(cache)
    except CacheNotFound:
        return 0
    ours = {copy.root / path for path in copy.files} - keep
    here = [
        revision
        for repo in scan.repos
        for revision in repo.revisions
        if revision.snapshot_path == copy.root
    ]
    files = [file for revision in here for file in revision.files]
    mine = [file for file in files if file.file_path in ours]
    whole = here and len(mine) == len(files)
    plan = scan.delete_revisions(copy.commit) if whole else scan.delete_files(*mine)
    plan.execute()
    return int(plan.expected_freed_size)
