"""One thread for the model's work, so that the main thread stays free to answer Ctrl-C."""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
TICK_S = 0.05
LAST_WARNING = 3


class Insisted(KeyboardInterrupt):
    """Ctrl-C was pressed again and again: the user wants to leave."""


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Worker:
    """A single daemon thread that does one piece of work after another."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="model", daemon=True).start()

    def run(self, work: Callable[[Callable[[T], None]], None]) -> Iterator[T | None]:
        """Starts `work(emit)` in the thread; yields what it emits as it comes, and None whenever
        TICK_S seconds have passed without; at the end raises what `work` raised."""
        events: queue.SimpleQueue[_Item[T] | _End] = queue.SimpleQueue()

        def job() -> None:
            try:
                work(lambda value: events.put(_Item(value)))
            except BaseException as error:  # it is raised again in the thread that waits
                events.put(_End(error))
            else:
                events.put(_End())

        self._jobs.put(job)
        return self._events(events)

    def close(self) -> None:
        """Ends the thread after the work it has been given."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    @staticmethod
    def _events(events: queue.SimpleQueue[_Item[T] | _End]) -> Iterator[T | None]:
        while True:
            try:
                event = events.get(timeout=TICK_S)
            except queue.Empty:
                yield None
                continue
            if isinstance(event, _Item):
                yield event.value
            elif event.error is not None:
                raise event.error
            else:
                return


@contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Within, the first Ctrl-C calls `stop`, at once and without an exception that could hit
    anywhere. The third raises Insisted, for work that does not end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    count = 0

    def handler(signum: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            stop()
        elif count >= LAST_WARNING:
            raise Insisted

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def no_echo() -> Iterator[None]:
    """Within, keys typed ahead are not shown, since they would end up inside the reply; they are
    still read by the next prompt. Does nothing where standard input is no Unix terminal."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = list(before)
    quiet[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
