"""What the engine has to say beside its work: lines of its log on standard error, each once, and
none into the middle of a reply."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .text import one_line

LOGGER = "onnxstream_nb"


class Told(logging.Handler):
    """Prints warnings as they come, or, while they are held, when that ends."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()
        self._waiting: list[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's message on one line, unless that was said before."""
        try:
            line = one_line(record.getMessage())
            if line in self._said:
                return
            self._said.add(line)
            if self._waiting is not None:
                self._waiting.append(line)
            else:  # standard error as it is now: a progress bar may have put itself before it
                print(line, file=sys.stderr, flush=True)
        except Exception:  # as every handler: what is said must not end what it is about
            self.handleError(record)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, nothing is printed."""
        with self._locked():
            self._waiting = []
        try:
            yield
        finally:
            with self._locked():
                lines, self._waiting = self._waiting or [], None
            for line in lines:
                print(line, file=sys.stderr, flush=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


@contextmanager
def telling() -> Iterator[None]:
    """Within, warnings of the engine are told on standard error."""
    logger, handler = logging.getLogger(LOGGER), Told()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def held() -> Iterator[None]:
    """Within, a reply is being shown: what is to be told is told behind it."""
    handlers = logging.getLogger(LOGGER).handlers
    handler = next((each for each in handlers if isinstance(each, Told)), None)
    if handler is None:
        yield
        return
    with handler.held():
        yield
