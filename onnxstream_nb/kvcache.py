"""The cache of keys and values: past and present of a language model, filled in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

from .errors import UnsupportedError, UsageError
from .files import PAGE
from .graph import Graph, Value
from .kvslot import ROOM, ArraySlot, KVSlot, Slot
from .passes.kvcache import CachePair
from .spill import MOST_WINDOWS, SpilledSlot, working_bytes
from .spill_file import SpillFile
from .weights import numpy_dtype

__all__ = [
    "ENCODINGS", "ArraySlot", "KVCache", "KVSlot", "bytes_at", "bytes_per_position",
    "bytes_resident",
]  # fmt: skip

ENCODINGS = ("f16", "q8")  # how keys and values are stored
CHUNK = 512  # prompt tokens a pass: large enough for the matrix kernels, small in activations
GROUP = 8  # queries to a key/value head, where the graph does not say


class KVCache:
    """All slots of a model. `length` positions are filled; setting it back forgets the rest.

    `encoding` says how those that Attention reads are stored, `positions` for how many there is
    room: that is address space, memory is taken as it fills. With a folder `spill`, layers that
    do not fit in `resident` bytes at full length lie in a file there, the last ones first; what
    they need in memory, with passes of up to `chunk` tokens, counts as well. `windows` are the
    shares into which the thread team cuts its work; `place` makes those that are in no file.
    """

    def __init__(
        self,
        graph: Graph,
        pairs: Sequence[CachePair],
        encoding: str = "f16",
        positions: int = ROOM,
        *,
        resident: int | None = None,
        spill: Path | None = None,
        chunk: int = CHUNK,
        windows: int = MOST_WINDOWS,
        place: Callable[[Slot], Slot] = Slot.in_memory,
    ) -> None:
        plan = _Plan(graph, pairs, encoding, positions)
        kept = len(plan.layers)
        if resident is not None and spill is not None:
            kept = plan.layers_within(resident, plan.working_bytes(chunk, windows))
        on_disk = [layer[:2] for layer in plan.layers[kept:]]
        names = [name for layer in on_disk for name in layer]
        sizes = [_pages(plan.slots[name]) for name in names]
        self.file = SpillFile(spill, sum(sizes)) if spill is not None and names else None
        offsets = dict(zip(names, accumulate(sizes, initial=0), strict=False))
        self.slots: dict[str, Slot | ArraySlot] = {}
        for pair in pairs:
            name, slot = pair.past_input, plan.slots[pair.past_input]
            if isinstance(slot, Slot) and self.file is not None and name in offsets:
                self.slots[name] = SpilledSlot(self.file, offsets[name], slot)
            else:
                self.slots[name] = slot if isinstance(slot, ArraySlot) else place(slot)
        spilled = [tuple(cast(SpilledSlot, self.slots[name]) for name in pair) for pair in on_disk]
        for (keys, _), following in zip(spilled, spilled[1:] + spilled[:1], strict=True):
            keys.following = following[0].with_values(following[1])
        self._rooms = _filled_together(self.slots.values())

    @property
    def length(self) -> int:
        """Positions that all slots hold; ValueError when set beyond what they have room for."""
        return min((room.length for room in self._rooms), default=0)

    @length.setter
    def length(self, length: int) -> None:
        for slot in self._rooms:
            if length > slot.capacity:
                raise ValueError(f"{length} positions are not in a cache of {slot.capacity}")
            slot.length = length

    @property
    def nbytes(self) -> int:
        """Bytes that its positions take now, in memory and on disk."""
        return sum(slot.nbytes for slot in self.slots.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes that are set aside on disk."""
        return 0 if self.file is None else self.file.nbytes

    def close(self) -> None:
        """Let go of memory and disk."""
        self.slots.clear()
        self._rooms.clear()
        if self.file is not None:
            self.file.close()
            self.file = None


def _filled_together(slots: Iterable[Slot | ArraySlot]) -> list[Slot | ArraySlot]:
    """Those to set the length of, when all are as long: Attention's slots of one capacity share
    what they are filled to; the others append to themselves."""
    first: dict[object, Slot | ArraySlot] = {}
    for slot in slots:
        alike = first.setdefault(slot.capacity if isinstance(slot, Slot) else id(slot), slot)
        slot.fill = alike.fill
    return list(first.values())


