"""The thread team: every share once, rows in order, parking and waking, callers on many threads."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.kernels import threads as module
from onnxstream_nb.kernels.jit import JIT, Kernel, arg
from onnxstream_nb.kernels.threads import MAX_THREADS, Team, set_threads, team, team_of
from onnxstream_nb.kernels.vector import atomic_add, atomic_load, atomic_store

LIMIT_S = 60  # before a test that hangs is given up
SIZES = (1, 2, 3, 5, 8)
ARGUMENTS = 31


class Uncached(Kernel):  # type: ignore[misc]
    """A kernel of this file that no registry and no cache knows."""

    _path = None


@Uncached
def count_shares(args: int, thread: int, threads: int) -> None:
    """args: cells (threads,), a cell for the number of shares. Each adds one to its own cell."""
    atomic_add(arg(args, 0) + 8 * thread, 1)
    atomic_store(arg(args, 1), threads)


@Uncached
def in_order(args: int, thread: int, threads: int) -> None:
    """args: a counter, the row, a cell of errors. Row r may start when r rows are complete."""
    before = atomic_add(arg(args, 0), 1)
    if before < arg(args, 1) * threads or before >= (arg(args, 1) + 1) * threads:
        atomic_add(arg(args, 2), 1)


@Uncached
def count_by_shares(args: int, thread: int, threads: int) -> None:
    """args: cells (33, 33). Counts in cell (threads, thread)."""
    atomic_add(arg(args, 0) + 8 * (33 * threads + thread), 1)


@Uncached
def write_down(args: int, thread: int, threads: int) -> None:
    """args: a counter, cells (threads,). Writes which share it is into the next cell."""
    atomic_store(arg(args, 1) + 8 * atomic_add(arg(args, 0), 1), thread)


@Uncached
def add_arguments(args: int, thread: int, threads: int) -> None:
    """args: a cell, then 30 numbers, of which number i counts i times."""
    if thread == 0:
        total = 0
        for i in range(1, 31):
            total += i * arg(args, i)
        atomic_store(arg(args, 0), total)


@Uncached
def linger(args: int, thread: int, threads: int) -> None:
    """args: a cell, and how long to spin in it. Marks the share as done."""
    for _ in range(arg(args, 1)):
        atomic_load(arg(args, 0))
    atomic_add(arg(args, 0), 1)


def within_limit(function: Callable[[], None]) -> None:
    """Run it on a thread of its own; fail instead of hanging."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "the team hangs"
    if errors:
        raise errors[0]


def check_run(squad: Team, rows: int) -> None:
    """All shares of all rows ran once, in order."""
    cells = np.zeros(16, np.int64)
    where = cells.ctypes.data
    squad.run([(in_order, where, row, where + 64) for row in range(rows)])
    assert cells[8] == 0, "a row began before the one before it was complete"
    assert cells[0] % rows == 0 and cells[0] > 0
    assert cells[0] == squad.shares * rows


@pytest.mark.parametrize("size", SIZES)
def test_every_share_runs_once(size: int) -> None:
    def body() -> None:
        squad = Team(size)
        cells, number = np.zeros(64, np.int64), np.zeros(1, np.int64)
        for times in range(1, 200):
            squad.run([(count_shares, cells.ctypes.data, number.ctypes.data)])
            assert number[0] == squad.shares >= size
            assert (cells[: squad.shares] == times).all() and not cells[squad.shares :].any()

    within_limit(body)


@pytest.mark.parametrize("size", SIZES)
def test_many_runs_of_many_rows(size: int) -> None:
    def body() -> None:
        squad = Team(size)
        for i in range(400):
            check_run(squad, 1 + i % 7)
        for rows in (16, 17, 33, 500):  # the table grows
            check_run(squad, rows)

    within_limit(body)


@pytest.mark.parametrize("size", SIZES)
def test_rows_may_be_cut_into_fewer_or_more_shares(size: int) -> None:
    """Each of another number than the row before it: nobody takes a share that is not there."""

    def body() -> None:
        squad, cells = Team(size), np.zeros((33, 33), np.int64)
        wanted = [0, 1, size, 0, 2, 1, 3, 100, size, size + 1, 1, 0] * 20
        for _ in range(50):
            squad.run([(count_by_shares, cells.ctypes.data)] * len(wanted), tuple(wanted))
        cut = [min(squad.most, n) if n else squad.shares for n in wanted]
        for shares in range(33):
            assert (cells[shares, :shares] == 50 * cut.count(shares)).all()
            assert not cells[shares, shares:].any()

    within_limit(body)


def test_a_member_takes_its_own_shares_and_then_another_s_from_behind() -> None:
    if not JIT:
        pytest.skip("uncompiled kernels run one after the other")
    squad, count, cells = Team(2), np.zeros(1, np.int64), np.zeros(16, np.int64)
    squad._started = True  # but for the caller, nobody comes
    squad.run([(write_down, count.ctypes.data, cells.ctypes.data)], (16,))
    assert cells.tolist() == [*range(8), *reversed(range(8, 16))]


