"""The line beneath a reply while its next token takes long: what it says, where it stands."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest
from rich.console import Console
from test_ui import Screen, console, plain, written

from onnxstream_nb import ui
from onnxstream_nb.generation import Stats
from onnxstream_nb.progress import Reading, ReplyProgress
from onnxstream_nb.ui.beneath import Beneath, beneath_output
from onnxstream_nb.ui.markdown import MarkdownReply
from onnxstream_nb.ui.waiting import Waiting, duration, fit, share

WEIGHT = "blk.12.ffn_up.weight"
GB = 10**9


class Reply:
    """A reply whose progress a test sets, with a clock that it moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.progress = ReplyProgress(None, 0, 50, None)
        self.waiting = Waiting(lambda: self.progress, clock=lambda: self.now)

    def at(
        self, seconds: float, reading: Reading | None, written: int, token_s: float | None = None
    ) -> str:
        """What is said `seconds` after the last token."""
        self.progress = ReplyProgress(reading, written, 50, token_s)
        self.now = 100.0 + seconds
        return self.waiting.line(200)


def token(bytes_read: float, pass_read: float = 0.0, of: float = 2.1 * GB) -> Reading:
    return Reading(WEIGHT, int(bytes_read), int(pass_read), int(of), 40, 41, 1)


def test_a_token_that_takes_long() -> None:
    reply = Reply()
    assert reply.at(0.0, token(7 * GB), 3, 1.3) == ""
    assert reply.at(0.99, token(8 * GB), 3, 1.3) == ""
    assert reply.at(1.0, token(8.42 * GB, 0.9 * GB), 3, 1.3) == (
        f"⠋ reading {WEIGHT} · 1.42 GB/s · 0.9 of 2.1 GB · at most 1:04 left"
    )
    assert reply.at(1.15, None, 3, 1.3).startswith(f"⠙ reading {WEIGHT} · 1.23 GB/s · ")
    reply.waiting.arrived()
    assert reply.at(1.5, token(8.5 * GB), 4, 1.3) == ""


def test_the_time_left_is_told_from_the_disk_before_there_is_a_mean() -> None:
    reply = Reply()
    reply.at(0.0, token(0), 1)
    assert reply.at(1.0, token(0.5 * GB), 1).endswith("· at most 3:29 left")  # 50 * 4.2 s - 1 s
    assert "left" not in Reply().at(1.0, token(0), 1)


def test_weights_that_stay_in_memory_are_not_read() -> None:
    at = Reading("", 0, 0, 0, 40, 41, 1)
    assert Reply().at(2.0, at, 3, 2.5) == "⠋ token 4 · at most 2:03 left"
    assert Reply().at(2.0, None, 3, 2.5) == "⠋ token 4"
    assert Reply().at(2.0, None, 0) == "⠋ reading the prompt"


def prompt(tokens: int, bytes_read: float = 0.0, pass_read: float = 0.0) -> Reading:
    return Reading(WEIGHT, int(bytes_read), int(pass_read), 2 * GB, tokens, 512, 128)


def test_a_prompt_that_takes_long() -> None:
    reply = Reply()
    assert reply.at(0.0, prompt(0), 0) == ""
    assert reply.at(2.0, prompt(0), 0) == (
        f"⠋ prompt 0 of 512 tokens · {WEIGHT} · 0 B/s · 0.0 of 2.0 GB"
    )
    line = reply.at(9.0, prompt(128, 3 * GB, GB), 0)  # 192 tokens in 9 s
    assert line == (f"⠋ prompt 128 of 512 tokens · {WEIGHT} · 333 MB/s · 1.0 of 2.0 GB · 0:15 left")


def test_a_prompt_that_was_known_in_part_is_timed_by_what_is_new() -> None:
    reply = Reply()
    reply.at(0.0, prompt(256), 0)
    assert reply.at(10.0, prompt(384), 0).endswith(" · 0:10 left")


def test_a_conversation_that_is_read_again_in_the_middle_of_a_reply() -> None:
    reply = Reply()
    reply.at(0.0, prompt(0), 7, 0.5)
    line = reply.at(4.0, prompt(128), 7, 0.5)
    assert line.startswith("⠋ prompt 128 of 512 tokens · ")
    assert line.endswith("GB · 0:12 left")


