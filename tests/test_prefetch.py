"""Reading ahead: in order, within the window, on a thread that can be ended at any time."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest
from weight_files import WAIT, Reads, closing, cut, expected, taken, until

from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.weights import PrefetchProvider

AHEAD = 10_000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def fitting(refs: list[WeightRef], ahead: int) -> int:
    """How many of the references may be held together, from the first on."""
    count = held = 0
    for ref in refs:
        if held and held + ref.nbytes > ahead:
            break
        count, held = count + 1, held + ref.nbytes
    return count


@pytest.mark.parametrize("ahead", [0, 1, 5003, 9001, 21_000, 10**6])
def test_reads_ahead_in_order_within_its_window(ahead: int, tmp_path: Path, reads: Reads) -> None:
    sizes = (1, 4097, 3, 9001, 257, 12345, 2, 5003)
    refs = cut(tmp_path / "a.bin", sizes)
    with closing(PrefetchProvider(ahead)) as provider:
        provider.prefetch(refs)
        for i, ref in enumerate(refs):
            count = fitting(refs[i:], ahead)
            reads.settle(i + count)
            assert reads.alive == sum(sizes[i : i + count])
            assert taken(provider, ref) == expected(ref)
        assert reads.names == [r.name for r in refs]
        assert reads.alive == 0


def test_window_holds_while_the_consumer_is_fast(tmp_path: Path, reads: Reads) -> None:
    """Beside the window there is what the consumer holds, one weight here."""
    refs = cut(tmp_path / "a.bin", (700, 300, 999, 512, 40) * 8)
    with closing(PrefetchProvider(2000)) as provider:
        for _ in range(5):
            provider.prefetch(refs)
            for ref in refs:
                assert taken(provider, ref) == expected(ref)
    assert reads.most <= 2000 + 999
    assert len(reads.names) == 5 * len(refs)


def test_a_weight_being_read_is_waited_for(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60))
    reads.gate.clear()
    with closing(PrefetchProvider(AHEAD)) as provider:
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
        reads.settle(2)
    assert reads.names == ["a.0", "a.1"]  # each once


def test_a_new_announcement_replaces_the_old(tmp_path: Path, reads: Reads) -> None:
    old, new = cut(tmp_path / "old.bin", (80, 90)), cut(tmp_path / "new.bin", (100, 70))
    with closing(PrefetchProvider(100)) as provider:
        provider.prefetch(old)
        reads.settle(1)
        provider.prefetch(new)
        reads.settle(2)
        assert reads.names == ["old.0", "new.0"] and reads.alive == 100
        assert [taken(provider, r) for r in new] == [expected(r) for r in new]


def test_a_read_that_nobody_wants_any_more_is_dropped(tmp_path: Path, reads: Reads) -> None:
    old, new = cut(tmp_path / "old.bin", (80,)), cut(tmp_path / "new.bin", (90, 70))
    reads.gate.clear()
    with closing(PrefetchProvider(100)) as provider:
        provider.prefetch(old)
        until(lambda: reads.begun == 1)
        provider.prefetch(new)
        reads.gate.set()
        reads.settle(2)
        assert reads.names == ["old.0", "new.0"] and reads.alive == 90


def test_what_an_abandoned_pass_left_does_not_fill_the_window(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (10, 20, 30, 90, 80))
    with closing(PrefetchProvider(100)) as provider:
        provider.prefetch(refs)
        for ref in refs[:3]:
            taken(provider, ref)
        reads.settle(4)  # holds the fourth
        provider.prefetch(refs)
        reads.settle(7)  # holds the first three
        assert reads.names[4:] == ["a.0", "a.1", "a.2"]
        assert reads.alive == 60


def test_announced_again_nothing_is_read_twice(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60, 70))
    with closing(PrefetchProvider(AHEAD)) as provider:
        provider.prefetch(refs)
        reads.settle(3)
        provider.prefetch(refs)
        assert [taken(provider, r) for r in refs] == [expected(r) for r in refs]
        assert len(reads.names) == 3


def test_errors_come_up_in_the_asking_thread(tmp_path: Path) -> None:
    refs = cut(tmp_path / "short.bin", (50, 60, 70))
    with (tmp_path / "short.bin").open("r+b") as file:
        file.truncate(refs[1].offset)
    failed: list[BaseException] = []
    hook, threading.excepthook = threading.excepthook, lambda args: failed.append(args.exc_value)
    try:
        with closing(PrefetchProvider(AHEAD)) as provider:
            provider.prefetch(refs)
            assert taken(provider, refs[0]) == expected(refs[0])
            for ref in (refs[2], refs[1]):
                with pytest.raises(ModelError, match=ref.name):
                    provider.get(ref)
    finally:
        threading.excepthook = hook
    assert not failed


def test_closing_while_it_reads(tmp_path: Path, reads: Reads) -> None:
    refs = cut(tmp_path / "a.bin", (50, 60, 70))
    before = threading.active_count()
    reads.gate.clear()
    provider = PrefetchProvider(AHEAD)
    provider.prefetch(refs)
    until(lambda: reads.begun == 1)
    closer = threading.Thread(target=provider.close)
    closer.start()
    time.sleep(0.02)
    assert closer.is_alive()  # a file is not closed under a read
    reads.gate.set()
    closer.join(WAIT)
    assert not closer.is_alive() and reads.names == ["a.0"]
    assert threading.active_count() == before


def test_closing_while_it_waits_for_room(tmp_path: Path, reads: Reads) -> None:
    before = threading.active_count()
    provider = PrefetchProvider(10)
    provider.prefetch(cut(tmp_path / "a.bin", (50, 60)))
    reads.settle(1)
    provider.close()
    assert threading.active_count() == before


def test_a_provider_that_is_dropped_ends_its_thread(tmp_path: Path, reads: Reads) -> None:
    """Whether it waits for room, for work, or was never asked to read ahead."""
    refs = cut(tmp_path / "a.bin", (50, 60))
    before, files = threading.active_count(), len(os.listdir("/dev/fd"))
    for ahead, read in ((10, 1), (AHEAD, 3)):
        provider = PrefetchProvider(ahead)
        provider.prefetch(refs)
        reads.settle(read)
        del provider
        gc.collect()
        until(lambda: threading.active_count() == before)
    assert taken(PrefetchProvider(AHEAD), refs[0]) == expected(refs[0])
    until(lambda: len(os.listdir("/dev/fd")) == files and reads.alive == 0)


def test_a_tied_weight_is_read_ahead_each_time(tmp_path: Path, reads: Reads) -> None:
    """Also when its first use came before the thread did."""
    first, tied, between = cut(tmp_path / "a.bin", (50, 60, 70))
    reads.gate.clear()
    with closing(PrefetchProvider(AHEAD)) as provider:
        provider.prefetch([first, tied, between, tied])
        until(lambda: reads.begun == 1)
        asking = threading.Thread(target=lambda: taken(provider, tied))
        asking.start()
        until(lambda: reads.begun == 2)
        reads.gate.set()
        asking.join(WAIT)
        until(lambda: sorted(reads.names) == ["a.0", "a.1", "a.1", "a.2"])
        assert taken(provider, tied) == expected(tied)
        assert len(reads.names) == 4


def test_many_threads_ask(tmp_path: Path) -> None:
    refs = cut(tmp_path / "a.bin", (700, 300, 999, 512, 40) * 5)
    wrong: list[str] = []
    with closing(PrefetchProvider(1500)) as provider:

        def consume(seed: int) -> None:
            order = refs * 3
            random.Random(seed).shuffle(order)
            wrong.extend(r.name for r in order if taken(provider, r) != expected(r))

        provider.prefetch(refs)
        threads = [threading.Thread(target=consume, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert not wrong
