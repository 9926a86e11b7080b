"""Many prompts at once: replies that share each pass over the weights.

Requests wait in a queue; as many as there are places and room for their caches are under way, and
when one ends the next begins beside the others (Yu et al. 2022, "Orca", for continuous batching).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from .errors import Interrupted, OnnxstreamError, UsageError
from .generation import Generation, Host
from .seat import BatchItem, BatchRequest, Place, Seat
from .work import Work

__all__ = ["Batch", "BatchItem", "BatchRequest"]

Start = Callable[[BatchRequest, Host], Generation]
"""Makes the reply to a request; what is wrong with the request is an OnnxstreamError."""


class Batch(Work, Iterator[BatchItem]):
    """Replies to many requests: yields an item each time that it has a further token or has ended.

    Up to `batch_size` replies (default: 8) are under way at a time, fewer where there is no room
    for their caches with all of `max_tokens`. Up to 8 are the same, to the last bit, as one after
    the other; more are computed as a prompt is. `side_by_side` is False when the graph cannot read
    several sequences in a pass: then they do come one after the other.
    """

    def __init__(
        self,
        model: Host,
        start: Start,
        requests: Iterable[BatchRequest],
        batch_size: int | None = None,
    ) -> None:
        from .sequences import Sequences, can_share_passes

        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: it must be at least 1 (--batch-size)")
        self._model, self._llm, self._start = model, model.llm, start
        self.side_by_side = can_share_passes(self._llm.graph, self._llm.pairs)
        self._sequences = Sequences(self._llm, batch_size)
        self._most = self._sequences.most if self.side_by_side else 1
        self._waiting: deque[BatchItem] = deque()
        self._next: Seat | None = None  # for whom there is no room yet
        self._seats: list[Seat] = []
        self._changed: dict[BatchItem, None] = {}  # in order
        self._stop = threading.Event()
        self._count = 0
        for request in requests:
            self.add(request)

    def add(self, request: BatchRequest) -> BatchItem:
        """Puts a request at the end of the queue; from any thread, while others are under way."""
        item = BatchItem(request, self._count)
        self._count += 1
        self._waiting.append(item)
        return item

    def stop(self) -> None:
        """Ends all replies with stop reason "interrupted"; callable from any thread."""
        self._stop.set()
        for seat in self._seats[:]:
            seat.item.stop()

    @property
    def stopped(self) -> bool:
        """True when no reply is under way, nor waits to be."""
        return self._stop.is_set() or not (self._waiting or self._next or self._seats)

    def finish(self, reason: str) -> None:
        """Ends all replies for `reason`, those that have not ended."""
        self._stop.set()
        seats, self._next = [*self._seats, *([self._next] if self._next else [])], None
        for seat in seats:
            if seat.item.generation is not None:
                seat.item.generation.finish(reason)
            self._leave(seat)
        while self._waiting:
            self._waiting[0].stop()
            self._changed[self._waiting.popleft()] = None

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> BatchItem:
        with self._model.claim(self):
            try:
                while not self._changed and not self.stopped:
                    self._advance()
            except Interrupted:
                self._stop.set()
            except BaseException:
                self.finish("interrupted")
                raise
            if self._stop.is_set():
                self.finish("interrupted")
            if not self._changed:
                raise StopIteration
            item = next(iter(self._changed))
            del self._changed[item]
            return item

    def _advance(self) -> None:
        """Let in who fits, let go who was stopped, and read on."""
        self._admit()
        for seat in self._seats[:]:
            if seat.item.generation is not None and seat.item.generation.stopped:
                self._take(seat)
        strands = {seat.strand: seat for seat in self._seats if seat.strand is not None}
        for strand, logits in self._sequences.step(strands, self._stop):
            strands[strand].logits = logits
            self._take(strands[strand])
        if not strands:
            for seat in self._seats[:1]:
                self._take(seat)

    def _admit(self) -> None:
        while len(self._seats) < self._most:
            if self._next is None:
                if not self._waiting:
                    return
                self._next = self._opened(self._waiting.popleft())
                continue
            seat, taken = self._next, sum(seat.nbytes for seat in self._seats)
            room = self._llm.cache_room - min(self._llm.cache_bytes, self._llm.cache_room)
            alone = self._most == 1 or seat.nbytes > room
            if self._seats and (alone or taken + seat.nbytes > room):
                return
            seat.begin(None if alone else self._sequences.open(seat.positions))
            self._seats.append(seat)
            self._next = None
            if alone:
                return

    def _opened(self, item: BatchItem) -> Seat | None:
        """A seat with its reply, not begun; None when something is wrong with the request."""
        model, seat = self._model, Seat(item, self._llm)
        llm, draft = (self._llm, model.draft) if self._most == 1 else (seat, None)
        place = Place(model.tokenizer, llm, draft, model.context, model.load_s)
        try:
            item.generation = self._start(item.request, place)
        except OnnxstreamError as error:
            item.error = error
            self._changed[item] = None
            return None
        if item.is_stopped:
            item.generation.stop()
        seat.positions = item.generation.most_positions
        seat.nbytes = self._llm.cache_bytes_at(seat.positions)
        return seat

    def _take(self, seat: Seat) -> None:
        seat.take()
        if seat.item.done:
            self._leave(seat)
        else:
            self._changed[seat.item] = None

    def _leave(self, seat: Seat) -> None:
        """The place is free, and so is the memory of the cache."""
        if seat in self._seats:
            self._seats.remove(seat)
        if seat.strand is not None:
            self._sequences.close(seat.strand)
        self._changed[seat.item] = None
