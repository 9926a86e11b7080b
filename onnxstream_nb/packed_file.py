"""Files of packed weights: what a model's matrices are as panels, kept for the next start.

A file is a header, a JSON object behind its length, and then the panels of one matrix after the
other, each from a page on. The header says from what they were packed (which files of which size
and time, which bytes of them) and by which code, where each lies, and a checksum of each. A file is
named after all that, so that a name stands for one content: what a process has opened never
changes under it. Any of them may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError
from .files import PAGE, Files, aligned, room
from .graph import WeightRef

VERSION = 1
SUFFIX = ".panels"
MAGIC = b"\x93PANELS\n"
PREFIX = len(MAGIC) + 8  # bytes before the JSON: the magic, and the JSON's length
MOST_HEADER = 1 << 26  # bytes of a header that is looked at
READ = 8 << 20  # bytes at a time when checksums are compared
CHECKSUMS = '{"checksums": "'  # how the JSON begins
DIGITS = 8  # of a checksum, the CRC-32 of a matrix's panels


@dataclass(frozen=True, slots=True)
class Source:
    """A file that weights were packed from, as it was then."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Source:
        """The file as it is now. Raises OSError when it is not there."""
        status = os.stat(path)
        return cls(str(path), status.st_size, status.st_mtime_ns)

    @property
    def is_there(self) -> bool:
        """Whether there is still such a file, changed or not."""
        return os.path.exists(self.path)

    @property
    def is_same(self) -> bool:
        """Whether the file is still what it was, by its size and time."""
        try:
            return Source.of(Path(self.path)) == self
        except (OSError, ValueError):  # or it is no path at all
            return False


@dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix in a file: `offset` from the file's begin."""

    name: str
    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    version: int
    stamp: str
    sources: tuple[Source, ...]
    matrices: tuple[Matrix, ...]

    @property
    def paths(self) -> set[str]:
        """The files that its weights were packed from."""
        return {source.path for source in self.sources}


