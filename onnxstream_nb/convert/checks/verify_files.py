"""Whether a model's files are those that were written or downloaded: manifest, record, panels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import hub, packed_file
from ...errors import ModelError, UnsupportedError
from ...formats.external_data import resolve
from ...formats.safetensors_header import read_object
from ...graph import Graph, WeightRef
from ...progress import Report
from .finding import Counter, Finding, Findings, failed, ok, skipped

MANIFEST = "manifest.json"
FORMAT = 1
_AGAIN = "fetch the file again, or make the model again"


def manifest(path: Path, report: Report) -> Findings:
    """Every file that the manifest beside the model names, by its size and sha256."""
    folder = path if path.is_dir() else path.parent
    place = folder / MANIFEST
    if not place.is_file():
        yield skipped("manifest", f"there is no {MANIFEST} in {folder}")
        return
    files = manifest_files(place)
    if path.is_file() and path.name not in files:
        yield skipped("manifest", f"{place} does not name {path.name}")
        return
    total = sum(record.size for record in files.values())
    counter, wrong = Counter(report, "comparing hashes", total), 0
    for name, record in files.items():
        for finding in _compare("manifest", folder, name, record, counter):
            wrong += 1
            yield finding
        counter.finish(record.size)
    if not wrong:
        yield ok("manifest", f"{_count(len(files), 'file')}, {_size(total)}: sizes and sha256")


def manifest_files(place: Path) -> Mapping[str, hub.FileRecord]:
    """The files that a manifest lists, by their paths in its folder.

    Raises ModelError when it is no manifest: {"files": {PATH: {"size": N, "sha256": HEX}}}, and
    UnsupportedError for a later format.
    """
    found = read_object(place)
    if found.get("format", FORMAT) != FORMAT:
        raise UnsupportedError(f"{place}: format {found['format']!r} is not known; update this")
    listed = found.get("files")
    if not isinstance(listed, dict):
        raise ModelError(f'{place}: no manifest: it has no "files"; make the model again')
    return {name: _record(place, name, entry) for name, entry in listed.items()}


def _record(place: Path, name: str, entry: Any) -> hub.FileRecord:
    size, digest = (entry.get(k) for k in ("size", "sha256")) if isinstance(entry, dict) else "  "
    if type(size) is not int or not isinstance(digest, str):
        raise ModelError(f"{place}: {name!r} has no size and sha256; make the model again")
    return hub.FileRecord(size, f"sha256:{digest.lower()}")


def download(copy: hub.Copy | None, report: Report) -> Findings:
    """Every file of a download, by what the hub said of it; the record is not changed."""
    if copy is None:
        yield skipped("download", "the model did not come by pull")
        return
    counter, wrong = Counter(report, "comparing hashes", copy.size_bytes), 0
    for name, record in copy.files.items():
        for finding in _compare("download", copy.root, name, record, counter):
            wrong += 1
            yield finding
        counter.finish(record.size)
    if not wrong:
        untold = sum(not record.digest for record in copy.files.values())
        more = f"; no hash was told for {untold}" if untold else ""
        detail = f"{_count(len(copy.files), 'file')}, {_size(copy.size_bytes)}, as pulled{more}"
        yield ok("download", detail)


def _compare(
    check: str, folder: Path, name: str, record: hub.FileRecord, counter: Counter
) -> Findings:
    """What is wrong with one file, if anything."""
    file = folder / name
    if check == "manifest" and file.is_file():
        resolve(folder / MANIFEST, name)  # a manifest may not make us read other files
    if not file.is_file():
        yield failed(check, "the file is missing", file=file, remedy=_AGAIN)
        return
    size = file.stat().st_size
    if size != record.size:
        problem = "truncated" if size < record.size else "of another version"
        detail = f"{size} bytes instead of {record.size}: it is {problem}"
        yield failed(check, detail, file=file, remedy=_AGAIN)
        return
    found = hub.file_digest(file, record.digest, counter) if record.digest else ""
    if found != record.digest:
        detail = f"its hash is {found} instead of {record.digest}: it is damaged"
        yield failed(check, detail, file=file, remedy=_AGAIN)


def packed(graph: Graph, report: Report) -> Findings:
    """The panels that --keep-packed keeps of this model, by their checksums."""
    sources = {str(p.resolve()) for p in weight_files(graph)}
    folder, size, count, old = hub.packed_dir(), 0, 0, 0
    for path in sorted(folder.glob(f"*{packed_file.SUFFIX}")):
        try:
            header = packed_file.read_header(path)
        except ModelError:  # of which model it was, nobody can tell; the next start replaces it
            continue
        if not header.paths & sources:
            continue
        if not all(source.is_same for source in header.sources):
            old += 1
            continue
        finding = _packed(path, report)
        if finding is not None:
            yield finding
            return
        size, count = size + path.stat().st_size, count + 1
    more = f"{_count(old, 'file')} of an earlier state of the model" if old else ""
    if count:
        detail = f"{_count(count, 'file')}, {_size(size)}: checksums"
        yield ok("packed", f"{detail}; {more}" if more else detail)
    else:
        yield skipped("packed", more or "no packed weights are kept of this model")


def _packed(path: Path, report: Report) -> Finding | None:
    try:
        packed_file.verify(path, report)
    except ModelError as error:
        named = re.search(r"the packed weight (.*) is damaged", str(error))
        remedy = f"delete {path}: the next start with --keep-packed writes it anew"
        tensor = named[1] if named else ""
        return failed("packed", str(error), file=path, tensor=tensor, remedy=remedy)
    return None


def weight_files(graph: Graph) -> set[Path]:
    """The files in which the weights of a graph lie."""
    return {ref.source for ref in all_weights(graph) if isinstance(ref.source, Path)}


def all_weights(graph: Graph) -> list[WeightRef]:
    """The initializers of a graph and of the bodies in it, each stored one once."""
    found = {ref.key: ref for ref in graph.initializers.values()}
    for node in graph.nodes:
        for value in node.attributes.values():
            for body in value if isinstance(value, tuple) else (value,):
                if isinstance(body, Graph):
                    found |= {ref.key: ref for ref in all_weights(body)}
    return list(found.values())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(nbytes: int) -> str:
    from ...device import format_size

    return format_size(nbytes)
