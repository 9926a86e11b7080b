"""Every provider of weights: the bytes of the file, in any order, and errors that name it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from weight_files import Provider, Reads, closing, cut, expected, matrices, pieces_of, taken, tiled

from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.streaming import StreamProvider
from onnxstream_nb.weights import DiskProvider, MmapProvider, RamProvider

pytestmark = pytest.mark.usefixtures("no_endless_waits")

Make = Callable[[list[WeightRef]], Provider]

KINDS: dict[str, Make] = {
    "disk": lambda refs: DiskProvider(),
    "stream": lambda refs: StreamProvider(refs),
    "stream in pieces": lambda refs: StreamProvider(refs),
    "stream through one buffer": lambda refs: StreamProvider(refs, slots=1),
    "mmap": lambda refs: MmapProvider(),
    "ram": lambda refs: RamProvider(),
    "budget": lambda refs: StreamProvider(refs, held={r.matrix: 1 for r in refs[::2]}, slots=2),
}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a provider of each kind for the given references, and closes it after the test."""
    made: list[Provider] = []
    if "pieces" in request.param:
        pieces_of(monkeypatch, 1000)

    def build(refs: list[WeightRef]) -> Provider:
        made.append(KINDS[request.param](refs))
        return made[-1]

    yield build
    for provider in made:
        provider.close()


# -- every provider


def test_bytes_are_the_files_pass_after_pass(make: Make, tmp_path: Path) -> None:
    memory = WeightRef("m", (11,), "uint8", bytes(range(40)), 7, 11)
    first, second = cut(tmp_path / "a.bin"), cut(tmp_path / "bb.bin")
    refs = [r for pair in zip(first, second, strict=True) for r in (*pair, memory)]
    provider = make(refs)
    for _ in range(3):
        provider.prefetch(refs)
        for ref in refs:
            assert taken(provider, ref) == expected(ref), ref.name


def test_tiles_are_the_stored_rows_in_order(make: Make, tmp_path: Path) -> None:
    refs = matrices(tmp_path / "a.bin", (70, 31), (1, 900), (300, 1), (64, 128), (33, 999))
    provider = make(refs)
    for _ in range(3):
        provider.prefetch(refs)
        for ref in refs:
            assert tiled(provider, ref) == expected(ref), ref.name


def test_any_order_announced_or_not(make: Make, tmp_path: Path) -> None:
    refs, others = cut(tmp_path / "a.bin"), cut(tmp_path / "bb.bin")
    provider = make(refs)
    assert taken(provider, refs[3]) == expected(refs[3])  # nothing was announced
    shuffle = random.Random(3)
    for _ in range(4):
        order = refs * 2 + others[:3]
        shuffle.shuffle(order)
        provider.prefetch(refs)
        for ref in order:
            assert taken(provider, ref) == expected(ref), ref.name
    provider.prefetch([])
    assert taken(provider, refs[5]) == expected(refs[5])


def test_abandoned_pass(make: Make, tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    for stop in (1, 4, 0, 6, len(refs)):
        provider.prefetch(refs)
        for ref in refs[:stop]:
            assert taken(provider, ref) == expected(ref), ref.name


def test_two_weights_at_once(make: Make, tmp_path: Path) -> None:
    """What one reference gave stays as it is while others are read."""
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    provider.prefetch(refs)
    held = [provider.get(ref).whole() for ref in refs]
    assert [bytes(w.buffer) for w in held] == [expected(r) for r in refs]
    for ref in refs:
        provider.release(ref)


def test_tensors_without_bytes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "full.bin").write_bytes(b"abc")
    sources: list[Path | bytes] = [tmp_path / "empty.bin", tmp_path / "full.bin", b"", b"abc"]
    refs = [WeightRef(f"w{i}", (3, 0), "float32", s, 0, 0) for i, s in enumerate(sources)]
    refs.append(WeightRef("end", (0, 4), "float32", tmp_path / "full.bin", 3, 0))
    provider = make(refs)
    for _ in range(2):
        provider.prefetch(refs)
        for ref in refs:
            weight = provider.get(ref).whole()
            assert weight.buffer.nbytes == 0 and weight.stored().shape == ref.shape
            provider.release(ref)


def test_truncated_file(make: Make, tmp_path: Path) -> None:
    refs = cut(tmp_path / "short.bin", (4096, 5000, 100))
    with (tmp_path / "short.bin").open("r+b") as file:
        file.truncate(refs[1].offset + 4999)
    provider = make(refs)
    for _ in range(2):
        provider.prefetch(refs)
        assert taken(provider, refs[0]) == expected(refs[0])
        for ref in refs[1:]:
            with pytest.raises(ModelError, match=rf"short\.bin.* ends before {ref.name} .*fetch"):
                taken(provider, ref)


def test_missing_file(make: Make, tmp_path: Path) -> None:
    refs, gone = cut(tmp_path / "a.bin"), cut(tmp_path / "gone.bin")
    (tmp_path / "gone.bin").unlink()
    provider = make([refs[0], gone[1], refs[1]])
    for _ in range(2):
        provider.prefetch([refs[0], gone[1], refs[1]])
        assert taken(provider, refs[0]) == expected(refs[0])
        with pytest.raises(ModelError, match=r"gone\.bin: cannot open"):
            taken(provider, gone[1])
        assert taken(provider, refs[1]) == expected(refs[1])