def test_a_disk_that_gives_nothing_yet() -> None:
    at = Reading("", 0, 0, GB, 0, 1, 1)
    assert Reply().at(1.0, at, 1).startswith("⠋ waiting for the disk · 0 B/s · ")


def test_names_of_weights_hold_no_escapes() -> None:
    at = Reading("w\x1b[2J\n x", 0, 0, GB, 0, 1, 1)
    assert Reply().at(1.0, at, 1).startswith("⠋ reading w[2J x · ")


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (80, "reading blk.0.w · 1.42 GB/s · 0.9 of 2.1 GB · at most 1:05 left"),
        (62, "reading blk.0.w · 1.42 GB/s · at most 1:05 left"),
        (46, "reading blk.0.w · at most 1:05 left"),
        (20, "at most 1:05 left"),
        (3, "at most 1:05 left"),
    ],
)
def test_what_matters_least_goes_first_where_it_is_narrow(width: int, line: str) -> None:
    parts = {
        "what": "reading blk.0.w", "rate": "1.42 GB/s", "amount": "0.9 of 2.1 GB",
        "left": "at most 1:05 left",
    }  # fmt: skip
    assert fit(parts, width) == line


@pytest.mark.parametrize("width", range(12))
def test_a_line_is_never_wider_than_asked(width: int) -> None:
    reply = Reply()
    reply.at(2.0, token(GB, GB), 3, 1.3)
    assert len(reply.waiting.line(width)) <= width


def test_share_and_duration() -> None:
    assert share(900_000_000, 2_100_000_000) == "0.9 of 2.1 GB"
    assert share(5_000_000, 270_400_000) == "5 of 270 MB"
    assert share(0, 14_500) == "0.0 of 14.5 kB"
    assert share(3, 17) == "3 of 17 B"
    assert [duration(s) for s in (0.4, 5, 65, 3599.6, 7209, 360_000)] == [
        "0:00", "0:05", "1:05", "1:00:00", "2:00:09", "100:00:00",
    ]  # fmt: skip


# Beneath Markdown


def test_the_line_stands_beneath_the_reply_and_goes_with_the_next_text() -> None:
    reply, to = Reply(), console(80)
    shown = MarkdownReply(to, live=True, waiting=reply.waiting, clock=lambda: reply.now)
    reply.at(0.0, token(0), 1, 2.0)
    shown.write("The sky")
    reply.now = 101.5
    reply.progress = ReplyProgress(token(3 * GB, 1 * GB), 1, 50, 2.0)
    shown.tick()
    line = f"⠴ reading {WEIGHT} · 2.00 GB/s · 1.0 of 2.1 GB · at most 1:38 left"
    assert written(to) == f"The sky\n\x1b[2m{line}\x1b[0m\n"
    reply.now = 101.7
    shown.write(" is")
    shown.close()
    assert written(to).endswith("\x1b[0m\n\r\x1b[2A\x1b[JThe sky is\n")
    assert Screen(80).feed(plain(written(to))).lines == ["The sky is", ""]


def test_a_reply_that_fills_the_screen_leaves_room_for_the_line() -> None:
    reply, to = Reply(), console(80, height=5)
    shown = MarkdownReply(to, live=True, waiting=reply.waiting, clock=lambda: reply.now)
    shown.write("\n".join(f"line {i}" for i in range(9)))
    reply.at(2.0, token(0), 1)
    shown.tick()
    lines = Screen(80).feed(plain(written(to))).lines
    assert lines[:3] == ["line 6", "line 7", "line 8"]
    assert lines[3].startswith("⠋ reading blk.12") and lines[4:] == [""]


@pytest.mark.parametrize("kind", ["pipe", "dumb", "no watch"])
def test_nothing_is_said_where_nothing_can_be_drawn_anew(kind: str) -> None:
    out = Console(
        file=io.StringIO(), force_terminal=kind != "pipe", _environ={"TERM": kind}, width=80
    )
    reply = Reply()
    reply.at(9.0, token(0), 1)
    watch = None if kind == "no watch" else lambda: reply.progress
    shown = ui.Terminal(out=out, err=out).reply(watch)
    shown.write("text")
    shown.tick()
    shown.close()
    assert "reading" not in written(out) and "text" in written(out)


# Beneath plain text


