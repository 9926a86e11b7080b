"""Waiting for a few reads in such a way that whoever waits may give up.

A read cannot be called off, and a disk may take long, or not answer at all: threads read, several
at a time, and are left alone when nobody waits for them any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import Interrupted

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 4
LOOK_S = 0.05  # how often whoever waits looks whether to give up


def look(stop: threading.Event | None) -> None:
    """Raise Interrupted when `stop` is set."""
    if stop is not None and stop.is_set():
        raise Interrupted("the run was stopped")


def fetch_all(
    fetch: Callable[[Item], Result], items: Sequence[Item], stop: threading.Event
) -> list[Result]:
    """`fetch(item)` of each item, by threads. Raises what it raised, Interrupted on `stop`."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for i in range(first, len(items), THREADS):
                if errors or stop.is_set():
                    return
                results[i] = fetch(items[i])
        except BaseException as error:  # raised again by the thread that waits
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(first,), daemon=True)
        for first in range(min(THREADS, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(LOOK_S)
            look(stop)
    look(stop)
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(items))]
