"""Files cut into weights, and a watch on what is read of them, for the tests of providers."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxstream_nb import weights
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.weights import Weight

SIZES = (1, 4097, 3, 9001, 0, 257, 12345, 2, 5003)
WAIT = 10.0  # seconds; only a failing test waits that long

Provider = Any


def cut(path: Path, sizes: tuple[int, ...] = SIZES, gap: int = 5) -> list[WeightRef]:
    """A file of random bytes and references to pieces of it, at odd offsets."""
    rng = np.random.default_rng(len(path.name) + sum(sizes))
    path.write_bytes(rng.bytes(sum(sizes) + gap * (len(sizes) + 1)))
    refs, offset = [], gap
    for i, size in enumerate(sizes):
        refs.append(WeightRef(f"{path.stem}.{i}", (size,), "uint8", path, offset, size))
        offset += size + gap
    return refs


def expected(ref: WeightRef) -> bytes:
    data = ref.source if isinstance(ref.source, bytes) else ref.source.read_bytes()
    return data[ref.offset : ref.offset + ref.nbytes]


def taken(provider: Provider, ref: WeightRef) -> bytes:
    """The bytes that a provider gives, released again."""
    weight = provider.get(ref)
    assert isinstance(weight, Weight) and weight.buffer.dtype == np.uint8
    assert weight.buffer.ndim == 1 and weight.ref == ref
    assert not ref.nbytes or weight.address == weight.buffer.__array_interface__["data"][0]
    data = bytes(weight.buffer)
    provider.release(ref)
    return data


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


class Reads:
    """Watches what is read from files: names in order, bytes alive; `gate` holds reading up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.alive = self.most = 0
        self.begun = 0
        self.gate = threading.Event()
        self.gate.set()
        original = weights.Files.read

        def read(files: Any, ref: WeightRef, start: int = 0, stop: int | None = None) -> Any:
            self.begun += 1
            assert self.gate.wait(WAIT)
            size = (ref.nbytes if stop is None else stop) - start
            self.alive += size
            self.most = max(self.most, self.alive)
            buffer = original(files, ref, start, stop)
            weakref.finalize(buffer, self._gone, size)
            self.names.append(ref.name)
            return buffer

        monkeypatch.setattr(weights.Files, "read", read)

    def _gone(self, nbytes: int) -> None:
        self.alive -= nbytes

    def settle(self, count: int) -> None:
        """Wait for `count` reads in all, and see that there are no more."""
        until(lambda: len(self.names) >= count)
        time.sleep(0.02)
        assert len(self.names) == self.begun == count, self.names
