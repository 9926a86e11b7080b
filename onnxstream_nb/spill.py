"""Keys and values on disk: a file without a name, read in slices while the last one is computed.

Dims: KV key/value heads, D their size, positions along the sequence. A window is a part of a slot
in memory: of one head or several, from a block's beginning on.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from .device import format_size
from .errors import OnnxstreamError, UsageError
from .kvslot import BLOCK, KVSlot, Slot, capacity_for, zeroed

KEYS = 128  # slices are cut at multiples of what Attention's kernels take at a time
SLICE_BYTES = 2 << 20  # of keys and values: one slice is computed while another is read
STATE_ROWS = 8192  # queries of a key/value head that go through the slices together
MOST_WINDOWS = 32  # a slice has one for each share of the work, of which there are so many at most
READERS = 4  # reads in flight
ADVICE_BYTES = 1 << 20  # a system reads no more ahead for one request

Array = np.ndarray[Any, Any]
Part = tuple[int, int, int, int]
"""(window, head, start, stop): positions start .. stop of a head, in a window of a slice."""


class SpillFile:
    """A file of `nbytes` in `folder`, set aside at once and gone when the process ends.

    Raises UsageError when the disk has not so much room, OnnxstreamError when it fails later.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.folder, self.nbytes = folder, nbytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _unnamed_file(folder, nbytes)
        except OSError as error:
            raise UsageError(
                f"{folder}: {format_size(nbytes)} for the context's keys and values cannot be set "
                f"aside on this disk ({error.strerror}): name a folder on another with --kv-spill, "
                "or choose a smaller --context or a larger --ram"
            ) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._pool = ThreadPoolExecutor(READERS, "spill")
        self._begun: list[Future[None]] = []
        self._memory: dict[str, Array] = {}

    def read(self, into: Array, offset: int) -> None:
        """Fill `into`, flat uint8, from an offset on."""
        view, done = memoryview(cast(Any, into)), 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                self._fail("reading", error)
            if count == 0:
                self._fail("reading", "the file ends before them")
            done += count

    def write(self, data: Array, offset: int) -> None:
        """Write flat uint8 from an offset on."""
        view, done = memoryview(cast(Any, data)), 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                self._fail("writing", error)

    def _fail(self, what: str, problem: object) -> NoReturn:
        raise OnnxstreamError(
            f"{self.folder}: {what} the keys and values that lie there failed ({problem}): "
            "name a folder on another disk with --kv-spill"
        )

    def memory(self, name: str, nbytes: int) -> Array:
        """Working memory, flat uint8; who asks again for the same name gets the same."""
        if name not in self._memory or self._memory[name].nbytes < nbytes:
            self._memory[name] = zeroed(nbytes)
        return self._memory[name][:nbytes]

    def begin(self, calls: Sequence[Any]) -> None:
        """Begin calls (function, *arguments), of which nobody may still be under way."""
        wait(self._begun)  # those of a run that was given up
        self._begun = [self._pool.submit(*call) for call in calls]

    def settle(self) -> None:
        """Wait for what was begun; raises the first error."""
        for call in self._begun:
            call.result()

    def advise(self, runs: Sequence[tuple[int, int]]) -> None:
        """Have (offset, bytes) read ahead by the system, as far as it has memory to spare."""
        if hasattr(os, "posix_fadvise"):
            self._pool.submit(_advise, self._descriptor, runs)

    def close(self) -> None:
        """Give the room on disk back; slots in the file may not be used any more."""
        self._pool.shutdown()
        self._memory.clear()
        self._close()


