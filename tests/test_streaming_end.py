"""How streams end: closed while they read or wait, dropped, and used all the same."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
from weight_files import WAIT, Reads, cut, expected, matrices, pieces_of, taken, until

from onnxstream_nb.streaming import READERS, StreamProvider

pytestmark = pytest.mark.usefixtures("no_endless_waits")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_closing_while_it_reads(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60, 70))
    before = threading.active_count()
    reads.gate.clear()
    provider = StreamProvider(refs, slots=2)
    provider.prefetch(refs)
    until(lambda: reads.begun == 2)
    closer = threading.Thread(target=provider.close)
    closer.start()
    time.sleep(0.02)
    assert closer.is_alive()  # a file is not closed under a read
    reads.gate.set()
    closer.join(WAIT)
    assert not closer.is_alive() and sorted(reads.names) == ["a.0", "a.1"]
    assert threading.active_count() == before


def test_closing_while_it_waits_for_room(tmp_path: Path, reads: Reads) -> None:
    before = threading.active_count()
    refs = cut(tmp_path / "a.bin", (50, 60))
    provider = StreamProvider(refs, slots=1)
    provider.prefetch(refs)
    reads.settle(1)
    assert threading.active_count() == before + READERS
    provider.close()
    assert threading.active_count() == before


def test_closing_under_who_waits(tmp_path: Path, reads: Reads) -> None:
    """Nobody waits forever for a piece that will not be read."""
    refs = cut(tmp_path / "a.bin", (50, 60))
    reads.gate.clear()
    provider = StreamProvider(refs, slots=1)
    provider.prefetch(refs)
    until(lambda: reads.begun == 1)
    got: list[bytes] = []
    asking = threading.Thread(target=lambda: got.append(taken(provider, refs[1])))
    asking.start()
    time.sleep(0.02)
    closer = threading.Thread(target=provider.close)
    closer.start()
    time.sleep(0.02)
    reads.gate.set()
    for thread in (asking, closer):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert got == [expected(refs[1])]


@pytest.mark.parametrize("started", [False, True])
def test_a_closed_provider_reads_no_further_ahead(
    started: bool, tmp_path: Path, reads: Reads
) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60))
    before = threading.active_count()
    provider = StreamProvider(refs, slots=2)
    if started:
        provider.prefetch(refs)
        reads.settle(2)
    provider.close()
    provider.prefetch(refs)
    until(lambda: threading.active_count() == before)
    reads.settle(2 * started)
    assert [taken(provider, ref) for ref in refs] == [expected(ref) for ref in refs]
    provider.close()


def test_a_provider_that_is_dropped_ends_its_threads(tmp_path: Path, reads: Reads) -> None:
    """Whether they wait for room, for work, or never began; its files are closed."""
    refs = cut(tmp_path / "a.bin", (50, 60))
    gc.collect()  # what earlier tests left open
    before, files = threading.active_count(), len(os.listdir("/dev/fd"))
    count = 0
    for use in range(3):
        provider = StreamProvider(refs, slots=2)
        provider.prefetch(refs)
        for ref in refs[:use]:
            taken(provider, ref)
        count += use + 2
        reads.settle(count)
        del provider
        gc.collect()
        until(lambda: threading.active_count() == before)
    assert taken(StreamProvider(refs), refs[0]) == expected(refs[0])
    gc.collect()
    until(lambda: len(os.listdir("/dev/fd")) == files and reads.alive == 0)


def test_a_tile_outlives_its_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who still has a weight gets the rest of it, also when the provider is gone."""
    pieces_of(monkeypatch, 64)
    (ref,) = matrices(tmp_path / "a.bin", (10, 32))
    before = threading.active_count()
    provider = StreamProvider([ref], slots=2)
    provider.prefetch([ref])
    tiles = provider.get(ref).tiles()
    found = bytes(next(tiles).buffer)
    del provider
    gc.collect()
    until(lambda: threading.active_count() == before)
    assert found + b"".join(bytes(tile.buffer) for tile in tiles) == expected(ref)
