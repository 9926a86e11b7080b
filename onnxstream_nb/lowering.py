"""A token's plan with every shape fixed, replayed for one position after the other.

The counterpart of a captured CUDA graph: operators that can be lowered become rows of tables that
the thread team walks in one call each; the others (positions to cos and sin, an embedding's row)
run from Python between them, into the same arrays as the first time. What an operator's rows are,
and which arguments move with the position, it says itself (`op(..., lower=...)`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import Interrupted
from .graph import WeightRef
from .plan import Form, Plan, Step

TABLE_BYTES = 800_000_000
"""Of weights that a table reads: no longer than may pass until a stop is noticed (a fifth of a
second where memory is read at 4 GB/s), and seldom enough that what Python does between two tables,
with cold caches, does not count."""

Array = np.ndarray[Any, Any]
Argument = Callable[[dict[str, Any], str, Form], Any]


_Late = list[tuple[str, Array]]
"""Names of values that are not arrays yet, and where tables want them: they are waited for when a
table comes, so that several can be computed at a time."""


class _Host:
    """A step that Python runs again.

    `places` hold, for each output that tables read, the array where they read it; what is None
    may have another shape every time.
    """

    def __init__(self, step: Step, places: Sequence[Any]) -> None:
        self.step = step
        self._places = places

    def run(self, values: dict[str, Any], argument: Argument, late: _Late) -> bool:
        """Run it; False when a result does not fit the place that tables read. What is still being
        computed elsewhere is put there later: see `late`."""
        results = self.step.call([argument(values, n, form) for n, form in self.step.inputs])
        for name, place, result in zip(self.step.outputs, self._places, results, strict=False):
            if place is None:
                values[name] = result
            elif not isinstance(result, np.ndarray) and _same_form(place, result):
                values[name] = result
                late.append((name, place))
            elif not _same_kind(place, result):
                return False
            elif place is not result:
                np.copyto(place, result)
        return True


@dataclass(frozen=True, slots=True)
class _Entry:
    """A step as it was recorded: its rows when it was lowered; whether its result is a view."""

    step: Step
    rows: Any = None
    is_view: bool = False


class Replay:
    """A plan recorded while it ran for one token, or for one of each of several sequences.

    Recording is a run of its own: its results are in `values`. `run` is for the next tokens: what
    tables read keeps its shape, and lasting weights stay where they are, as a cache does; a step
    with others runs from Python. `previous` are the values of an earlier recording for as many
    `tokens`: what had another shape then is no table's business.
    """

    def __init__(
        self,
        plan: Plan,
        values: dict[str, Any],
        argument: Argument,
        make_table: Callable[[Iterable[Any]], Any],
        is_lasting: Callable[[WeightRef], bool],
        stop: threading.Event | None = None,
        previous: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self._previous = previous or {}
        self._argument = argument
        self._is_lasting = is_lasting
        feeds = {v.name: values[v.name] for v in plan.graph.inputs}
        self.slots = {name: feed for name, feed in feeds.items() if _is_slot(feed)}
        self._arrays = {n: feed for n, feed in feeds.items() if n not in self.slots}
        self._rooms = list({_fills(slot): slot for slot in self.slots.values()}.values())
        self._base = self._places()
        self.tokens: int = self._rooms[0].tokens if self._rooms else 1
        self._replayable = True  # a present's length is recorded: who reads it must run plainly
        entries = [self._record(plan, step, stop) for step in plan.steps]
        self._fixed = _read_by_tables(entries, plan)
        self._parts = list(self._make_parts(entries, plan, make_table))

    def _places(self) -> list[tuple[int, int]]:
        """(length, capacity) of all sequences, once where slots are filled together."""
        return [place for slot in self._rooms for place in slot.places]

    def _record(self, plan: Plan, step: Step, stop: threading.Event | None) -> _Entry:
        """Run one step, lowered where that is possible."""
        if stop is not None and stop.is_set():
            raise Interrupted("the run was stopped")
        arguments = [self._argument(self.values, name, form) for name, form in step.inputs]
        own = self.slots.values()
        self._replayable &= not any(_is_slot(a) and a not in own for a in arguments)
        still = not any(self._varies(name) or self._comes(name, f) for name, f in step.inputs)
        rows = None
        if step.operator.lower and still and all(map(self._is_lasting, step.weights)):
            rows = step.operator.lower(*arguments, **step.attributes)
        if rows is None:
            results = step.call(arguments)
            is_view = _is_still_view(step, plan, results, arguments)
            if not is_view:
                results = [_owned(r) for r in results]
        else:
            rows.run()
            results, is_view = rows.outputs, False
        self.values.update((n, r) for n, r in zip(step.outputs, results, strict=False) if n)
        return _Entry(step, rows, is_view)

    def _varies(self, name: str) -> bool:
        """Whether a value's shape follows the position."""
        known, now = self._previous.get(name), self.values.get(name)
        return (
            isinstance(known, np.ndarray)
            and isinstance(now, np.ndarray)
            and (known.shape != now.shape)
        )

    def _comes(self, name: str, form: Form) -> bool:
        """Whether a value has to be brought from elsewhere: no row can hold its address."""
        value = self.values.get(name)
        return form is Form.ARRAY and value is not None and not isinstance(value, np.ndarray)

    def _make_parts(
        self, entries: Sequence[_Entry], plan: Plan, make_table: Callable[[Iterable[Any]], Any]
    ) -> Iterator[Any]:
        """Tables of rows as long as may be, and between them the steps that Python runs: those that
        need nothing of a table before it."""
        lasting = set(self._fixed)  # values that stay where they are
        computed: set[str] = set()  # in tables, and what is made of it
        pending: list[Any] = []
        read = 0
        for entry in entries:
            changing = _changing(entry.step, plan)
            follows = not computed.isdisjoint(changing)
            if entry.rows is not None:
                waits = follows and entry.rows.fetch is not None
                if pending and (waits or type(pending[0]) is not type(entry.rows)):
                    yield make_table(pending)
                    pending, read = [], 0
                pending.append(entry.rows)
                if not entry.rows.swift:
                    read += sum(ref.nbytes for ref in entry.step.weights)
                lasting.update(entry.step.outputs)
            elif entry.is_view and changing[0] in lasting:
                lasting.update(entry.step.outputs)
            else:
                if pending and follows:
                    yield make_table(pending)
                    pending, read = [], 0
                fixed = self._fixed
                places = [self.values[n] if n in fixed else None for n in entry.step.outputs]
                yield _Host(entry.step, places)
            if follows or entry.rows is not None:
                computed.update(entry.step.outputs)
            if read > TABLE_BYTES and pending:
                yield make_table(pending)
                pending, read = [], 0
        if pending:
            yield make_table(pending)

    @property
    def lowered(self) -> bool:
        """Whether it may be replayed and there is something to gain: a table at least."""
        return self._replayable and any(not isinstance(part, _Host) for part in self._parts)

    def fits(self, feeds: Mapping[str, Any], wanted: Sequence[str]) -> bool:
        """Whether these feeds have the shapes that tables read, and the cache has room.

        The presents that were recorded are those of one position: whoever wants them runs plainly.
        """
        if any(_is_slot(self.values.get(name)) for name in wanted):
            return False
        if not self.slots.items() <= feeds.items():
            return False
        places = self._places()
        moved = [now - then for (now, _), (then, _) in zip(places, self._base, strict=True)]
        longer = moved[0] if moved else 0  # than a mask was
        for name, known in self._arrays.items():
            feed = feeds[name]
            follows = name not in self._fixed and feed.size == known.size + longer
            if not (_same_kind(known, feed) or follows):
                return False
        roomy = all(length < capacity for length, capacity in places)
        return roomy and all(by == longer for by in moved)

    def run(self, feeds: Mapping[str, Any], stop: threading.Event | None) -> bool:
        """Replay it for these feeds; False when it turns out that they do not fit after all."""
        offset = self._rooms[0].places[0][0] - self._base[0][0] if self._rooms else 0
        for name, known in self._arrays.items():
            if name in self._fixed:
                np.copyto(known, feeds[name])
            else:
                self.values[name] = feeds[name]
        late: _Late = []
        for part in self._parts:
            if stop is not None and stop.is_set():
                raise Interrupted("the run was stopped")
            if isinstance(part, _Host):
                if not part.run(self.values, self._argument, late):
                    return False
            else:
                self._arrive(late)
                part.run(offset)
        self._arrive(late)
        return True

    def _arrive(self, late: _Late) -> None:
        for name, place in late:
            np.copyto(place, np.asarray(self.values[name]))
            self.values[name] = place
        late.clear()