class PackedFile:
    """The file in `folder` that holds some weights of a model as panels; it need not be there yet.

    `refs` are those weights as the model's files have them, `panel_bytes` says how long a panel of
    each is, `stamp` stands for the code that packs them. `places` are their places in the file, by
    `WeightRef.matrix`: offset and bytes. Raises ModelError when a file of the model is missing.
    """

    def __init__(
        self,
        folder: Path,
        refs: Sequence[WeightRef],
        panel_bytes: Callable[[WeightRef], int],
        stamp: str,
    ) -> None:
        self.refs = tuple({ref.matrix: ref for ref in refs}.values())
        sources = _sources(self.refs)
        self.sources = tuple(sources.values())
        weights: list[dict[str, Any]] = []
        end = 0
        for ref in self.refs:
            panel = panel_bytes(ref)
            weights.append({
                "name": ref.name, "shape": ref.shape, "encoding": ref.encoding, "block": ref.block,
                "from": [_origin(part, sources) for part in ref.parts or (ref,)],
                "offset": end, "nbytes": -(-ref.shape[1] // 16) * panel, "panel": panel,
            })  # fmt: skip
            end = -(-(end + -(-ref.shape[1] // 16) * panel) // PAGE) * PAGE
        facts = {
            "version": VERSION, "stamp": stamp,
            "sources": [[s.path, s.size, s.mtime_ns] for s in self.sources], "weights": weights,
        }  # fmt: skip
        self._facts = json.dumps(facts)
        self.begin = -(-len(self.header(["0" * DIGITS] * len(self.refs))) // PAGE) * PAGE
        self.size = self.begin + end
        self.places = {
            ref.matrix: (self.begin + weight["offset"], weight["nbytes"])
            for ref, weight in zip(self.refs, weights, strict=True)
        }
        name = re.sub("[^A-Za-z0-9._-]+", "-", Path(self.sources[0].path).stem)[:80]
        digest = hashlib.sha256(self._facts.encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{digest}{SUFFIX}"

    def header(self, checksums: Sequence[str]) -> bytes:
        """The bytes that the file begins with."""
        text = f'{CHECKSUMS}{"".join(checksums)}", {self._facts[1:]}'.encode()
        return MAGIC + len(text).to_bytes(8, "little") + text

    def is_whole(self) -> bool:
        """Whether the file is there, says what it should, and has all of its bytes."""
        expected = self.header(["0" * DIGITS] * len(self.refs))
        start = PREFIX + len(CHECKSUMS)
        stop = start + DIGITS * len(self.refs)
        try:
            with self.path.open("rb") as file:
                size, found = os.fstat(file.fileno()).st_size, file.read(len(expected))
        except OSError:  # also one that may not be read: another is written, if that can be
            return False
        same = found[:start] == expected[:start] and found[stop:] == expected[stop:]
        return same and size == self.size and bool(re.fullmatch(rb"[0-9a-f]*", found[start:stop]))


def _sources(refs: Sequence[WeightRef]) -> dict[Path, Source]:
    """The files in which weights lie, by the paths that the references have."""
    paths = {p.source for ref in refs for p in ref.parts or (ref,) if isinstance(p.source, Path)}
    try:
        return {path: Source.of(path.resolve()) for path in sorted(paths)}
    except OSError as error:
        raise ModelError(f"{error.filename}: the weight file is missing: {error}") from error


def _origin(part: WeightRef, sources: Mapping[Path, Source]) -> list[Any]:
    """What a weight, or a part of one, is: the bytes it was read from, and how they were read."""
    if isinstance(part.source, bytes):
        data = part.source[part.offset : part.offset + part.nbytes]
        where: list[Any] = [hashlib.sha256(data).hexdigest(), 0]
    else:
        where = [list(sources).index(part.source), part.offset]
    return [*where, part.nbytes, part.encoding, part.dtype, part.shape, part.transposed]


def read_header(path: Path) -> Header:
    """What a file of packed weights says of itself. Raises ModelError when that cannot be so."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX)
            length = int.from_bytes(prefix[len(MAGIC) :], "little")
            if prefix[: len(MAGIC)] != MAGIC or length > min(size - PREFIX, MOST_HEADER):
                raise ValueError("no header")
            found = json.loads(file.read(length))
        return _parsed(found, -(-(PREFIX + length) // PAGE) * PAGE, size)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as packed weights ({error}); delete it") from error


def _parsed(found: dict[str, Any], begin: int, size: int) -> Header:
    """A header from its JSON; ValueError, TypeError or KeyError when something is amiss."""
    sources = [Source(path, nbytes, time) for path, nbytes, time in found["sources"]]
    checksums, weights = found["checksums"], found["weights"]
    digits = [checksums[i * DIGITS : (i + 1) * DIGITS] for i in range(len(weights))]
    matrices = [
        Matrix(w["name"], begin + w["offset"], w["nbytes"], checksum)
        for w, checksum in zip(weights, digits, strict=True)
    ]
    header = Header(found["version"], found["stamp"], tuple(sources), tuple(matrices))
    texts = [header.stamp, checksums, *(s.path for s in sources), *(m.name for m in matrices)]
    numbers = [header.version, *(n for s in sources for n in (s.size, s.mtime_ns))]
    numbers += [n for m in matrices for n in (m.offset, m.nbytes)]
    if not all(type(t) is str for t in texts) or not all(type(n) is int for n in numbers):
        raise TypeError("a value of another type")
    if len(checksums) != DIGITS * len(matrices) or not re.fullmatch("[0-9a-f]*", checksums):
        raise ValueError("checksums")
    if any(m.nbytes < 0 or not begin <= m.offset <= size - m.nbytes for m in matrices):
        raise ValueError("a matrix beyond its end")
    return header


def verify(path: Path, progress: Callable[[str, float | None], None] | None = None) -> None:
    """Compare all panels of a file with their checksums, past the page cache where that can be.

    Raises ModelError naming the file and the weight that is damaged.
    """
    header = read_header(path)
    total, done = sum(m.nbytes for m in header.matrices) or 1, 0
    files, memory = Files(), aligned(room(READ))
    try:
        for matrix in header.matrices:
            if progress is not None:
                progress("checking packed weights", done / total)
            ref = WeightRef(
                matrix.name, (matrix.nbytes,), "uint8", path, matrix.offset, matrix.nbytes
            )
            checksum = 0
            for at in range(0, matrix.nbytes, READ):
                stop = min(matrix.nbytes, at + READ)
                checksum = zlib.crc32(files.read_into(memory, ref, at, stop).data, checksum)
            if f"{checksum:08x}" != matrix.checksum:
                raise ModelError(f"{path}: the packed weight {matrix.name} is damaged; delete it")
            done += matrix.nbytes
    finally:
        files.close()


def remove(folder: Path, unwanted: Callable[[Header], bool]) -> int:
    """Delete the files of packed weights that are unwanted or unreadable; the bytes freed."""
    freed = 0
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            if not unwanted(read_header(path)):
                continue
        except ModelError:  # nobody can use it
            pass
        freed += path.stat().st_size
        path.unlink()
    return freed


def remove_orphans(folder: Path) -> int:
    """Delete the packed weights of models that are no more; the bytes freed."""
    return remove(folder, lambda header: not all(s.is_there for s in header.sources))
