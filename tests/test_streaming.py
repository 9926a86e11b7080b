"""The ring of a stream: what is read when, into which buffers, and what is never read over."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from weight_files import (
    WAIT,
    Provider,
    Reads,
    closing,
    cut,
    expected,
    matrices,
    pieces_of,
    taken,
    tiled,
    until,
)  # fmt: skip

from onnxstream_nb import streaming
from onnxstream_nb.files import room
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.streaming import Piece, StreamProvider

pytestmark = pytest.mark.usefixtures("no_endless_waits")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def one_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads happen in their order."""
    monkeypatch.setattr(streaming, "READERS", 1)


# -- pieces


@pytest.mark.parametrize("size", [1, 40, 41, 1279, 1280, 1281, 4000, 10**9])
@pytest.mark.parametrize("held", [0, 1, 32, 64, 99, 100])
def test_a_matrix_is_cut_between_rows(size: int, held: int) -> None:
    ref = WeightRef("w", (40, 100), "uint8", Path("nowhere"), 7, 4000, transposed=True)
    pieces = streaming.cut(ref, held, size)
    if size < 40:  # a row has no room: it comes in bytes
        assert not streaming.by_rows(ref, size)
        assert _stretches(pieces) == [(7 + at, 8 + at) for at in range(4000)]
        return
    assert streaming.by_rows(ref, size)
    first = held
    for piece in pieces:
        rows = piece.ref.stored_shape[0]
        assert piece.first == first and piece.ref == ref.rows(first, first + rows)
        assert (piece.start, piece.stop) == (0, 40 * rows) and piece.nbytes <= size
        assert size < 32 * 40 or rows % 32 == 0 or first + rows == 100
        first += rows
    assert first == 100
    assert len({piece.nbytes for piece in pieces[:-1]}) <= 1


def _stretches(pieces: tuple[Piece, ...]) -> list[tuple[int, int]]:
    return [(p.ref.offset + p.start, p.ref.offset + p.stop) for p in pieces]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100])
def test_other_tensors_and_parts_are_cut_into_bytes(size: int) -> None:
    vector = WeightRef("v", (23,), "uint8", Path("nowhere"), 3, 23)
    where = [(3 + at, min(26, 3 + at + size)) for at in range(0, 23, size)]
    assert _stretches(streaming.cut(vector, 0, size)) == where
    scales = WeightRef("s", (1, 9), "uint8", Path("nowhere"), 100, 9)
    both = WeightRef("w", (23, 9), "float32", b"", 0, 32, "affine8", parts=(vector, scales))
    more = [(100 + at, min(109, 100 + at + size)) for at in range(0, 9, size)]
    assert _stretches(streaming.cut(both, 0, size)) == where + more