class Cursor:
    """A terminal as far as `Beneath` uses one: rows of cells, wrapping only when more comes."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.row, self.column = width, [""], 0, 0

    def feed(self, text: str) -> Cursor:
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", re.sub(r"\x1b\[\d*m", "", text)):
            if part == "\n":
                self._down()
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[K":
                self.rows[self.row] = self.rows[self.row][: self.column]
            elif part == "\x1b[A":
                self.row, self.column = self.row - 1, min(self.column, self.width - 1)
                assert self.row >= 0
            elif part.endswith("C"):
                self.column = min(self.width - 1, self.column + int(part[2:-1]))
            elif part == "\t":
                self.column = max(self.column, min(self.width - 1, self.column // 8 * 8 + 8))
            else:
                self._put(part)
        return self

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.rows += [""] * (self.row + 1 - len(self.rows))

    def _put(self, character: str) -> None:
        if self.column == self.width:
            self._down()
        row = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = row[: self.column] + character + row[self.column + 1 :]
        self.column += 1


TEXTS = ["ab", "c" * 7, "d" * 10, "\n", "e\n", "f" * 25, "\tg", "h\n\ni", "", "0123456789" * 2]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_the_text_is_the_same_as_without_the_line(step: int) -> None:
    """Whatever has been written: nothing, a full row, several, a tab."""
    to = Console(file=io.StringIO(), width=10, force_terminal=True, color_system="truecolor")
    line = Beneath(to, to)
    texts = (TEXTS * step)[::step]
    for text in texts:
        line.show("⠋ reading")
        line.show("⠙ reading")
        shown = Cursor(10).feed(written(to))
        assert shown.rows[-1] == "⠙ reading"
        line.hide()
        line.hide()
        to.file.write(text)
        line.passed(text)
    without = Cursor(10).feed("".join(texts))
    with_line = Cursor(10).feed(written(to))
    assert [row.rstrip() for row in with_line.rows if row] == [
        r.rstrip() for r in without.rows if r
    ]
    assert (with_line.row, with_line.column) == (without.row, without.column)


def test_wide_characters_take_two_columns() -> None:
    to = console(10)
    line = Beneath(to, to)
    line.passed("漢字")
    line.show("x")
    line.hide()
    assert written(to) == "\n\r\x1b[K\x1b[2mx\x1b[0m\r\x1b[K\x1b[A\x1b[4C"


def test_text_that_goes_elsewhere_moves_no_cursor() -> None:
    to = console(10)
    line = Beneath(to, None)
    line.passed("some text")
    line.show("x")
    line.show("x")
    line.show("")
    assert written(to) == "\r\x1b[K\x1b[2mx\x1b[0m\r\x1b[K"


def test_a_thread_shows_it_while_the_writer_waits() -> None:
    out, err = console(60), console(60)
    began = time.monotonic()
    watch = ReplyProgress(token(0), 1, 50, 2.0)
    waiting = Waiting(lambda: watch, clock=lambda: 100 * (time.monotonic() - began))
    before = threading.active_count()
    with beneath_output(out, err, waiting) as write:
        write("The sky")
        end = time.monotonic() + 10
        while "reading" not in written(err) and time.monotonic() < end:
            time.sleep(0.01)
        write(" is blue")
    assert threading.active_count() == before
    assert written(out) == "The sky is blue"
    assert f"reading {WEIGHT} · " in written(err)
    assert re.search(r"\x1b\[A\x1b\[(7|15)C$", written(err))  # behind what was written


def test_streamed_text_to_a_pipe_is_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    with ui.Terminal().streamed(lambda: ReplyProgress(token(0), 1, 50, 2.0)) as write:
        write("a\x1bb")
        write("c")
    assert capsys.readouterr() == ("a\x1bbc", "")


# The footer


def test_the_footer_says_what_was_streamed() -> None:
    stats = Stats(
        prompt_tokens=5, completion_tokens=3, prefill_s=2.5, decode_s=5.0, peak_rss_mb=190,
        bytes_read=14_200_000_000,
    )  # fmt: skip
    assert ui.footer_parts(stats)[-2:] == ["streamed 14.2 GB at 1.89 GB/s", "peak 190 MB"]
    stats.bytes_read = 0
    assert not any("streamed" in part for part in ui.footer_parts(stats))
