"""Where the user's messages come from: an input line with history, or plain lines of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .saved import private_folder

if TYPE_CHECKING:
    from prompt_toolkit.history import History

PROMPT, CONTINUED = ">>> ", "... "
FENCE = '"""'


@dataclass(frozen=True, slots=True)
class Entry:
    """What the user entered; `literal` text is never a command."""

    text: str
    literal: bool = False


class LineInput:
    """Reads entries: one line each, or several between two `\"\"\"`.

    `read_line` takes the prompt to show and raises EOFError at the end.
    """

    def __init__(self, read_line: Callable[[str], str]) -> None:
        self._read_line = read_line

    def read(self) -> Entry:
        """The next entry. EOFError at the end of input; KeyboardInterrupt drops what was begun."""
        line = self._read_line(PROMPT)
        begin = line.lstrip()
        if not begin.startswith(FENCE):
            return Entry(line.strip())
        return Entry(self._block(begin.removeprefix(FENCE)), literal=True)

    def _block(self, line: str) -> str:
        lines = []
        while not line.rstrip().endswith(FENCE):
            lines.append(line)
            try:
                line = self._read_line(CONTINUED)
            except EOFError:
                return "\n".join(lines).strip("\n")  # what is there is the message
        lines.append(line.rstrip().removesuffix(FENCE))
        return "\n".join(lines).strip("\n")


def open_input(history: Path, commands: Iterable[str], report: Callable[[str], None]) -> LineInput:
    """The input line of prompt_toolkit on a capable terminal, else plain lines of stdin.

    `report` is told when `history`, the file of what was entered, cannot be read or written.
    """
    if not sys.stdin.isatty():
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
        return LineInput(partial(_read_plain, sys.stdin, None))
    if not sys.stdout.isatty() or os.environ.get("TERM", "") in ("dumb", "unknown", ""):
        return LineInput(partial(_read_plain, sys.stdin, sys.stderr))
    return LineInput(_prompt_session(history, commands, report))


def _read_plain(stream: TextIO, echo: TextIO | None, prompt: str) -> str:
    """One line of `stream`; a terminal without line editing gets the prompt through `echo`."""
    if echo is not None:
        echo.write(prompt)
        echo.flush()
    line = ""
    try:
        line = stream.readline()
    finally:
        if not line and echo is not None:
            echo.write("\n")  # the prompt's line ends here, whether by Ctrl-C or Ctrl-D
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def _prompt_session(
    path: Path, commands: Iterable[str], report: Callable[[str], None]
) -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    history, failures = _open_history(path)
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=WordCompleter(sorted(commands), sentence=True),
        complete_while_typing=False,
        reserve_space_for_menu=4,
        enable_open_in_editor=True,
    )

    def read(prompt: str) -> str:
        if failures:
            reason = failures[0].strerror or failures[0]
            report(f"what is entered is not being saved in {path}: {reason}")
            failures.clear()
        return session.prompt(prompt)

    return read


def _open_history(path: Path) -> tuple[History, list[OSError]]:
    """The history of a file, and the list to which its first failure is added. Afterwards what is
    entered is remembered until the end."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    failures: list[OSError] = []

    class Forgiving(FileHistory):
        may_write = True

        def store_string(self, string: str) -> None:
            try:
                if self.may_write:
                    super().store_string(string)
            except OSError as error:  # raised here, it would end in the middle of a key press
                self.may_write = False
                failures.append(error)

    try:
        private_folder(path.parent)
        path.touch(mode=0o600)
        path.open("rb").close()
    except OSError as error:
        failures.append(error)
        return InMemoryHistory(), failures
    return Forgiving(str(path)), failures