@pytest.mark.parametrize("asked", [0, 1])
def test_a_file_that_came_back(asked: int, make: Make, tmp_path: Path) -> None:
    """An error belongs to the pass that met it, also what was read ahead for the next one."""
    refs = cut(tmp_path / "a.bin", (700, 800))
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").unlink()
    provider = make(refs)
    provider.prefetch(refs)
    with pytest.raises(ModelError):
        taken(provider, refs[asked])
    time.sleep(0.02)  # for a thread that reads ahead to fail too
    (tmp_path / "a.bin").write_bytes(whole)
    provider.prefetch(refs)
    assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed on Windows")
def test_file_removed_after_opening(make: Make, tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin")
    wanted = [expected(r) for r in refs]
    provider = make(refs)
    provider.prefetch(refs)
    for i in range(5):  # a stream opens the file several times
        assert taken(provider, refs[i]) == wanted[i]
    assert taken(provider, refs[0]) == wanted[0]  # and once more for what comes out of turn
    (tmp_path / "a.bin").unlink()
    provider.prefetch(refs)
    assert [taken(provider, r) for r in refs] == wanted


_AFTER_OPENING = """
import os, sys
from pathlib import Path
from onnxstream_nb import weights
from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.streaming import StreamProvider

path = Path(sys.argv[2])
size = 1 << 20
path.write_bytes(os.urandom(3 * size))
refs = [WeightRef(n, (size,), "uint8", path, i * size, size) for i, n in enumerate(["a", "b", "c"])]
provider = {
    "disk": weights.DiskProvider, "mmap": weights.MmapProvider, "ram": weights.RamProvider,
    "stream": lambda: StreamProvider(refs, slots=1),
    "budget": lambda: StreamProvider(refs, slots=1, held={refs[1].matrix: 1}),
}[sys.argv[1]]()
provider.prefetch(refs)
assert len(bytes(provider.get(refs[0]).whole().buffer)) == size
os.truncate(path, size + 10)
for ref in refs[1:]:
    try:
        provider.prefetch(refs)
        sum(provider.get(ref).whole().buffer)
    except ModelError as error:
        print(error)
provider.close()
"""


@pytest.mark.parametrize("kind", ["disk", "stream", "mmap", "ram", "budget"])
def test_file_truncated_after_opening(kind: str, tmp_path: Path) -> None:
    """In a process of its own: reading a mapped page behind the end of a file would end it."""
    done = subprocess.run(
        [sys.executable, "-c", _AFTER_OPENING, kind, str(tmp_path / "shrunk.bin")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("shrunk.bin" in line for line in lines), lines
    assert all("truncated" in line for line in lines)


def test_closing_twice(make: Make, tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin")
    provider = make(refs)
    provider.prefetch(refs)
    assert taken(provider, refs[1]) == expected(refs[1])
    provider.close()
    provider.close()


# -- keeping


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def _tied(path: Path) -> tuple[WeightRef, WeightRef]:
    path.write_bytes(np.random.default_rng(0).bytes(4 * 21 + 3))
    table = WeightRef("table", (7, 3), "float32", path, 3, 84)
    return table, WeightRef("head", (3, 7), "float32", path, 3, 84, transposed=True)


def test_ram_reads_each_weight_once(tmp_path: Path, reads: Reads) -> None:
    table, head = _tied(tmp_path / "tied.bin")
    refs = [table, *cut(tmp_path / "a.bin", (100, 33)), head]
    with closing(RamProvider()) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            for ref in refs:
                assert taken(provider, ref) == expected(ref)
        assert provider.get(table).address == provider.get(head).address
        assert reads.names == ["table", "a.0", "a.1"]
        assert provider.bytes_read == 84 + 133


def test_tied_weights_are_mapped_once(tmp_path: Path) -> None:
    table, head = _tied(tmp_path / "tied.bin")
    with closing(MmapProvider()) as provider:
        rows, columns = provider.get(table), provider.get(head)
        assert rows.address == columns.address
        assert rows.stored().shape == columns.stored().shape == (7, 3)
        assert rows.shape == columns.shape[::-1] == (7, 3)


def test_mapped_bytes_cannot_be_written(tmp_path: Path) -> None:
    ref = cut(tmp_path / "a.bin", (10,))[0]
    with closing(MmapProvider()) as provider, pytest.raises(ValueError, match="read-only"):
        provider.get(ref).buffer[0] = 1


def test_a_disk_provider_counts_every_read(tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin", (11, 222, 33))
    with closing(DiskProvider()) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]
        assert provider.bytes_read == 3 * 266
        with (tmp_path / "a.bin").open("r+b") as file:
            file.truncate(refs[1].offset)
        with pytest.raises(ModelError):
            taken(provider, refs[1])
        assert provider.bytes_read == 3 * 266  # what could not be read does not count
