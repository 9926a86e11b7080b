"""A line beneath plain text that is being written to a terminal, while the next piece takes long.

Imports rich at once, as markdown.py does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console

from .markdown import dimmed
from .waiting import Waiting

TICK_S = 0.1
TAB = 8


class Beneath:
    """One line beneath the end of a text that is being written, erased before more of it comes.

    `console` is where the line goes, a terminal; `text` the terminal that the text goes to, None
    when it goes elsewhere. Wide characters and tabs count as terminals count them.
    """

    def __init__(self, console: Console, text: Console | None) -> None:
        self._console, self._text = console, text
        self._column = 0  # of the cursor behind the text; the width, when the last column is full
        self._shown = ""

    def passed(self, text: str) -> None:
        """So much more of the text was written."""
        if self._text is None:
            return
        width = self._text.width
        if "\n" in text:
            self._column = 0
        for character in text[text.rfind("\n") + 1 :]:
            if character == "\t":
                self._column = max(self._column, min(width - 1, (self._column // TAB + 1) * TAB))
                continue
            cells = cell_len(character)
            self._column = cells if self._column + cells > width else self._column + cells

    def show(self, line: str) -> None:
        """Show this line instead of the last one; none when it is empty."""
        if not line:
            return self.hide()
        below = "\n" if self._column and not self._shown else ""
        if line != self._shown:
            self._write(f"{below}\r\x1b[K{dimmed(self._console, line)}")
        self._shown = line

    def hide(self) -> None:
        """Erase the line, and go back to where the text ends."""
        if not self._shown:
            return
        self._shown = ""
        # Behind a full last column the text goes on in the line that was just erased.
        inside = self._text is not None and 0 < self._column < self._text.width
        self._write("\r\x1b[K" + (f"\x1b[A\x1b[{self._column}C" if inside else ""))

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


@contextmanager
def beneath_output(out: Console, err: Console, waiting: Waiting) -> Iterator[Callable[[str], None]]:
    """Within, a thread shows on `err` what `waiting` says, beneath what is written to `out`. Yields
    the function to write with, from one thread."""
    line = Beneath(err, out if out.is_terminal else None)
    lock, done = threading.Lock(), threading.Event()

    def write(text: str) -> None:
        with lock:
            waiting.arrived()
            line.hide()
            out.file.write(text)
            out.file.flush()
            line.passed(text)

    def tick() -> None:
        while not done.wait(TICK_S):
            with lock:
                line.show(waiting.line(err.width - 1))

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield write
    finally:
        done.set()
        thread.join()
        line.hide()
