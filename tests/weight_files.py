"""Files cut into weights, and a watch on what is read of them, for the tests of providers."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxstream_nb import device, files, loading, streaming
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.weights import Weight

SIZES = (1, 4097, 3, 9001, 0, 257, 12345, 2, 5003)
WAIT = 10.0  # seconds; only a failing test waits that long

Provider = Any
Array = np.ndarray[Any, Any]


def cut(path: Path, sizes: tuple[int, ...] = SIZES, gap: int = 5) -> list[WeightRef]:
    """A file of random bytes and references to pieces of it, at odd offsets."""
    rng = np.random.default_rng(len(path.name) + sum(sizes))
    path.write_bytes(rng.bytes(sum(sizes) + gap * (len(sizes) + 1)))
    refs, offset = [], gap
    for i, size in enumerate(sizes):
        refs.append(WeightRef(f"{path.stem}.{i}", (size,), "uint8", path, offset, size))
        offset += size + gap
    return refs


def matrices(path: Path, *shapes: tuple[int, int], gap: int = 5) -> list[WeightRef]:
    """A file of matrices of bytes, of which streams may hold or read some rows."""
    refs = cut(path, tuple(rows * width for rows, width in shapes), gap)
    return [
        WeightRef(ref.name, shape, "uint8", path, ref.offset, ref.nbytes)
        for ref, shape in zip(refs, shapes, strict=True)
    ]


def expected(ref: WeightRef) -> bytes:
    data = ref.source if isinstance(ref.source, bytes) else ref.source.read_bytes()
    return data[ref.offset : ref.offset + ref.nbytes]


def taken(provider: Provider, ref: WeightRef) -> bytes:
    """The bytes that a provider gives, released again."""
    weight = provider.get(ref)
    assert isinstance(weight, Weight) and weight.ref == ref
    whole = weight.whole()
    assert whole.buffer.dtype == np.uint8 and whole.buffer.ndim == 1 and whole.ref == ref
    assert not ref.nbytes or whole.address == whole.buffer.__array_interface__["data"][0]
    data = bytes(whole.buffer)
    provider.release(ref)
    return data


def tiled(provider: Provider, ref: WeightRef) -> bytes:
    """The same, tile by tile; each says where it lies in the weight."""
    found, row = b"", 0
    for tile in provider.get(ref).tiles():
        assert tile.first == row and tile.buffer.nbytes == tile.ref.nbytes
        assert tile.address == tile.buffer.__array_interface__["data"][0]
        row += tile.ref.stored_shape[0]
        found += bytes(tile.buffer)
    provider.release(ref)
    return found


@contextmanager
def closing(provider: Provider) -> Iterator[Provider]:
    try:
        yield provider
    finally:
        provider.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


class _Patience(threading.Condition):
    """Whoever waits for a reader gives up some time; readers themselves wait for work."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is not None or threading.current_thread().daemon:
            return super().wait(timeout)
        assert super().wait(6 * WAIT), "waited in vain for a piece"
        return True


def wait_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that never gives a piece fails the test."""
    own = SimpleNamespace(**{**vars(threading), "Condition": _Patience})
    monkeypatch.setattr(streaming, "threading", own)


def process_of(monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    """A process that takes so many bytes, and never took more: budgets are then exact."""
    monkeypatch.setattr(device, "current_rss", lambda: resident)
    monkeypatch.setattr("onnxstream_nb.session.peak_rss", lambda: resident)


def pieces_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Streams read at most so many bytes at a time: small models come in many pieces, too."""
    for name in ("cut", "by_rows"):
        function = partial(getattr(streaming, name), size=size)
        for module in (streaming, loading):
            monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(loading, "SMALL", size // 4)


class Reads:
    """Watches what is read from files: names in order, bytes of buffers that reads made and that
    are alive; `slots` are where rings read to. `gate` holds reading up.

    What is `used` at an address may not be read over: a reader that does hands on the error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.alive = self.most = 0
        self.begun = 0
        self.slots: set[int] = set()
        self.used: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self._read, self._read_into = files.Files.read, files.Files.read_into
        watch = self

        def read(files: Any, ref: WeightRef, start: int = 0, stop: int | None = None) -> Any:
            return watch._one(files, ref, start, ref.nbytes if stop is None else stop)

        def read_into(files: Any, memory: Array, ref: WeightRef, start: int, stop: int) -> Any:
            return watch._another(files, memory, ref, start, stop)

        monkeypatch.setattr(files.Files, "read", read)
        monkeypatch.setattr(files.Files, "read_into", read_into)

    def _one(self, files: Any, ref: WeightRef, start: int, stop: int) -> Array:
        self._begin()
        self.alive += stop - start
        self.most = max(self.most, self.alive)
        buffer = self._read(files, ref, start, stop)
        weakref.finalize(buffer, self._gone, stop - start)
        self.names.append(ref.name)
        return buffer

    def _another(self, files: Any, memory: Array, ref: WeightRef, start: int, stop: int) -> Array:
        first, last = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        assert not any(a < last and first < b for a, b in self.used), f"{ref.name} was read over"
        self.slots.add(first)
        self._begin()
        found = self._read_into(files, memory, ref, start, stop)
        self.names.append(ref.name)
        return found

    def _begin(self) -> None:
        with self._lock:
            self.begun += 1
        assert self.gate.wait(WAIT)

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes

    @contextmanager
    def using(self, tile: Weight) -> Iterator[None]:
        """The bytes of a tile are in use."""
        where = tile.address, tile.address + tile.buffer.nbytes
        self.used.append(where)
        try:
            yield
        finally:
            self.used.remove(where)

    def settle(self, count: int) -> None:
        """Wait for `count` reads in all, and see that there are no more."""
        until(lambda: len(self.names) >= count)
        time.sleep(0.02)
        assert len(self.names) == self.begun == count, self.names
