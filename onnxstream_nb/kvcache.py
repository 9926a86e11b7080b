"""The cache of keys and values: past and present of a language model, growing in place.

Dims: KV key/value heads, D their size, positions along the sequence. Batch size is one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import UnsupportedError, UsageError
from .graph import Graph, Value
from .passes.kvcache import CachePair
from .weights import numpy_dtype

ENCODINGS = ("f16", "q8")  # how keys and values are stored
GROWTH = 256  # positions; also the least capacity


def _capacity(length: int) -> int:
    """A capacity for `length` positions: a quarter in hand, in whole blocks."""
    return -(-(length + length // 4) // GROWTH) * GROWTH


class KVSlot:
    """One layer's keys or values as Attention's kernels want them.

    Keys are stored in blocks of 32 positions, (KV, capacity / 32, D, 32), values in panels of 32
    columns, (KV, D / 32, capacity, 32), D padded. `encoding` "f16" keeps them as float16; "q8" as
    int8 with a float32 scale for each position and head, `scales` (KV, capacity): a little over
    half the bytes, each element off by at most 1/254 of the largest of its position and head.
    `reserve` makes room; `length` is how many positions count, and may be set back. A run writes
    behind it and leaves it alone: what it wrote counts when the caller says so. As an array it is
    of `dtype`, the graph's. `places` are (length, capacity) of each sequence that it holds, and
    `tokens` how many tokens the next one of each makes: see SlotGroup.
    """

    tokens = 1

    def __init__(
        self,
        kind: str,
        heads: int,
        size: int,
        dtype: np.dtype[Any] | None = None,
        encoding: str = "f16",
    ) -> None:
        self.kind, self.heads, self.size = kind, heads, size
        self.dtype = np.dtype(np.float32) if dtype is None else dtype
        self.padded = -(-size // 32) * 32
        self.quantised = encoding == "q8"
        self.length = self.capacity = 0
        self.array, self.scales = self._room()

    @property
    def address(self) -> int:
        """Where the elements begin."""
        return int(self.array.ctypes.data)

    @property
    def scales_address(self) -> int:
        """Where the scales begin; they are there only in "q8"."""
        return int(self.scales.ctypes.data)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of past and present: (1, KV, length, D)."""
        return (1, self.heads, self.length, self.size)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(length, capacity)."""
        return ((self.length, self.capacity),)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now, room to grow included."""
        return int(self.array.nbytes + self.scales.nbytes)

    def advanced(self, length: int) -> KVSlot:
        """The same memory with `length` positions: a present beside its past."""
        present = copy.copy(self)
        present.length = length
        return present

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; what is there stays."""
        if length <= self.capacity:
            return
        old, scales = self.array, self.scales
        self.capacity = _capacity(length)
        self.array, self.scales = self._room()
        if self.kind == "key":
            blocks = -(-self.length // 32)
            self.array[:, :blocks] = old[:, :blocks]
        else:
            self.array[:, :, : self.length] = old[:, :, : self.length]
        if self.quantised:
            self.scales[:, : self.length] = scales[:, : self.length]

    def _room(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Zeroed elements and scales for `capacity` positions."""
        shape = (self.heads, self.capacity // 32, self.size, 32)
        if self.kind != "key":
            shape = (self.heads, self.padded // 32, self.capacity, 32)
        elements = np.zeros(shape, np.int8 if self.quantised else np.float16)
        return elements, np.zeros((self.heads, self.capacity * self.quantised), np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        order = (0, 1, 3, 2) if self.kind == "key" else (0, 2, 1, 3)
        columns = self.size if self.kind == "key" else self.padded
        filled = self.array.transpose(order).reshape(self.heads, self.capacity, columns)
        filled = filled[None, :, : self.length, : self.size]
        if self.quantised:
            filled = filled * self.scales[None, :, : self.length, None]
        return filled.astype(dtype or self.dtype)


class SlotGroup:
    """The slots of several sequences whose tokens lie side by side in one run, fed as one past.

    `parts` are (slot, how many of the run's tokens are its own), in order. Only Attention without
    a mask understands it.
    """

    def __init__(self, parts: Sequence[tuple[KVSlot, int]]) -> None:
        self.parts = tuple(parts)

    @property
    def tokens(self) -> int:
        """How many tokens the run has, if each sequence has one; 0 if not."""
        return len(self.parts) if all(count == 1 for _, count in self.parts) else 0

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(length, capacity) of each sequence."""
        return tuple((slot.length, slot.capacity) for slot, _ in self.parts)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all pasts together: (1, KV, positions, D)."""
        first = self.parts[0][0]
        return (1, first.heads, sum(slot.length for slot, _ in self.parts), first.size)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in each slot; what is there stays."""
        for slot, _ in self.parts:
            slot.reserve(length)

    def advanced(self, length: int) -> SlotGroup:
        """The same memory: what a present is not asked for."""
        return self


class ArraySlot:
    """A past input of a graph that was not rewritten: a growing array along one axis."""

    def __init__(self, shape: Sequence[int], axis: int, dtype: np.dtype[Any]) -> None:
        self.axis, self.length, self.capacity = axis, 0, 0
        self._shape, self._dtype = list(shape), dtype
        self.array: np.ndarray[Any, Any] = np.zeros(0, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of past and present, `length` along the axis that grows."""
        return tuple(self.length if i == self.axis else n for i, n in enumerate(self._shape))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now, room to grow included."""
        return int(self.array.nbytes)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; what is there stays."""
        if length <= self.capacity:
            return
        filled, self.capacity = np.asarray(self), _capacity(length)
        shape = [self.capacity if i == self.axis else n for i, n in enumerate(self._shape)]
        self.array = np.zeros(shape, self._dtype)
        self._view(self.length)[...] = filled

    def append(self, new: np.ndarray[Any, Any]) -> ArraySlot:
        """Write `new` behind what is there."""
        at = self.length
        self.reserve(at + new.shape[self.axis])
        self.length = at + new.shape[self.axis]
        where = [slice(None)] * len(self._shape)
        where[self.axis] = slice(at, self.length)
        self.array[tuple(where)] = new
        return self

    def _view(self, length: int) -> np.ndarray[Any, Any]:
        where = [slice(None)] * len(self._shape)
        where[self.axis] = slice(0, length)
        return self.array[tuple(where)] if self.capacity else np.zeros(self.shape, self._dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self._view(self.length).astype(dtype or self._dtype, copy=bool(copy))


class KVCache:
    """All slots of a model. `length` positions are filled; setting it back forgets the rest.

    `encoding` says how those that Attention reads are stored; see KVSlot.
    """

    def __init__(self, graph: Graph, pairs: Sequence[CachePair], encoding: str = "f16") -> None:
        if encoding not in ENCODINGS:
            raise UsageError(f"kv_cache must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
        inputs = {v.name: v for v in graph.inputs}
        readers = graph.consumers()
        self.slots: dict[str, KVSlot | ArraySlot] = {}
        for pair in pairs:
            # Others that read it (Shape, for the positions) get its shape, or an array.
            fused = any(n.op_type == "Attention" for n in readers.get(pair.past_input, []))
            value = inputs[pair.past_input]
            slot = _kv_slot(value, pair, encoding) if fused else _array_slot(value)
            self.slots[pair.past_input] = slot
        if encoding != "f16" and not any(isinstance(s, KVSlot) for s in self.slots.values()):
            raise UsageError(
                f"kv_cache {encoding}: no Attention reads the graph's past, which stays as it is "
                "declared; leave kv_cache at f16"
            )

    @property
    def length(self) -> int:
        """Positions that all slots hold; ValueError when set beyond what they have room for."""
        return min((s.length for s in self.slots.values()), default=0)

    @length.setter
    def length(self, length: int) -> None:
        for slot in self.slots.values():
            if length > slot.capacity:
                raise ValueError(f"{length} positions are not in a cache of {slot.capacity}")
            slot.length = length

    @property
    def nbytes(self) -> int:
        """Bytes that it takes now, room to grow included."""
        return sum(slot.nbytes for slot in self.slots.values())


def bytes_per_position(graph: Graph, pairs: Sequence[CachePair], encoding: str = "f16") -> int:
    """What one more position of context takes, in bytes: of the slots, with room to grow."""
    total = 0
    for slot in KVCache(graph, pairs, encoding).slots.values():
        slot.reserve(GROWTH)
        total += slot.nbytes // slot.capacity
    return total * 5 // 4


def bytes_at(
    graph: Graph, pairs: Sequence[CachePair], positions: int, encoding: str = "f16"
) -> int:
    """The most that a cache takes on its way to so many positions, in bytes: the slots with their
    room to grow, and one that moves."""
    sizes = []
    for slot in KVCache(graph, pairs, encoding).slots.values():
        slot.reserve(GROWTH)
        sizes.append(slot.nbytes // slot.capacity * _capacity(positions))
    return sum(sizes) + max(sizes, default=0)


def _kv_slot(value: Value, pair: CachePair, encoding: str) -> KVSlot:
    _, heads, _, size = value.shape or (None,) * 4
    if not isinstance(heads, int) or not isinstance(size, int):
        raise UnsupportedError(
            f"the input {value.name} has the shape {value.shape}: its heads and their size must be "
            "numbers; export the model with them fixed"
        )
    return KVSlot(pair.kind, heads, size, numpy_dtype(value.dtype), encoding)


def _array_slot(value: Value) -> ArraySlot:
    shape = value.shape or ()
    axis = next((i for i, n in enumerate(shape) if i and not isinstance(n, int)), 2)
    sizes = [n if isinstance(n, int) else 1 for n in shape]
    return ArraySlot(sizes, axis, numpy_dtype(value.dtype))
