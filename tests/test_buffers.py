"""Memory for results: never that of somebody who can still see it, and never much more than lives.

Run with JIT off as well (test_jit_off.py).
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxstream_nb.kernels import buffers
from onnxstream_nb.kernels.buffers import (
    LINE,
    PAGE,
    SLACK,
    SMALL,
    SPARSE,
    Arena,
    arena,
    computed,
    contiguous,
    empty,
)  # fmt: skip

Array = np.ndarray[Any, Any]
KB = 1 << 10


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    gc.collect()  # what earlier tests left in cycles
    arena().trim()
    yield
    arena().trim()


def address(array: Array) -> int:
    return int(array.ctypes.data)


def take(where: Arena, nbytes: int) -> Array:
    return where.array((nbytes,), np.uint8, nbytes)  # type: ignore[no-any-return]


def free_spans(where: Arena) -> list[tuple[int, int]]:
    where.usage()  # looks at what has died
    return [span for home in where._ranges for span in home.free]


# -- arrays


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7,), 9, (512, 577), (SMALL // 4,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
def test_shape_type_and_room_for_all_elements(shape: Any, dtype: Any) -> None:
    array = empty(shape, dtype)
    wanted = np.empty(shape, dtype)
    assert array.shape == wanted.shape and array.dtype == dtype and array.flags.c_contiguous
    array[...] = 1
    assert (array == 1).all()


def test_large_arrays_are_in_the_arena_and_small_ones_are_not() -> None:
    before = arena().usage().live
    held = empty((SMALL - 1,), np.uint8), empty((SMALL,), np.uint8), empty((SMALL + 1,), np.uint8)
    assert arena().usage().live - before == SMALL + SMALL + LINE
    del held
    assert arena().usage().live == before


def test_memory_is_used_again_for_whatever_fits() -> None:
    first = empty((1000, 100))
    where = address(first)
    del first
    assert address(empty((1000, 99))) == where
    assert address(empty((500, 41))) == where


def test_a_view_keeps_it() -> None:
    first = empty((1000, 100))
    first[:] = 7
    view = first.reshape(-1)[5::3].T
    del first
    second = empty((1000, 100))
    second[:] = 8
    assert (view == 7).all()
    where = address(second)
    del view
    assert address(empty((1000, 100))) != where


def test_contiguous_copies_only_what_is_not() -> None:
    x = np.arange(300 * 200, dtype=np.float32).reshape(300, 200)
    assert contiguous(x) is x and contiguous(x, np.float32) is x
    before = arena().usage().live
    turned = contiguous(x.T)
    assert turned.flags.c_contiguous and (turned == x.T).all()
    assert arena().usage().live - before == x.nbytes
    assert contiguous(x, np.float16).dtype == np.float16
    words = np.array([["a", "b"], ["c", "d"]], object)
    assert contiguous(words.T).tolist() == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize("size", [10, SMALL])
def test_computed_is_what_the_function_computes(size: int) -> None:
    x = np.linspace(-3, 3, size, dtype=np.float32)
    for function, operands in (
        (np.negative, (x,)), (np.equal, (x, x[:1])), (np.add, (x, x)),
        (np.isnan, (x[::2],)), (lambda a: a * 2, (x,)),
    ):  # fmt: skip
        got, wanted = computed(function, *operands), function(*operands)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_array_equal(got, wanted)
    words = np.full(SMALL, "a", object)
    assert computed(np.equal, words, words).all()


# -- any sequence of arrays

sizes = st.integers(1, 400 * KB)
sequences = st.lists(st.tuples(sizes, st.integers(0, 30), st.booleans()), max_size=60)
"""(bytes, which of those alive dies first, whether pages are given back then)."""


def pattern(array: Array, seed: int) -> Array:
    return np.resize(np.random.default_rng(seed).integers(0, 256, 997, np.uint8), array.size)


@settings(max_examples=60, deadline=None)
@given(sequences)
def test_no_two_arrays_overlap_and_none_loses_its_bytes(todo: list[tuple[int, int, bool]]) -> None:
    where, alive = Arena(), list[tuple[Array, int]]()
    for number, (nbytes, dies, trims) in enumerate(todo):
        if dies < len(alive):
            del alive[dies]
        if trims:
            where.trim(nbytes)
        array = take(where, nbytes)
        array[:] = pattern(array, number)
        alive.append((array, number))
        places = sorted((address(a), address(a) + a.nbytes) for a, _ in alive)
        assert all(one[1] <= other[0] for one, other in pairwise(places))
        assert all(start % LINE == 0 for start, _ in places)
    for array, number in alive:
        assert (array == pattern(array, number)).all()


@settings(max_examples=60, deadline=None)
@given(sequences)
def test_what_is_touched_stays_near_what_lives(todo: list[tuple[int, int, bool]]) -> None:
    """At no time more than an eighth above the most that lived at once, but for parts of pages."""
    where, alive = Arena(), list[Array]()
    most = 0
    for nbytes, dies, _ in todo:
        if dies < len(alive):
            del alive[dies]
        alive.append(take(where, nbytes))
        live = sum(-(-a.nbytes // LINE) * LINE for a in alive)
        most, usage = max(most, live), where.usage()
        assert (usage.live, usage.peak_live) == (live, most)
        assert live <= usage.touched <= usage.peak_touched
        holes = len(free_spans(where))
        assert not SPARSE or usage.touched <= most + most // SLACK + 2 * PAGE * holes


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_free_neighbours_become_one(nbytes: list[int], random: Any) -> None:
    where = Arena()
    held = [take(where, n) for n in nbytes]
    order = list(range(len(held)))
    random.shuffle(order)
    alive: dict[int, Array] = dict(enumerate(held))
    del held
    for i in order:
        del alive[i]
        spans = free_spans(where)
        assert all(one[1] < other[0] for one, other in pairwise(spans))
    assert spans == [(0, len(where._ranges[0].memory))]
    assert where.usage().live == 0


# -- growing, and giving back


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_a_full_range_is_followed_by_another(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_address_space", lambda: room)
    monkeypatch.setattr(buffers, "RANGE", room)
    where = Arena()
    held = [take(where, 300 * KB) for _ in range(10)]
    assert len(where._ranges) == (10 if room == 0 else 4)
    large = take(where, 3 << 20)
    large[-1], places = 1, sorted((address(a), address(a) + a.nbytes) for a in [*held, large])
    assert all(one[1] <= other[0] for one, other in pairwise(places))
    del held, large
    assert where.usage().live == 0
    where.trim()
    assert where._ranges == [] and where.usage().touched == 0


def test_a_system_that_counts_what_is_reserved_gets_asked_for_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    original = buffers.private_memory

    def memory(size: int) -> Any:
        asked.append(size)
        if size > 500 * KB:
            raise OSError("Cannot allocate memory")
        return original(size)

    monkeypatch.setattr(buffers, "private_memory", memory)
    where = Arena()
    array = take(where, 400 * KB)
    array[:] = 1
    assert asked[-1] == 400 * KB and asked == sorted(asked, reverse=True) and len(asked) > 1
    with pytest.raises(MemoryError, match="for an array: Cannot allocate"):
        take(where, 600 * KB)
    assert (array == 1).all() and where.usage().live == array.nbytes


def test_limited_addresses_are_not_all_reserved() -> None:
    resource = pytest.importorskip("resource")
    if not SPARSE:
        assert buffers._address_space() == buffers.RANGE
        return
    low, high = resource.getrlimit(resource.RLIMIT_AS)
    assert buffers._address_space() > buffers.RANGE or low != resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, high))
    try:
        assert buffers._address_space() == buffers.RANGE
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (low, high))


@pytest.mark.skipif(not SPARSE, reason="this system cannot take single pages back")
def test_trim_keeps_what_it_is_told_and_all_that_lives() -> None:
    where = Arena()
    held = [take(where, 256 * KB) for _ in range(8)]
    for i, array in enumerate(held):
        array[:] = i
    del array, held[1::2]
    assert where.usage().touched == 8 * 256 * KB
    where.trim(600 * KB)
    assert where.usage().touched == 4 * 256 * KB + 600 * KB
    where.trim()
    usage = where.usage()
    assert usage.touched == usage.live == 4 * 256 * KB
    assert usage.peak_touched == 8 * 256 * KB
    assert [int(a[0]) for a in held] == [0, 2, 4, 6]
    assert all((a == a[0]).all() for a in held)
    hole = take(where, 256 * KB)
    assert not hole.any()  # a fresh page
    where.reset_peaks()
    assert where.usage().peak_live == where.usage().peak_touched == 5 * 256 * KB


@pytest.mark.skipif(not SPARSE, reason="this system cannot take single pages back")
def test_a_page_with_a_part_of_an_array_stays() -> None:
    where = Arena()
    first, second, third = (take(where, n) for n in (PAGE + LINE, 3 * PAGE, PAGE + LINE))
    first[:], third[:] = 1, 3
    del second
    where.trim()
    assert first.all() and third.all()
    assert where.usage().touched - where.usage().live == PAGE  # of three: parts of two pages


@pytest.mark.skipif(not SPARSE, reason="this system cannot take single pages back")
def test_what_was_not_needed_lately_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "SPARE", 64 * KB)
    where = Arena()

    def run(*sizes: int) -> int:
        held = [take(where, n * KB) for n in sizes]
        del held
        where.trim_unused()
        return int(where.usage().touched)

    assert run(400, 800) == run(400, 800) == 1200 * KB
    assert run(64) == run(64) == (64 + 8 + 64) * KB
    kept = take(where, 32 * KB)
    where.trim_unused()
    assert where.usage().touched == (32 + 4 + 64) * KB
    assert run(800) == 832 * KB and kept.size == 32 * KB


@pytest.mark.skipif(not SPARSE, reason="this system cannot take single pages back")
def test_an_earlier_peak_does_not_excuse_later_holes() -> None:
    where = Arena()
    large = take(where, 8000 * KB)
    del large
    where.trim()
    held = [take(where, 100 * KB) for _ in range(10)]
    del held[::2]
    rest = [take(where, 101 * KB) for _ in range(5)]  # none fits in a hole
    assert where.usage().touched <= 1005 * KB * 9 // 8 + 10 * PAGE
    assert len(rest) == 5


# -- threads


def test_threads_never_share_memory() -> None:
    wrong: list[int] = []

    def work(mine: int) -> None:
        for i in range(200):
            array = empty((40_000 + 500 * (i % 7),))
            array[:] = mine
            if not (array == mine).all():
                wrong.append(mine)
            if i % 50 == 49:
                arena().trim()

    before = arena().usage().live
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena().usage().live == before


def test_an_array_may_die_in_another_thread() -> None:
    where = Arena()
    held = [take(where, 100 * KB) for _ in range(50)]
    first = address(held[0])

    def drop() -> None:
        while held:
            held.pop()

    threads = [threading.Thread(target=drop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert where.usage().live == 0
    assert address(take(where, 5000 * KB)) == first


def test_an_array_may_die_while_another_is_placed() -> None:
    """As the collector of cycles has it: within the arena's own methods."""
    where = Arena()
    doomed = [take(where, 100 * KB) for _ in range(3)]
    place = where._place

    def collecting(size: int) -> Any:
        doomed.clear()
        return place(size)

    where._place = collecting  # type: ignore[method-assign]
    array = take(where, 100 * KB)
    array[:] = 1
    assert where.usage().live == array.nbytes
    assert free_spans(where)[0] == (0, 3 * 100 * KB)
