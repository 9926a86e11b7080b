"""What the engine's log says on standard error: once, on one line, never inside a reply."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from fake_chat import Talk
from rich.console import Console

from onnxstream_nb.ui import Terminal, held, telling

log = logging.getLogger("onnxstream_nb.somewhere")


def test_each_warning_once_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with telling():
        for _ in range(2):
            log.warning("a GPU\n fell %s\x1b[2J", "off")
        log.info("that is no warning")
        log.error("and this is worse")
    assert capsys.readouterr() == ("", "a GPU fell off[2J\nand this is worse\n")
    assert not logging.getLogger("onnxstream_nb").handlers


def test_a_warning_that_cannot_be_written_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise BrokenPipeError

    tried: list[str] = []
    monkeypatch.setattr(sys, "stderr", Gone())
    with telling():
        log.warning("hello")
    assert tried[0] == "hello"


def test_what_is_held_comes_behind(capsys: pytest.CaptureFixture[str]) -> None:
    with telling():
        with pytest.raises(ValueError), held():
            log.warning("first")
            assert capsys.readouterr().err == ""
            raise ValueError
        assert capsys.readouterr().err == "first\n"
        log.warning("second")
        assert capsys.readouterr().err == "second\n"
    with held():
        pass  # nobody tells anything: a program with a log of its own


def test_a_progress_bar_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line comes above the bar, not into it."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with telling(), Terminal(err=console).progress() as report:
        report("reading weights", 0.5)
        log.warning("--cuda: no NVIDIA driver was found; the CPU is used")
        report("reading weights", 0.6)
    shown = file.getvalue()
    # Behind whatever moves the cursor, the warning is a line of its own.
    lines = [line.rpartition("\x1b[2K")[2] for line in shown.split("\n")]
    assert lines.count("--cuda: no NVIDIA driver was found; the CPU is used") == 1


def test_a_chat_tells_behind_the_reply(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(message: str) -> str:
        log.warning("the GPU fell off the bus; the CPU goes on alone")
        seen.append(capsys.readouterr().err)
        return message.upper()

    seen: list[str] = []
    talk = Talk(answer)
    with telling():
        assert talk.say("hello", "again") == 0
    assert "HELLO" in talk.out and set(seen) <= {"", SAID} and seen[0] == ""
    assert "".join(seen) + capsys.readouterr().err == SAID


SAID = "the GPU fell off the bus; the CPU goes on alone\n"
