"""Sets of integers as intervals, against Python's own sets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from onnxstream_nb.kernels.intervals import Intervals

numbers = st.integers(0, 40)
changes = st.lists(st.tuples(st.booleans(), numbers, numbers), max_size=30)


def filled(todo: list[tuple[bool, int, int]]) -> tuple[Intervals, set[int]]:
    """The same additions and removals in both; start may lie behind stop."""
    intervals, wanted = Intervals(), set()
    for adds, start, stop in todo:
        if adds:
            intervals.add(start, stop)
            wanted |= set(range(start, stop))
        else:
            intervals.remove(start, stop)
            wanted -= set(range(start, stop))
    return intervals, wanted


@given(changes)
def test_it_holds_what_a_set_holds(todo: list[tuple[bool, int, int]]) -> None:
    intervals, wanted = filled(todo)
    assert {i for start, stop in intervals for i in range(start, stop)} == wanted
    assert intervals.total == len(wanted)


@given(changes)
def test_intervals_are_sorted_and_never_touch(todo: list[tuple[bool, int, int]]) -> None:
    spans = list(filled(todo)[0])
    assert all(start < stop for start, stop in spans)
    assert all(a[1] < b[0] for a, b in pairwise(spans))


@given(changes, numbers, numbers)
def test_overlap(todo: list[tuple[bool, int, int]], start: int, stop: int) -> None:
    intervals, wanted = filled(todo)
    parts = intervals.overlap(start, stop)
    assert {i for a, b in parts for i in range(a, b)} == wanted & set(range(start, stop))
    assert all(a < b for a, b in parts)


@given(changes, st.integers(1, 10))
def test_the_lowest_place_for_a_size(todo: list[tuple[bool, int, int]], size: int) -> None:
    intervals, wanted = filled(todo)
    places = [i for i in range(60) if set(range(i, i + size)) <= wanted]
    assert intervals.lowest(size) == (places[0] if places else None)
