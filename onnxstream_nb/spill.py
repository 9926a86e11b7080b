"""Keys and values on disk, read in slices while the last one is computed.

Dims: KV key/value heads, D their size, positions along the sequence. A window is a part of a slot
in memory: of one head or several, from a block's beginning on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from .kvslot import BLOCK, Array, KVSlot, Slot, capacity_for
from .spill_file import SpillFile

KEYS = 128  # slices are cut at multiples of what Attention's kernels take at a time
SLICE_BYTES = 2 << 20  # of keys and values: one slice is computed while another is read
FEW_ROWS = 8  # that are computed as so many tokens
STATE_ROWS = 8192  # queries of a key/value head that go through the slices together
MOST_WINDOWS = 32  # a slice has one for each share of the work, of which there are so many at most

Part = tuple[int, int, int, int]
"""(window, head, start, stop): positions start .. stop of a head, in a window of a slice."""


class SpilledSlot(Slot):
    """A slot on disk, `offset` bytes into a file: what `like` would hold in memory. It is read and
    written by windows."""

    on_disk = True
    following: SpilledPair | None = None  # of the keys: what a pass reads after this layer

    def __init__(self, file: SpillFile, offset: int, like: Slot) -> None:
        super().__init__(like.kind, like.heads, like.size, like.dtype, like.encoding, like.capacity)
        self.file, self.offset = file, offset

    @property
    def geometry(self) -> tuple[str, int, str]:
        """What windows of different slots have in common."""
        return self.kind, self.size, self.encoding

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
        self._slots = keys, values

    def tail(self, tokens: int) -> tuple[KVSlot, ...]:
        """Windows of all heads on the block that `length` lies in and room for so many tokens.

        Their `length` is that of the slots, counted from the block's beginning.
        """
        first = self.keys.length // BLOCK * BLOCK
        inside = self.keys.length - first
        self.keys.reserve(first + inside + tokens)
        positions = -(-(inside + tokens) // BLOCK) * BLOCK
        pair = self._windows("tail", self.keys.heads, positions)
        for slot, window in zip(self._slots, pair, strict=True):
            window.memory[:] = 0
            for head in range(slot.heads if inside else 0):
                slot.load(window, (head, head, first, first + BLOCK))
            window.length = inside
        return pair

    def store(self, pair: Sequence[KVSlot], tokens: int) -> None:
        """Write what `tail` gave, with so many tokens more."""
        at = self.keys.length
        first, stop = at // BLOCK * BLOCK, -(-(at + tokens) // BLOCK) * BLOCK
        for slot, window in zip(self._slots, pair, strict=True):
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

        def begin(i: int) -> None:
            slots = list(zip(self._slots, pairs[i % 2], strict=True))
            parts = slices[i] if i < len(slices) else ()
            loads = (partial(slot.load, window) for slot, window in slots)
            self.file.begin([partial(load, part) for load in loads for part in parts])

        begin(0)
        for i, parts in enumerate(slices):
            self.file.settle()
            begin(i + 1)
            keys, values = pairs[i % 2]
            yield keys, values, parts

    def _windows(self, name: str, heads: int, positions: int) -> tuple[KVSlot, ...]:
        """A window of so many heads and positions for each slot, their contents undefined, in the
        file's memory of that name."""
        known = self.file.windows
        key = (name, heads, positions, *(slot.geometry for slot in self._slots))
        if key not in known:
            sizes = [_window_bytes(slot, heads, positions) for slot in self._slots]
            memory = self.file.memory(name, sum(sizes))
            known[key] = tuple(
                slot.window(heads, positions, memory[end - size : end])
                for slot, size, end in zip(self._slots, sizes, accumulate(sizes), strict=True)
            )
        return known[key]

    def state(self, nbytes: int) -> Array:
        """Memory for what is kept from one slice to the next."""
        return self.file.memory("state", nbytes)

    def done(self) -> None:
        """This layer is through: the system may read the next one while others compute."""
        following = self.keys.following
        if following is not None:
            self.file.advise([*following.keys.filled(), *following.values.filled()])


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
    queries to a key/value head: two slices, the new positions, and what is kept from one slice to
    the next, of a prompt's rows or of a few tokens in each share of the work."""
    slices = max(
        sum(_window_bytes(slot, n, slice_positions(keys, values, n)) for slot in (keys, values))
        for n in (1, windows)
    )
    tail = sum(_window_bytes(slot, slot.heads, chunk + BLOCK) for slot in (keys, values))
    row = 5 * (values.padded + 17)  # floats, and half-used pages
    state = row * min(chunk * group, STATE_ROWS)
    tokens = FEW_ROWS * windows * group * (row * keys.heads + 4 * (keys.size + KEYS))
    return 2 * slices + tail + max(state, tokens)