def test_a_run_of_no_rows_does_nothing() -> None:
    def body() -> None:
        squad = Team(2)
        for i in range(500):
            squad.run([])
            check_run(squad, 1 + i % 3)

    within_limit(body)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_take_thirty_one_arguments(size: int) -> None:
    squad, cell = Team(size), np.zeros(1, np.int64)
    numbers = [(-1) ** i * (2**40 + i) for i in range(1, ARGUMENTS)]
    squad.run([(add_arguments, cell.ctypes.data, *numbers)])
    assert cell[0] == sum(i * n for i, n in enumerate(numbers, 1))
    squad.run([(add_arguments, cell.ctypes.data, *[0] * 30)])
    assert cell[0] == 0


def test_more_arguments_than_a_row_holds_are_refused() -> None:
    cell = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="broadcast"):
        Team(1).run([(add_arguments, cell.ctypes.data, *[0] * module.COLUMNS)])


def parked(squad: Team) -> list[int]:
    state = squad._state + module.PARKED
    where = [state + module.LINE * member for member in range(1, squad.size)]
    return [ctypes.c_int64.from_address(p).value for p in where]


@pytest.mark.skipif(not JIT, reason="without the compiler there is one thread")
def test_members_park_when_idle_and_wake_again() -> None:
    def body() -> None:
        squad = Team(3)
        for rows in (3, 9):
            check_run(squad, rows)
            until = time.monotonic() + 20
            while not all(parked(squad)) and time.monotonic() < until:
                time.sleep(0.02)
            assert all(parked(squad))
            before = time.process_time()
            time.sleep(0.3)
            assert time.process_time() - before < 0.15, "idle members keep a core busy"
        until = time.monotonic() + 20
        while any(parked(squad)) and time.monotonic() < until:
            check_run(squad, 2)  # woken members join when the system lets them
        assert not all(parked(squad))

    within_limit(body)


def test_pauses_of_every_length_between_runs() -> None:
    def body() -> None:
        squad = Team(2)
        for i in range(150):
            check_run(squad, 1 + i % 3)
            time.sleep(i * 2e-5)  # around the moment of parking

    within_limit(body)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_two_python_threads_share_a_team(size: int) -> None:
    def body() -> None:
        squad, errors = Team(size), []

        def caller() -> None:
            try:
                for i in range(200):
                    check_run(squad, 1 + i % 5)
            except AssertionError as error:
                errors.append(error)

        callers = [threading.Thread(target=caller, daemon=True) for _ in range(3)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        assert not errors

    within_limit(body)


def test_teams_of_different_sizes_side_by_side() -> None:
    def body() -> None:
        squads = [Team(size) for size in (1, 2, 3, 5)]
        for i in range(100):
            for squad in squads:
                check_run(squad, 1 + i % 4)

    within_limit(body)


def test_long_kernels_are_waited_for() -> None:
    def body() -> None:
        squad, cell = Team(3), np.zeros(1, np.int64)
        for _ in range(5):
            cell[0] = 0
            squad.run([(linger, cell.ctypes.data, 300000)] * 2)
            assert cell[0] == 2 * squad.shares

    within_limit(body)


def test_a_kernel_releases_the_lock_of_python() -> None:
    if not JIT:
        pytest.skip("uncompiled kernels hold the lock")
    cell, ticks, done = np.zeros(1, np.int64), [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    watcher = threading.Thread(target=tick)
    Team(1).run([(linger, cell.ctypes.data, 1)])
    watcher.start()
    Team(1).run([(linger, cell.ctypes.data, 1_000_000_000)])
    during = ticks[0]
    done.set()
    watcher.join()
    assert during > 3


# -- working memory, choosing a team -----------------------------------------------------------


def test_scratch_is_aligned_and_apart() -> None:
    squad = Team(3)
    for each in (1, 4096, 4097, 100_000):
        where, between, held = squad.scratch(each)
        assert where % module.LINE == 0 and between >= each and between % 4096 == 0
        start = held.ctypes.data
        assert start <= where and where + between * squad.shares <= start + held.nbytes


def test_scratch_of_another_thread_s_call_is_not_freed() -> None:
    squad = Team(1)
    first, _, held = squad.scratch(4096)
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.append(squad.scratch(1_000_000)))
    thread.start()
    thread.join()
    assert other[0][0] != first and held.nbytes >= 4096  # still alive: two memories


@pytest.fixture
def chosen() -> Iterator[None]:
    yield
    set_threads(1)


@pytest.mark.usefixtures("chosen")
def test_every_python_thread_chooses_its_own_team() -> None:
    set_threads(2)
    sizes: list[int] = []
    thread = threading.Thread(target=lambda: sizes.append(team().size))
    thread.start()
    thread.join()
    assert team().size == 2 and team() is team_of(2) and sizes == [1]


def test_sizes_are_held_within_limits() -> None:
    assert [Team(n).size for n in (-3, 0, 1, MAX_THREADS, 1000)] == [
        1, 1, 1, MAX_THREADS, MAX_THREADS,
    ]  # fmt: skip
    within_limit(lambda: check_run(Team(1000), 2))