def bytes_per_position(graph: Graph, pairs: Sequence[CachePair], encoding: str = "f16") -> int:
    """What one more position of context takes, in bytes."""
    slots = _Plan(graph, pairs, encoding, 1).slots.values()
    return sum(slot.room_bytes // slot.capacity for slot in slots)


def bytes_at(
    graph: Graph, pairs: Sequence[CachePair], positions: int, encoding: str = "f16"
) -> int:
    """The most memory that a cache made for so many positions takes, in bytes."""
    return sum(map(_pages, _Plan(graph, pairs, encoding, positions).slots.values()))


def bytes_resident(
    graph: Graph,
    pairs: Sequence[CachePair],
    positions: int,
    encoding: str = "f16",
    *,
    chunk: int = CHUNK,
    windows: int = MOST_WINDOWS,
) -> list[int]:
    """The most memory that a cache made for so many positions takes, in bytes, that may lie on
    disk: with all layers in memory first, as `bytes_at`, then with one more on disk each time.

    The last is the least that does: one layer's slices, and the new positions of `chunk` tokens.
    """
    plan = _Plan(graph, pairs, encoding, positions)
    working = plan.working_bytes(chunk, windows)
    *some, whole = plan.held
    return [whole, *(held + working for held in reversed(some) if held + working < whole)]


class _Plan:
    """What slots a graph's cache has, before any has a place.

    `slots` by input; `layers` are (keys, values, queries to a head) of those that Attention reads.
    """

    def __init__(
        self, graph: Graph, pairs: Sequence[CachePair], encoding: str, positions: int
    ) -> None:
        if encoding not in ENCODINGS:
            raise UsageError(f"kv_cache must be one of {', '.join(ENCODINGS)}, not {encoding!r}")
        inputs = {v.name: v for v in graph.inputs}
        readers = graph.consumers()
        self.slots: dict[str, Slot | ArraySlot] = {}
        for pair in pairs:
            # Others that read it (Shape, for the positions) get its shape, or an array.
            fused = any(n.op_type == "Attention" for n in readers.get(pair.past_input, []))
            value = inputs[pair.past_input]
            self.slots[pair.past_input] = (
                _slot(value, pair, encoding, positions) if fused else _array_slot(value, positions)
            )
        if encoding != "f16" and not any(isinstance(s, Slot) for s in self.slots.values()):
            raise UsageError(
                f"kv_cache {encoding}: no Attention reads the graph's past, which stays as it is "
                "declared; leave kv_cache at f16"
            )
        self.layers = list(self._layers(graph))

    def _layers(self, graph: Graph) -> Iterator[tuple[str, str, int]]:
        seen: set[str] = set()
        for node in graph.nodes:
            names = node.inputs[4:6] if node.op_type == "Attention" else ()
            if len(names) == 2 and all(isinstance(self.slots.get(n), Slot) for n in names):
                if seen.isdisjoint(names):
                    heads = [node.attributes.get(n, 0) for n in ("q_num_heads", "kv_num_heads")]
                    yield (*names, heads[0] // heads[1] if all(heads) else GROUP)
                seen.update(names)

    @property
    def held(self) -> list[int]:
        """Bytes of the slots that stay in memory in any case, and with each layer more."""
        sizes = {name: _pages(slot) for name, slot in self.slots.items()}
        layers = [sum(sizes.pop(name) for name in layer[:2]) for layer in self.layers]
        return list(accumulate(layers, initial=sum(sizes.values())))

    def working_bytes(self, chunk: int, windows: int) -> int:
        """Bytes in memory while a layer on disk is gone through."""
        pairs = [(self.slots[k], self.slots[v], group) for k, v, group in self.layers]
        return max(
            (
                working_bytes(keys, values, group, chunk, windows)
                for keys, values, group in pairs
                if isinstance(keys, Slot) and isinstance(values, Slot)
            ),
            default=0,
        )

    def layers_within(self, resident: int, working: int) -> int:
        """How many layers may stay in memory for `resident` bytes; all, or some beside `working`
        bytes for the others."""
        if self.held[-1] <= resident:
            return len(self.layers)
        return max(0, sum(held + working <= resident for held in self.held) - 1)


def _pages(slot: Slot | ArraySlot) -> int:
    """Bytes of a slot's room in whole pages."""
    return -(-slot.room_bytes // PAGE) * PAGE


def _slot(value: Value, pair: CachePair, encoding: str, positions: int) -> Slot:
    _, heads, _, size = value.shape or (None,) * 4
    if not isinstance(heads, int) or not isinstance(size, int):
        raise UnsupportedError(
            f"the input {value.name} has the shape {value.shape}: its heads and their size must be "
            "numbers; export the model with them fixed"
        )
    return Slot(pair.kind, heads, size, numpy_dtype(value.dtype), encoding, positions)


def _array_slot(value: Value, positions: int) -> ArraySlot:
    shape = value.shape or ()
    axis = next((i for i, n in enumerate(shape) if i and not isinstance(n, int)), 2)
    sizes = [n if isinstance(n, int) else 1 for n in shape]
    return ArraySlot(sizes, axis, numpy_dtype(value.dtype), positions)
