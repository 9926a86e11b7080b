"""Where the user's messages come from: an input line with history, or plain lines of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

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


def open_input(history: Path, commands: Iterable[str]) -> LineInput:
    """The input line of prompt_toolkit on a capable terminal, else plain lines of stdin."""
    if not sys.stdin.isatty():
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
        return LineInput(partial(_read_plain, sys.stdin, None))
    if not sys.stdout.isatty() or os.environ.get("TERM", "") in ("dumb", "unknown", ""):
        return LineInput(partial(_read_plain, sys.stdin, sys.stderr))
    return LineInput(_prompt_session(history, commands))


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


def _prompt_session(history: Path, commands: Iterable[str]) -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    history.touch(mode=0o600)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)),
        completer=WordCompleter(sorted(commands), sentence=True),
        complete_while_typing=False,
        reserve_space_for_menu=4,
        enable_open_in_editor=True,
    )
    return session.prompt
