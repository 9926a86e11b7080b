"""Streams under random use: whatever is asked for, in whatever order, are the bytes of the file.

The model is plain: a pass is a list of weights; a weight asked for is the file's bytes then.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_files import (
    Reads,
    closing,
    expected,
    matrices,
    pieces_of,
    taken,
    tiled,
    until,
    wait_no_longer,
)

from onnxstream_nb import files
from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.streaming import StreamProvider

SHAPES = st.lists(
    st.tuples(st.sampled_from((1, 2, 31, 33, 64, 100)), st.sampled_from((1, 30, 128, 513))),
    min_size=1, max_size=5,
)  # fmt: skip
STEP = st.tuples(
    st.sampled_from(("next", "next", "next", "skip", "any", "begin", "part", "stranger")),
    st.integers(0, 7), st.sampled_from((0, 0, 0.0005)),
)  # fmt: skip


@contextmanager
def watched(size: int, delays: list[float]) -> Iterator[Reads]:
    """Reads of at most `size` bytes, each as slow as it is told."""
    turn = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        pieces_of(patch, size)
        wait_no_longer(patch)
        slow = files.Files._fill

        def fill(*arguments: Any, **options: Any) -> None:
            time.sleep(delays[next(turn) % len(delays)])
            slow(*arguments, **options)

        patch.setattr(files.Files, "_fill", fill)
        yield Reads(patch)


class Consumer:
    """Takes steps through passes over a provider's weights, and compares all bytes it gets."""

    def __init__(self, provider: Any, order: list[WeightRef], reads: Reads) -> None:
        self.provider, self.order, self.reads = provider, order, reads
        self.wanted = {ref.name: expected(ref) for ref in order}
        self.at = 0
        provider.prefetch(order)

    def step(self, kind: str, which: int, pause: float) -> None:
        if kind == "begin" or self.at == len(self.order):
            self.at = 0
            self.provider.prefetch(self.order)
        ref = self.order[which % len(self.order) if kind == "any" else self.at]
        if kind in ("next", "skip", "part"):
            self.at += 1
        if kind == "part":
            self.begin_only(ref, which)
        elif kind == "stranger":
            stranger = ref.rows(0, 1)
            assert taken(self.provider, stranger) == self.wanted[ref.name][: stranger.nbytes]
        elif kind != "skip":
            assert self.used(ref, pause) == self.wanted[ref.name]

    def used(self, ref: WeightRef, pause: float) -> bytes:
        """The bytes of a weight, each tile looked at when it came and when it goes."""
        found = b""
        for tile in self.provider.get(ref).tiles():
            with self.reads.using(tile):
                before = bytes(tile.buffer)
                time.sleep(pause)
                assert bytes(tile.buffer) == before
            found += before
        return found

    def begin_only(self, ref: WeightRef, count: int) -> None:
        """An operator that fails after some tiles."""
        tiles = self.provider.get(ref).tiles()
        found = b"".join(bytes(tile.buffer) for tile in itertools.islice(tiles, count))
        tiles.close()
        assert self.wanted[ref.name].startswith(found)


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 6),
    st.sampled_from((40, 600, 3000, 10**6)), st.lists(STEP, max_size=40),
    st.lists(st.sampled_from((0, 0, 0.0005, 0.002)), min_size=1, max_size=5), st.booleans(),
)  # fmt: skip
def test_any_use_of_a_stream(
    shapes: list[tuple[int, int]], order: list[int], slots: int, size: int,
    steps: list[tuple[str, int, float]], delays: list[float], holds: bool,
) -> None:  # fmt: skip
    threads = threading.active_count()
    with tempfile.TemporaryDirectory() as folder, watched(size, delays) as reads:
        found = matrices(Path(folder) / "a.bin", *shapes)
        refs = [found[i % len(found)] for i in order]
        held = {refs[0].matrix: 32} if holds and refs[0].shape[0] > 32 else {}
        if held and refs[0].shape[1] > size:
            held = {}  # it does not come in rows
        with closing(StreamProvider(refs, slots=slots, held=held)) as provider:
            consumer = Consumer(provider, refs, reads)
            for step in steps:
                consumer.step(*step)
        assert len(reads.slots) <= slots
        assert reads.alive <= sum(ref.nbytes for ref in refs)  # rows that memory held
    until(lambda: threading.active_count() == threads)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(1, 5), st.lists(st.sampled_from((0, 0.0005)), min_size=1, max_size=3),
)  # fmt: skip
def test_a_file_that_comes_and_goes(
    passes: list[tuple[bool, int]], slots: int, delays: list[float]
) -> None:
    """A pass over a whole file gives its bytes; over one cut short, those there are or an error."""
    with tempfile.TemporaryDirectory() as folder, watched(700, delays):
        path = Path(folder) / "a.bin"
        refs = matrices(path, (40, 33), (1, 600), (64, 64), (9, 100))
        whole = path.read_bytes()
        wanted = [expected(ref) for ref in refs]
        with closing(StreamProvider(refs, slots=slots)) as provider:
            for good, stop in passes:
                path.write_bytes(whole if good else whole[: len(whole) // 2])
                provider.prefetch(refs)
                for ref, data in list(zip(refs, wanted, strict=True))[:stop]:
                    try:
                        assert tiled(provider, ref) == data
                    except ModelError as error:
                        assert not good and "truncated" in str(error) and ref.name in str(error)
                        break