def _unnamed_file(folder: Path, nbytes: int) -> int:
    """The descriptor of a new file so long; where the system can, its blocks are its own."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        return os.dup(file.fileno())


def _advise(descriptor: int, runs: Sequence[tuple[int, int]]) -> None:
    for offset, nbytes in runs:
        for at in range(offset, offset + nbytes, ADVICE_BYTES):
            size = min(ADVICE_BYTES, offset + nbytes - at)
            os.posix_fadvise(descriptor, at, size, os.POSIX_FADV_WILLNEED)


class SpilledSlot(Slot):
    """A slot on disk, `offset` bytes into a file: what `like` would hold in memory. It is read and
    written by windows."""

    on_disk = True
    following: SpilledPair | None = None  # of the keys: what a pass reads after this layer

    def __init__(self, file: SpillFile, offset: int, like: Slot) -> None:
        super().__init__(like.kind, like.heads, like.size, like.dtype, like.encoding, like.capacity)
        self.file, self.offset = file, offset

    def with_values(self, values: SpilledSlot) -> SpilledPair:
        """These keys beside their values."""
        return SpilledPair(self, values)

    def window(self, heads: int, positions: int, memory: Array | None = None) -> KVSlot:
        """A window of so many heads and positions, its contents undefined."""
        return KVSlot(
            self.kind, heads, self.size, self.dtype, self.encoding, positions, memory=memory
        )

    def load(self, window: KVSlot, part: Part) -> None:
        """Read positions of a head into one of a window."""
        for there, inside in self._runs(window, part):
            self.file.read(window.memory[inside], self.offset + there)

    def store(self, window: KVSlot, part: Part) -> None:
        """Write positions of a head from one of a window."""
        for there, inside in self._runs(window, part):
            self.file.write(window.memory[inside], self.offset + there)

    def _runs(self, window: KVSlot, part: Part) -> Iterator[tuple[int, slice]]:
        """Where each run of a part begins in the slot, and where it is in the window's memory."""
        into, head, start, stop = part
        there, here = self.runs(head, start, stop), window.runs(into, 0, stop - start)
        for (offset, nbytes), (inside, _) in zip(there, here, strict=True):
            yield offset, slice(inside, inside + nbytes)

    def filled(self) -> list[tuple[int, int]]:
        """(offset, bytes) in the file of what counts."""
        stop = -(-self.length // BLOCK) * BLOCK
        runs = (run for head in range(self.heads) for run in self.runs(head, 0, stop))
        return [(self.offset + offset, nbytes) for offset, nbytes in runs]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        stop = -(-self.length // BLOCK) * BLOCK
        window = self.window(self.heads, stop)
        for head in range(self.heads):
            self.load(window, (head, head, 0, stop))
        window.length = self.length
        return np.asarray(window, dtype)


class SpilledPair:
    """The keys and the values of one layer on disk, as Attention goes through them: `tail` and
    `store` to append, then `slices`, then `done`."""

    state_rows = STATE_ROWS

    def __init__(self, keys: SpilledSlot, values: SpilledSlot) -> None:
        self.keys, self.values, self.file = keys, values, keys.file

    def tail(self, tokens: int) -> tuple[KVSlot, KVSlot]:
        """Windows of all heads on the block that `length` lies in and room for so many tokens.

        Their `length` is that of the slots, counted from the block's beginning.
        """
        first = self.keys.length // BLOCK * BLOCK
        inside = self.keys.length - first
        self.keys.reserve(first + inside + tokens)
        pair = self._windows("tail", self.keys.heads, inside + tokens)
        for slot, window in zip((self.keys, self.values), pair, strict=True):
            window.memory[:] = 0
            for head in range(slot.heads if inside else 0):
                slot.load(window, (head, head, first, first + BLOCK))
            window.length = inside
        return pair

    def store(self, pair: tuple[KVSlot, KVSlot], tokens: int) -> None:
        """Write what `tail` gave, with so many tokens more."""
        at = self.keys.length
        first, stop = at // BLOCK * BLOCK, -(-(at + tokens) // BLOCK) * BLOCK
        for slot, window in zip((self.keys, self.values), pair, strict=True):
            for head in range(slot.heads):
                slot.store(window, (head, head, first, stop))

    def slice_positions(self, windows: int) -> int:
        """How many positions each of so many windows of a slice has."""
        return slice_positions(self.keys, self.values, windows)

    def slices(
        self, windows: int, slices: Sequence[Sequence[Part]]
    ) -> Iterator[tuple[KVSlot, KVSlot, Sequence[Part]]]:
        """For each slice the windows of keys and of values that hold its parts, until the next one
        is asked for: that is read meanwhile."""
        positions = self.slice_positions(windows)
        pairs = [self._windows(name, windows, positions) for name in ("even", "odd")]

        def reads(i: int) -> list[Any]:
            slots = list(zip((self.keys, self.values), pairs[i % 2], strict=True))
            parts = slices[i] if i < len(slices) else ()
            return [(slot.load, window, part) for part in parts for slot, window in slots]

        self.file.begin(reads(0))
        for i, parts in enumerate(slices):
            self.file.settle()
            self.file.begin(reads(i + 1))
            yield (*pairs[i % 2], parts)

    def state(self, nbytes: int) -> Array:
        """Memory for what is kept from one slice to the next."""
        return self.file.memory("state", nbytes)

    def done(self) -> None:
        """This layer is through: the system may read the next one while others compute."""
        following = self.keys.following
        if following is not None:
            self.file.advise([*following.keys.filled(), *following.values.filled()])

    def _windows(self, name: str, heads: int, positions: int) -> tuple[KVSlot, KVSlot]:
        sizes = [_window_bytes(slot, heads, positions) for slot in (self.keys, self.values)]
        memory = self.file.memory(name, sum(sizes))
        return (
            self.keys.window(heads, positions, memory[: sizes[0]]),
            self.values.window(heads, positions, memory[sizes[0] :]),
        )


def _window_bytes(slot: Slot, heads: int, positions: int) -> int:
    return -(-heads * capacity_for(positions) * slot.position_bytes // 64) * 64


def slice_positions(keys: Slot, values: Slot, windows: int) -> int:
    """How many positions each of so many windows has: as many as make a slice, no more than it
    needs to take all heads' at once."""
    most = SLICE_BYTES // (windows * (keys.position_bytes + values.position_bytes))
    all_heads = -(-keys.heads * keys.capacity // windows) + BLOCK
    enough = -(-min(all_heads, keys.capacity) // KEYS) * KEYS
    return max(KEYS, min(most // KEYS * KEYS, enough))


def working_bytes(keys: Slot, values: Slot, group: int, chunk: int, windows: int) -> int:
    """Most bytes in memory while a layer on disk is gone through, `chunk` tokens a pass, `group`
    queries to a key/value head: two slices, the new positions, and the state of a prompt's rows."""
    slices = max(
        sum(_window_bytes(slot, n, slice_positions(keys, values, n)) for slot in (keys, values))
        for n in (1, windows)
    )
    tail = sum(_window_bytes(slot, slot.heads, chunk + BLOCK) for slot in (keys, values))
    state = 5 * min(chunk * group, STATE_ROWS) * (values.padded + 17)  # floats, and half-used pages
    return 2 * slices + tail + state