# -- what is read when


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 40])
def test_reads_as_far_ahead_as_there_are_buffers(
    slots: int, tmp_path: Path, reads: Reads, one_reader: None
) -> None:
    """In order, and behind the end of a pass what the next one begins with."""
    refs = matrices(tmp_path / "a.bin", (1, 1), (1, 4097), (3, 1), (1, 9001), (1, 257))
    with closing(StreamProvider(refs, slots=slots)) as provider:
        assert reads.begun == 0
        for used in range(0, 15, 5):
            provider.prefetch(refs)
            for i, ref in enumerate(refs):
                reads.settle(used + i + slots)
                with_it = provider.get(ref).tiles()
                assert bytes(next(with_it).buffer) == expected(ref)
                with_it.close()
        reads.settle(15 + slots)
        assert reads.names == [refs[i % 5].name for i in range(15 + slots)]
        assert len(reads.slots) <= slots and reads.alive == 0
        assert provider.bytes_read == sum(refs[i % 5].nbytes for i in range(15 + slots))
        assert provider.bytes_a_pass == sum(ref.nbytes for ref in refs)
        assert provider.reading == refs[(14 + slots) % 5].name


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_a_tile_in_use_is_never_read_over(
    slots: int, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While readers are fast and the consumer is slow, it has its buffer to itself."""
    pieces_of(monkeypatch, 2048)
    refs = matrices(tmp_path / "a.bin", (64, 100), (300, 33), (7, 2000), (1, 2048))
    with closing(StreamProvider(refs, slots=slots)) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            for ref in refs:
                data = b""
                for tile in provider.get(ref).tiles():
                    with reads.using(tile):
                        before = bytes(tile.buffer)
                        time.sleep(0.0005)
                        assert bytes(tile.buffer) == before
                    data += before
                assert data == expected(ref)
    assert len(reads.slots) <= slots
    assert max(reads.slots) - min(reads.slots) <= (slots - 1) * room(2048)


def test_a_piece_being_read_is_waited_for(tmp_path: Path, reads: Reads, one_reader: None) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60))
    reads.gate.clear()
    with closing(StreamProvider(refs, slots=2)) as provider:
        provider.prefetch(refs)
        until(lambda: reads.begun == 1)
        got: list[bytes] = []
        asking = threading.Thread(target=lambda: got.append(taken(provider, refs[0])))
        asking.start()
        time.sleep(0.02)
        assert not got
        reads.gate.set()
        asking.join(WAIT)
        assert got == [expected(refs[0])]
        reads.settle(3)
    assert reads.names == ["a.0", "a.1", "a.0"]


def test_a_pass_that_begins_again_keeps_what_was_read_for_it(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60, 70))
    with closing(StreamProvider(refs, slots=3)) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            reads.settle(3)
        assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]
        reads.settle(6)
        provider.prefetch(refs)
        reads.settle(6)
        assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_abandoned_pass_leaves_nothing_behind(
    after: int, tmp_path: Path, reads: Reads, one_reader: None
) -> None:
    """Neither in the buffers nor of what is being read while the next one begins."""
    refs = cut(tmp_path / "a.bin", (10, 20, 30, 90, 80))
    with closing(StreamProvider(refs, slots=2)) as provider:
        provider.prefetch(refs)
        for ref in refs[:after]:
            assert taken(provider, ref) == expected(ref)
        reads.settle(after + 2)
        reads.gate.clear()
        assert taken(provider, refs[after]) == expected(refs[after])
        until(lambda: reads.begun == after + 3)
        provider.prefetch(refs)
        reads.gate.set()
        reads.settle(after + 3 + 2)
        assert reads.names[after + 3 :] == ["a.0", "a.1"]
        assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]
        reads.settle(after + 3 + 2 + 5)
    assert len(reads.slots) == 2


@pytest.mark.parametrize("slots", [1, 2, 5, 20])
def test_pieces_that_are_skipped_make_room(slots: int, tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (11, 12, 13, 14, 15, 16, 17, 18))
    with closing(StreamProvider(refs, slots=slots)) as provider:
        for wanted in ((0, 5, 7), (7,), (1, 2), (), (3, 4, 6), range(8)):
            provider.prefetch(refs)
            for i in wanted:
                assert taken(provider, refs[i]) == expected(refs[i])
    assert len(reads.slots) <= slots


def test_what_was_skipped_does_not_hold_up_what_comes(
    tmp_path: Path, reads: Reads, one_reader: None
) -> None:
    """The buffers of what was not wanted are read into while the consumer is at work."""
    refs = matrices(tmp_path / "a.bin", *[(1, n) for n in range(11, 19)])
    with closing(StreamProvider(refs, slots=4)) as provider:
        provider.prefetch(refs)
        reads.settle(4)
        tiles = provider.get(refs[3]).tiles()
        assert bytes(next(tiles).buffer) == expected(refs[3])
        reads.settle(7)
        tiles.close()


def test_out_of_turn_is_read_for_itself_and_counted(
    tmp_path: Path, reads: Reads, one_reader: None
) -> None:
    refs, others = cut(tmp_path / "a.bin", (50, 60, 70)), cut(tmp_path / "bb.bin", (80,))
    with closing(StreamProvider(refs, slots=1)) as provider:
        assert taken(provider, refs[1]) == expected(refs[1])  # nothing was announced
        assert provider.bytes_read == 60
        provider.prefetch(refs)
        for ref in (refs[1], refs[0], refs[1], others[0], refs[2]):
            assert taken(provider, ref) == expected(ref)
        reads.settle(1 + 3 + 3 + 1)  # in turn, out of turn, and ahead for the next pass
        assert provider.bytes_read == 60 + (50 + 60 + 70) + (50 + 60 + 80) + 50


def test_a_weight_comes_as_often_as_it_is_used(
    tmp_path: Path, reads: Reads, one_reader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in a row, or with others between; each time by the ring."""
    pieces_of(monkeypatch, 512)
    a, b = matrices(tmp_path / "a.bin", (33, 64), (20, 30))
    order = [a, b, a, a, b, a]
    with closing(StreamProvider(order, slots=3)) as provider:
        for _ in range(2):
            provider.prefetch(order)
            for ref in order:
                assert tiled(provider, ref) == expected(ref)
        each = [piece.ref.name for ref in order for piece in streaming.cut(ref)]
        reads.settle(2 * len(each) + 3)
        assert reads.names == (each * 3)[: 2 * len(each) + 3]


def test_tied_weights_of_two_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_of(monkeypatch, 100)
    (rows,) = matrices(tmp_path / "a.bin", (33, 20))
    columns = WeightRef("t", (20, 33), "uint8", rows.source, rows.offset, 660, transposed=True)
    with closing(StreamProvider([rows, columns], slots=2)) as provider:
        for _ in range(2):
            provider.prefetch([rows, columns])
            assert tiled(provider, rows) == tiled(provider, columns) == expected(rows)


def test_held_rows_come_from_memory(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read once; the others in every pass, and those alone count for one."""
    pieces_of(monkeypatch, 320)
    refs = matrices(tmp_path / "a.bin", (64, 10), (70, 10), (9, 10), (30, 10))
    held = {refs[0].matrix: 64, refs[1].matrix: 32, refs[2].matrix: 9}
    with closing(StreamProvider(refs, slots=3, held=held)) as provider:
        for _ in range(4):
            provider.prefetch(refs)
            for i, ref in enumerate(refs):
                assert (taken if i % 2 else tiled)(provider, ref) == expected(ref)
        reads.settle(3 + 4 * 3 + 3)
        assert provider.bytes_a_pass == 380 + 300
        assert provider.bytes_read == 640 + 320 + 90 + 5 * 680
        assert [provider.get(r).lasting for r in refs] == [True, False, True, False]
    everything = {ref.matrix: ref.shape[0] for ref in refs}
    with closing(StreamProvider(refs, held=everything)) as provider:
        assert provider.get(refs[1]).lasting and provider.bytes_a_pass == 0
        assert provider.get(refs[1]).address == provider.get(refs[1]).address


def test_many_threads_ask(tmp_path: Path) -> None:
    """One consumer reads ahead, others may ask for anything: all get the file's bytes."""
    refs = cut(tmp_path / "a.bin", (700, 300, 999, 512, 40) * 5)
    wrong: list[str] = []
    provider: Provider = StreamProvider(refs, slots=3)

    def consume(seed: int, orders: Any) -> None:
        for order in orders:
            provider.prefetch(refs)
            wrong.extend(r.name for r in order if taken(provider, r) != expected(r))

    def shuffled(seed: int) -> list[WeightRef]:
        return random.Random(seed).sample(refs, len(refs))

    with closing(provider):
        threads = [
            threading.Thread(target=consume, args=(i, [shuffled(3 * i + j) for j in range(3)]))
            for i in range(4)
        ]
        threads.append(threading.Thread(target=consume, args=(9, [refs] * 3)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong
