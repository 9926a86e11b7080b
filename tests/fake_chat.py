"""A chat with the fake model over given lines, in this process."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from fake_llm import fake_model, shout
from rich.console import Console

from onnxstream_nb.chat.conversation import Conversation
from onnxstream_nb.chat.line_input import LineInput
from onnxstream_nb.chat.loop import Chat
from onnxstream_nb.chat.worker import Worker
from onnxstream_nb.ui import Terminal


class Talk:
    """A chat with the fake model over given lines; what it showed is `out` and `err`."""

    def __init__(self, answer: Callable[[str], str] = shout, **options: Any) -> None:
        self.model = fake_model(answer, **options)
        self.conversation = Conversation(self.model)
        self._out = Console(file=io.StringIO(), width=100, force_terminal=False)
        self._err = Console(file=io.StringIO(), width=100, force_terminal=False)
        self.terminal = Terminal(out=self._out, err=self._err)

    def say(self, *lines: str, interactive: bool = False) -> int:
        worker = Worker()
        source = LineInput(lines_of(*lines))
        chat = Chat(self.conversation, worker, self.terminal, source)
        try:
            return chat.loop(interactive=interactive)
        finally:
            worker.close()

    @property
    def out(self) -> str:
        return taken(self._out)

    @property
    def err(self) -> str:
        return taken(self._err)

    @property
    def said(self) -> list[str]:
        return [message["content"] for message in self.conversation.messages]


def taken(console: Console) -> str:
    """What was written since the last call."""
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    console.file.seek(0)
    console.file.truncate()
    return text


def lines_of(*lines: str) -> Callable[[str], str]:
    """A reader of lines; the line "^C" is Ctrl-C."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return read
