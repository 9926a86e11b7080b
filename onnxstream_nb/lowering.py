"""One token's plan with every shape fixed, replayed for one position after the other.

The counterpart of a captured CUDA graph: operators that can be lowered become rows of tables that
the thread team walks in one call each; the others (positions to cos and sin, an embedding's row)
run from Python between them, into the same arrays as the first time. What an operator's rows are,
and which arguments move with the position, it says itself (`op(..., lower=...)`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import Interrupted
from .plan import Plan, Step

TABLE_BYTES = 400_000_000  # of weights a table reads: no longer than it takes to notice a stop

Array = np.ndarray[Any, Any]
Argument = Callable[[dict[str, Any], str, bool], Any]


class _Host:
    """A step that Python runs again, its results copied to where the tables read them.

    `places` are the step's first results, each in memory of its own.
    """

    def __init__(self, step: Step, places: Sequence[Any]) -> None:
        self.step = step
        self._places = [p if isinstance(p, np.ndarray) else None for p in places]

    def run(self, values: dict[str, Any], argument: Argument) -> bool:
        """Run it; False when a result has another shape than the first time."""
        results = self.step.call([argument(values, n, native) for n, native in self.step.inputs])
        for place, result in zip(self._places, results, strict=True):
            if place is None or place is result:
                continue
            if place.shape != result.shape or place.dtype != result.dtype:
                return False
            np.copyto(place, result)
        return True


class Replay:
    """A plan recorded while it ran for one token.

    Recording is a run of its own: its results are in `values`. `run` is for feeds of the same
    shapes, with the same cache, and its weights where they were.
    """

    def __init__(
        self,
        plan: Plan,
        values: dict[str, Any],
        argument: Argument,
        make_table: Callable[[Iterable[Any]], Any],
        stop: threading.Event | None = None,
    ) -> None:
        self.values = values
        self._argument = argument
        self._make_table = make_table
        self._feeds = {v.name: values[v.name] for v in plan.graph.inputs}
        self._slots = [f for f in self._feeds.values() if _is_slot(f)]
        self._base = [slot.length for slot in self._slots]
        self._parts: list[_Host | Any] = []
        self._replayable = True  # a present's length is recorded: who reads it must run plainly
        pending: list[Any] = []
        read = 0
        for step in plan.steps:
            if stop is not None and stop.is_set():
                raise Interrupted("the run was stopped")
            arguments = [argument(values, name, native) for name, native in step.inputs]
            self._replayable &= not any(_is_slot(a) and a not in self._slots for a in arguments)
            rows = step.operator.lower and step.operator.lower(*arguments, **step.attributes)
            if rows is None:
                self._close(pending)
                results = step.call(arguments)
                if not _is_still_view(step, plan, results, arguments):
                    results = [_owned(r) for r in results]
                    self._parts.append(_Host(step, results))
            else:
                rows.run()
                pending.append(rows)
                results = rows.outputs
            values.update((n, r) for n, r in zip(step.outputs, results, strict=False) if n)
            read += sum(ref.nbytes for ref in step.weights)
            if read > TABLE_BYTES:
                self._close(pending)
                read = 0
        self._close(pending)
        self._capacities = [slot.capacity for slot in self._slots]

    @property
    def lowered(self) -> bool:
        """Whether it may be replayed and there is something to gain: a table at least."""
        return self._replayable and any(not isinstance(part, _Host) for part in self._parts)

    def _close(self, pending: list[Any]) -> None:
        if pending:
            self._parts.append(self._make_table(list(pending)))
            pending.clear()

    def fits(self, feeds: Mapping[str, Any], wanted: Sequence[str]) -> bool:
        """Whether these feeds have the recorded shapes and the cache its recorded place.

        The presents that were recorded are those of one position: whoever wants them runs plainly.
        """
        if feeds.keys() != self._feeds.keys():
            return False
        if any(_is_slot(self.values.get(name)) for name in wanted):
            return False
        for name, known in self._feeds.items():
            feed = feeds[name]
            if feed is known and _is_slot(feed):
                continue
            if not isinstance(feed, np.ndarray) or feed.dtype != known.dtype:
                return False
            if feed.shape != known.shape:
                return False
        moved = {slot.length - base for slot, base in zip(self._slots, self._base, strict=True)}
        room = all(
            slot.capacity == capacity and slot.length < capacity
            for slot, capacity in zip(self._slots, self._capacities, strict=True)
        )
        return room and len(moved) <= 1

    def run(self, feeds: Mapping[str, Any], stop: threading.Event | None) -> bool:
        """Replay it for these feeds; False when it turns out that they do not fit after all."""
        offset = self._slots[0].length - self._base[0] if self._slots else 0
        for name, known in self._feeds.items():
            if isinstance(known, np.ndarray):
                np.copyto(known, feeds[name])
        for part in self._parts:
            if stop is not None and stop.is_set():
                raise Interrupted("the run was stopped")
            if isinstance(part, _Host):
                if not part.run(self.values, self._argument):
                    return False
            else:
                part.run(offset)
        return True


def _is_slot(value: Any) -> bool:
    return hasattr(value, "reserve")


def _owned(result: Any) -> Any:
    """An array in memory of its own: what a view looks at may be another's next time."""
    return (
        np.array(result) if isinstance(result, np.ndarray) and result.base is not None else result
    )


def _is_still_view(
    step: Step, plan: Plan, results: Sequence[Any], arguments: Sequence[Any]
) -> bool:
    """Whether the results will always be the same look at the one argument that changes."""
    fixed = plan.graph.initializers
    changing = [
        a for a, (name, _) in zip(arguments, step.inputs, strict=True) if name and name not in fixed
    ]
    return len(changing) == 1 and all(
        isinstance(r, np.ndarray)
        and isinstance(changing[0], np.ndarray)
        and np.may_share_memory(r, changing[0])
        for r in results
    )