def _read_by_tables(entries: Sequence[_Entry], plan: Plan) -> set[str]:
    """The values that must stay where they are, since rows hold their addresses."""
    fixed: set[str] = set()
    for entry in reversed(entries):
        if entry.rows is not None:
            fixed.update(name for name, _ in entry.step.inputs if name)
        elif entry.is_view and fixed.intersection(entry.step.outputs):
            fixed.update(_changing(entry.step, plan))
    return fixed


def _changing(step: Step, plan: Plan) -> list[str]:
    """The inputs of a step that are not initializers."""
    fixed = plan.graph.initializers
    return [name for name, _ in step.inputs if name and name not in fixed]


def _is_slot(value: Any) -> bool:
    return hasattr(value, "reserve")


def _fills(slot: Any) -> Any:
    """What says how far a slot is filled, which it may share with others; else itself."""
    return tuple(map(id, getattr(slot, "fills", (slot,))))


def _same_kind(place: Any, value: Any) -> bool:
    """Whether a value has the shape and type of a place for it."""
    return isinstance(value, np.ndarray) and _same_form(place, value)


def _same_form(place: Any, value: Any) -> bool:
    return bool(value.shape == place.shape and value.dtype == place.dtype)


def _owned(result: Any) -> Any:
    """An array in memory of its own: what a view looks at may be another's next time, and what is
    not one yet is waited for."""
    if isinstance(result, np.ndarray):
        return np.array(result) if result.base is not None else result
    waits = hasattr(result, "__array__") and not _is_slot(result)
    return np.asarray(result) if waits else result


def _is_still_view(
    step: Step, plan: Plan, results: Sequence[Any], arguments: Sequence[Any]
) -> bool:
    """Whether the results will always be the same look at the one argument that changes."""
    names = _changing(step, plan)
    if len(names) != 1:
        return False
    changing = next(a for a, (n, _) in zip(arguments, step.inputs, strict=True) if n == names[0])
    return isinstance(changing, np.ndarray) and all(
        isinstance(r, np.ndarray) and np.may_share_memory(r, changing) for r in results
    )
