"""A language model whose weights are streamed: what it says of its reading, and what is left when
a pass is given up or fails, at any read."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_chat import Talk
from streamed_chat import write_model

from onnxstream_nb.errors import Interrupted, ModelError
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.lookup import fetch_all
from onnxstream_nb.model import Model
from onnxstream_nb.progress import Reading

IDS = [(7 * i + 3) % 400 for i in range(40)]
CHUNK = 16  # of a prompt, so that it takes several passes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf")


class Disk:
    """os.preadv that waits for `pause`, and calls `at` before the read whose turn it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        self.at: Callable[[int], None] = lambda read: None
        self._real, self._lock = os.preadv, threading.Lock()
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        with self._lock:
            self.reads += 1
            read = self.reads
        self.at(read)
        return self._real(descriptor, buffers, offset, *flags)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def fail(read: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def opened(path: Path) -> LanguageModel:
    model = LanguageModel(path, load="stream", threads=1, precision="exact")
    model.chunk = CHUNK
    return model


def fed(model: LanguageModel, ids: list[int], stop: threading.Event | None = None) -> Any:
    """The logits after a prompt and two more tokens, going on from what is in the cache."""
    logits = []
    if len(model.tokens) < len(ids) - 2:
        logits.append(model.feed(ids[len(model.tokens) : -2], stop))
    logits += [model.feed([i], stop) for i in ids[len(model.tokens) :]]
    return logits[-1]


@pytest.fixture(scope="module")
def wanted(path: Path) -> Any:
    model = opened(path)
    logits = fed(model, IDS)
    model.close()
    return logits


# -- faults and interruptions at any read


@pytest.mark.parametrize("first", [1, 2, 30, 33, 61, 70, 120, 171, 200, 300])
def test_a_read_that_fails_leaves_a_model_that_goes_on(
    first: int, path: Path, disk: Disk, wanted: Any
) -> None:
    """`tokens` says how far it came, and going on from there gives the same, to the last bit."""
    model = opened(path)
    start = disk.reads
    disk.at = lambda read: fail(read) if start + first <= read < start + first + 40 else None
    failures = 0
    while len(model.tokens) < len(IDS):
        known = len(model.tokens)
        try:
            logits = fed(model, IDS)
        except ModelError as error:
            failures += 1
            assert "m.gguf: " in str(error) and "Input/output error; look after" in str(error)
            assert model.tokens == IDS[: len(model.tokens)] and len(model.tokens) >= known
            assert model.reading() is None
        assert failures < 50
    assert failures
    np.testing.assert_array_equal(logits, wanted)
    model.close()


@pytest.mark.parametrize("first", [1, 2, 31, 64, 130, 171, 200])
def test_a_stop_at_any_read_leaves_a_model_that_goes_on(
    first: int, path: Path, disk: Disk, wanted: Any
) -> None:
    model, stop = opened(path), threading.Event()
    start = disk.reads
    disk.at = lambda read: stop.set() if read >= start + first else None
    with pytest.raises(Interrupted):
        fed(model, IDS, stop)
    assert model.tokens == IDS[: len(model.tokens)]
    disk.at = lambda read: None
    np.testing.assert_array_equal(fed(model, IDS), wanted)
    model.close()


@pytest.mark.parametrize("hangs", ["rows of the embedding", "pieces"])
def test_a_disk_that_does_not_answer_can_be_left(
    hangs: str, path: Path, disk: Disk, wanted: Any
) -> None:
    model, stop, mended = opened(path), threading.Event(), threading.Event()
    model.feed(IDS[:CHUNK])
    if hangs == "pieces":
        table = model.session.provider.get(model.session.plan.tables[0])
        rows = table.read_rows(IDS)  # type: ignore[misc]
        table.read_rows = lambda ids: rows[: len(list(ids))]
    disk.at = lambda read: void(mended.wait())
    threading.Timer(0.3, stop.set).start()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        model.feed(IDS[CHUNK : 2 * CHUNK], stop)
    assert 0.2 < time.monotonic() - started < 5
    assert model.tokens == IDS[:CHUNK]
    mended.set()
    np.testing.assert_array_equal(fed(model, IDS), wanted)
    model.close()


def void(_: object) -> None: ...


def test_closing_does_not_wait_for_a_disk_that_does_not_answer(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxstream_nb.streaming.CLOSING_S", 0.05)
    model, stop, mended = opened(path), threading.Event(), threading.Event()
    disk.at = lambda read: void(mended.wait())
    stop.set()
    with pytest.raises(Interrupted):
        model.feed(IDS, stop)
    started = time.monotonic()
    model.close()
    assert time.monotonic() - started < 5
    mended.set()


def test_no_buffer_is_lost_by_faults(path: Path, disk: Disk, wanted: Any) -> None:
    model, stop = opened(path), threading.Event()
    for i in range(60):
        start = disk.reads
        disk.at = lambda read, n=start + 1 + 5 * i, f=fail: f(read) if read == n else None  # type: ignore[misc]
        try:
            model.feed(IDS[:3], stop)
        except ModelError:
            continue
    disk.at = lambda read: None
    model.rewind(0)
    np.testing.assert_array_equal(fed(model, IDS), wanted)
    ring = model.session.provider._ring  # type: ignore[attr-defined]
    end = time.monotonic() + 10
    while len(ring._ready) < len(ring._memory) and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted([s for s, _ in ring._ready.values()]) == list(range(len(ring._memory)))
    model.close()


# -- many reads at a time


def test_fetching_keeps_the_order_and_raises_what_was_raised() -> None:
    stop = threading.Event()
    assert fetch_all(lambda i: i * i, range(50), stop) == [i * i for i in range(50)]
    assert fetch_all(fail, [], stop) == []
    with pytest.raises(OSError, match="Input/output"):
        fetch_all(fail, [1, 2, 3], stop)
    stop.set()
    with pytest.raises(Interrupted):
        fetch_all(lambda i: i, [1], stop)


def test_fetching_reads_several_at_a_time() -> None:
    together = threading.Barrier(4, timeout=10)
    assert sorted(fetch_all(lambda i: void(together.wait()) or i, range(8), threading.Event())) == (
        list(range(8))
    )


# -- what it says of its reading


def test_what_is_being_read(path: Path, disk: Disk) -> None:
    model = opened(path)
    assert model.reading() is None and model.bytes_streamed == 0
    model.feed(IDS[:4])
    seen: list[Reading] = []
    pause = threading.Event()

    def look(read: int) -> None:
        pause.wait(0.002)
        if (at := model.reading()) is not None:
            seen.append(at)

    disk.at = look
    model.feed(IDS[4:40])
    assert model.reading() is None
    provider: Any = model.session.provider
    assert {at.wanted for at in seen} == {40} and {at.pass_bytes for at in seen} == {
        provider.bytes_a_pass
    }
    assert {(at.tokens, at.now) for at in seen} == {(4, 16), (20, 16), (36, 4)}
    for before, at in zip(seen, seen[1:], strict=False):
        assert at.bytes_read >= before.bytes_read and at.tokens_read >= before.tokens_read
        assert 0 <= at.pass_read <= at.pass_bytes
    assert any(at.weight.startswith("blk.3.") for at in seen)
    assert max(at.pass_read for at in seen) > 0.5 * provider.bytes_a_pass
    model.close()


def test_weights_in_memory_are_not_streamed(path: Path) -> None:
    model = LanguageModel(path, load="ram", threads=1)
    model.feed(IDS)
    assert model.bytes_streamed == 0
    model.close()


# -- a chat in this process


def test_a_chat_over_a_disk_that_fails_at_any_read(
    path: Path, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message is kept, the error is one line, and /regen answers when the disk works again."""
    monkeypatch.setenv("ONNXSTREAM_DATA", str(tmp_path))
    talk = Talk()
    talk.model = talk.conversation.model = Model.load(path, load="stream", threads=1)
    talk.conversation.settings = {"max_tokens": 3, "temperature": 0}
    talk.say("first")
    for first in (1, 3, 40, 80, 120):
        talk.err, talk.out  # noqa: B018
        start = disk.reads
        disk.at = lambda read, n=start + first: fail(read) if read >= n else None  # type: ignore[misc]
        assert talk.say("again") == 2
        errors = [line for line in talk.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "look after the disk, then try again" in errors[0]
        disk.at = lambda read: None
        assert talk.say("/regen") == 0
        assert "streamed " in talk.err
        assert talk.said[-2] == "again"
    assert [text for text in talk.said if text == "again"] == ["again"] * 5
    stats = talk.conversation.last
    assert stats is not None and stats.bytes_read > 2 * talk.model.llm.bytes_per_token
    talk.model.close()
