"""Weights read from disk while they are used: a fixed ring of buffers, filled ahead of their use.

A weight comes in pieces, each read at once into one buffer. A session uses the same pieces in the
same order in every pass, so the readers go round: behind the last piece of a pass they begin with
the first of the next.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from .files import PAGE, Bytes, Files, aligned, room
from .graph import WeightRef
from .lookup import LOOK_S, look
from .weight import Weight
from .weights import DiskProvider, RamProvider, WeightsProvider, in_memory

PIECE = 2 << 20  # bytes: large enough for the disk, small enough that many fit a small budget
LEAST_PIECES = 8  # in the ring: one in use, and reads under way
MOST_PIECES = 32
READERS = 3  # reads under way at a time: more are no faster, and wake more threads
CLOSING_S = 1.0  # for a read that is under way to end


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Bytes `start` to `stop` of a weight, or of one of its parts; `ref` is what they belong to.

    When the weight is cut by rows, `ref` are those rows alone and `first` is the number of the
    first of them; the bytes are all of it.
    """

    ref: WeightRef
    start: int
    stop: int
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.stop - self.start

    @property
    def room(self) -> int:
        """Bytes of memory in which they can be read."""
        if not self.ref.parts:
            return room(self.nbytes)
        return sum(room(part.nbytes) for part in self.ref.parts)

    def read_into(self, memory: Bytes, files: Files) -> Bytes:
        """Read them into memory that begins at a page; those of rows in parts come one part behind
        the other, of which all but the first are moved."""
        if not self.ref.parts:
            return files.read_into(memory, self.ref, self.start, self.stop)
        begin = done = 0
        for i, part in enumerate(self.ref.parts):
            if isinstance(part.source, Path):
                free = -(-done // PAGE) * PAGE
                found = files.read_into(memory[free:], part, 0, part.nbytes)
            else:
                found = in_memory(part)
            if i == 0:
                begin = done = found.ctypes.data - memory.ctypes.data
            memory[done : done + part.nbytes] = found
            done += part.nbytes
        return memory[begin:done]


def by_rows(ref: WeightRef, size: int = PIECE) -> bool:
    """Whether a weight comes in stored rows; any other one is gathered before it is used."""
    return ref.cut_by_rows and ref.unit[1] <= size


def cut(ref: WeightRef, held: int = 0, size: int = PIECE) -> tuple[Piece, ...]:
    """The pieces of a weight, none longer than `size` bytes; of one that comes in stored rows
    without the first `held`."""
    if not by_rows(ref, size=size):
        return tuple(
            Piece(part, at, min(part.nbytes, at + size))
            for part in ref.parts or (ref,)
            for at in range(0, part.nbytes, size)
        )
    rows, (together, nbytes) = ref.stored_shape[0], ref.unit
    each = size // max(1, nbytes) * together
    each = each // 32 * 32 or each  # kernels take 32 rows at a time
    pieces = [(at, ref.rows(at, min(rows, at + each))) for at in range(held, rows, each)]
    return tuple(Piece(part, 0, part.nbytes, first) for first, part in pieces)


class _Ring:
    """What a provider and its reader threads share: the threads may not keep the provider alive.

    Pieces are numbered on from the first one of the first pass. A slot is a buffer; it is free,
    being read into, ready, or in use.
    """

    def __init__(self, slots: int, each: int) -> None:
        self.files = Files()
        self.pieces: Sequence[Piece] = ()
        self.bytes_read = 0
        self.reading: str = ""
        self.pass_read = 0  # bytes of this pass that the consumer has had
        self.waited = 0.0  # seconds that the consumer waited
        memory = aligned(slots * each)
        self._memory = [memory[each * i : each * (i + 1)] for i in range(slots)]
        self._free = list(range(slots))
        self._ready: dict[int, tuple[int, Bytes | BaseException]] = {}
        self._next_read = self._next_use = 0
        self._epoch = 0  # of the numbering; what was begun in an earlier one is dropped
        self.passes = 0  # that were begun
        self._change = threading.Condition()
        self._closed = False
        self.stop_on: threading.Event | None = None  # a pass may be given up
        self._threads: list[threading.Thread] = []

    def begin(self, pieces: Sequence[Piece]) -> None:
        """A pass over the pieces begins; what was read ahead for it is kept."""
        changed = self.files.forget_changed()
        with self._change:
            failed = any(isinstance(found, BaseException) for _, found in self._ready.values())
            midway = self.pieces is not pieces or self._next_use % max(1, len(pieces))
            if midway or changed or failed:
                self._restart()
            self.pieces, self.pass_read = pieces, 0
            self.passes += 1
            if pieces and not self._threads:
                self._threads = [
                    threading.Thread(target=self._work, daemon=True) for _ in range(READERS)
                ]
                for thread in self._threads:
                    thread.start()
            self._change.notify_all()

    def _restart(self) -> None:
        self._epoch += 1
        self._free += [slot for slot, _ in self._ready.values()]
        self._ready.clear()
        self._next_read = self._next_use = 0

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._closed and not (self._free and self.pieces):
                    self._change.wait()
                if self._closed:
                    return
                number, epoch, passes = self._next_read, self._epoch, self.passes
                piece, slot = self.pieces[number % len(self.pieces)], self._free.pop()
                self._next_read += 1
            result: Bytes | BaseException
            try:
                result = piece.read_into(self._memory[slot], self.files)
            except BaseException as error:  # handed to the thread that asks for the piece
                result = error
            failed = isinstance(result, BaseException)
            with self._change:
                if failed and passes != self.passes and epoch == self._epoch:
                    self._restart()  # an error belongs to the pass that met it
                if epoch == self._epoch:
                    self._ready[number] = slot, result
                else:
                    self._free.append(slot)
                self.bytes_read += 0 if failed else piece.nbytes
                self.reading = piece.ref.name
                del result  # or this thread would keep an error's traceback until the next read
                self._change.notify_all()

    def take(self, piece: Piece) -> tuple[int, Bytes] | None:
        """The slot that holds a piece, and its bytes; None when it does not come in this pass.

        Pieces before it are not needed: their slots become free.
        """
        with self._change:
            started = perf_counter()
            while (number := self._number(piece)) is not None:
                look(self.stop_on)
                self._next_use = number
                for passed in [n for n in self._ready if n < number]:
                    self._free.append(self._ready.pop(passed)[0])
                    self._change.notify_all()
                if number in self._ready:
                    break
                self._change.wait(LOOK_S if self.stop_on is not None else None)
            self.waited += perf_counter() - started
            if number is None:
                return None
            self._next_use = number + 1
            slot, found = self._ready.pop(number)
            if isinstance(found, BaseException):
                self._free.append(slot)
                self._change.notify_all()
                raise found
            self.pass_read += piece.nbytes
            return slot, found

    def _number(self, piece: Piece) -> int | None:
        """Which one it is in this pass; None when it is past, or nothing is read any more."""
        if self._closed:
            return None
        count = len(self.pieces)
        last = -(-(self._next_use + 1) // count) * count if count else 0
        numbers = range(self._next_use, last)
        return next((n for n in numbers if self.pieces[n % count] is piece), None)

    def read(self, piece: Piece) -> Bytes:
        """The bytes of a piece that nobody announced."""
        if piece.ref.parts:
            found = piece.read_into(aligned(piece.room), self.files)
        else:
            found = self.files.read(piece.ref, piece.start, piece.stop)
        with self._change:
            self.bytes_read += piece.nbytes
        return found

    def give_back(self, slot: int) -> None:
        """The bytes in a slot are no longer needed."""
        with self._change:
            self._free.append(slot)
            self._change.notify_all()

    def stop(self) -> None:
        """Let the threads end after the reads they are at."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def close(self) -> None:
        """End the threads and close the files. A read that the disk does not answer may go on."""
        self.stop()
        for thread in self._threads:
            thread.join(CLOSING_S)
        self.files.close()


class _Streamed(Weight):
    """A weight of which some rows are held in memory and the others come in pieces."""

    __slots__ = ("_held", "_pieces", "_ring")
    in_tiles = True

    def __init__(
        self, ref: WeightRef, held: Weight | None, pieces: Sequence[Piece], ring: _Ring
    ) -> None:
        super().__init__(ref, np.empty(0, np.uint8))
        self._held, self._pieces, self._ring = held, pieces, ring

    def tiles(self) -> Iterator[Weight]:
        """Its stored rows from the first to the last; each tile until the next is asked for."""
        if not by_rows(self.ref):
            yield self.whole()
            return
        if self._held is not None:
            yield self._held
        for piece, bytes_ in self._bytes():
            tile = Weight(piece.ref, bytes_)
            tile.first = piece.first
            yield tile

    def whole(self) -> Weight:
        """The weight in memory of its own."""
        if self.ref.parts and by_rows(self.ref):
            return self._joined()
        whole, done = np.empty(self.ref.nbytes, np.uint8), 0
        if self._held is not None:
            done = self._held.ref.nbytes
            whole[:done] = self._held.buffer
        for _, bytes_ in self._bytes():
            whole[done : done + bytes_.nbytes] = bytes_
            done += bytes_.nbytes
        return Weight(self.ref, whole)

    def _joined(self) -> Weight:
        """The tiles of a weight in parts, each part's rows behind those of the tile before."""
        whole = Weight(self.ref, np.empty(self.ref.nbytes, np.uint8))
        for tile in self.tiles():
            for part, rows in zip(whole.parts, tile.parts, strict=True):
                at = rows.ref.offset - part.ref.offset
                part.buffer[at : at + rows.ref.nbytes] = rows.buffer
        return whole

    def _bytes(self) -> Iterator[tuple[Piece, Bytes]]:
        for piece in self._pieces:
            if not _is_read(piece):
                yield piece, in_memory(piece.ref)[piece.start : piece.stop]
                continue
            taken = self._ring.take(piece)
            if taken is None:
                yield piece, self._ring.read(piece)
                continue
            try:
                yield piece, taken[1]
            finally:
                self._ring.give_back(taken[0])


class StreamProvider:
    """Streams weights through a ring of buffers; some of their rows may be held in memory.

    `refs` are all weights in the order of their use. `held` says of how many stored rows of which
    matrix (by `WeightRef.matrix`; of one that does not come in rows, all or none) `memory` keeps
    and serves. Of `tables` only rows are looked up, and each is read when it is wanted.
    """

    def __init__(
        self,
        refs: Sequence[WeightRef],
        *,
        memory: WeightsProvider | None = None,
        held: Mapping[tuple[object, ...], int] | None = None,
        tables: Sequence[WeightRef] = (),
        slots: int = MOST_PIECES,
    ) -> None:
        self._disk = DiskProvider()
        self._memory = memory or RamProvider()
        self._tables = {ref.matrix for ref in tables if _has_file(ref)}
        self._held = dict(held or {})
        self._cut = {
            ref.matrix: cut(ref, self._held.get(ref.matrix, 0))
            for ref in refs
            if ref.matrix not in self._tables and _has_file(ref) and not self._is_held(ref)
        }
        pieces = (piece for ref in refs for piece in self._cut.get(ref.matrix, ()))
        self._order = [piece for piece in pieces if _is_read(piece)]
        largest = max((piece.room for piece in self._order), default=0)
        self._ring = _Ring(slots if self._order else 0, largest)
        weakref.finalize(self, self._ring.stop)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of all weights."""
        memory = getattr(self._memory, "bytes_read", 0)
        return self._disk.bytes_read + self._ring.bytes_read + int(memory)

    @property
    def bytes_a_pass(self) -> int:
        """Bytes that every pass reads from disk."""
        return sum(piece.nbytes for piece in self._order)

    @property
    def passes(self) -> int:
        """Passes that were begun so far."""
        return self._ring.passes

    @property
    def pass_read(self) -> int:
        """Bytes of them that the pass under way has used, or the last one did."""
        return self._ring.pass_read

    @property
    def waited(self) -> float:
        """Seconds that passes have waited for the disk so far."""
        return self._ring.waited

    @property
    def reading(self) -> str:
        """The weight that was read last."""
        return self._ring.reading

    def _is_held(self, ref: WeightRef) -> bool:
        rows = self._held.get(ref.matrix, 0)
        return rows > 0 and (not by_rows(ref) or rows >= ref.stored_shape[0])

    def get(self, ref: WeightRef) -> Weight:
        """The weight: in memory, or a view of the pieces in which it comes."""
        if ref.matrix in self._tables:
            return self._disk.table(ref)
        if self._is_held(ref):
            return self._memory.get(ref)
        pieces = self._cut.get(ref.matrix)
        if pieces is None:
            return self._disk.get(ref)
        rows = self._held.get(ref.matrix, 0)
        held = self._memory.get(ref.rows(0, rows)) if rows else None
        return _Streamed(ref, held, pieces, self._ring)

    def stop_on(self, stop: threading.Event | None) -> None:
        """Give up a pass, with Interrupted, when `stop` is set while it waits for the disk."""
        self._ring.stop_on = self._disk.stop_on = stop

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """A pass begins. Its order is that of the weights this provider was made for."""
        self._disk.prefetch(refs)
        self._ring.begin(self._order)

    def read_through(self) -> None:
        """A pass in which all is read as ever, and nothing is computed: what the disk can do."""
        self._ring.begin(self._order)
        for piece in self._order:
            taken = self._ring.take(piece)
            if taken is not None:
                self._ring.give_back(taken[0])

    def release(self, ref: WeightRef) -> None:
        """Nothing: a piece is let go when the next one is asked for."""

    def close(self) -> None:
        """End the reading threads, and let go of memory and files."""
        self._ring.close()
        for provider in (self._memory, self._disk):
            getattr(provider, "close", lambda: None)()


def _has_file(ref: WeightRef) -> bool:
    return ref.nbytes > 0 and any(isinstance(p.source, Path) for p in ref.parts or (ref,))


def _is_read(piece: Piece) -> bool:
    return _has_file(piece.ref)
