"""What the terminal shows: replies, footers, progress, tables, notices. Knows no model.

Replies and tables go to standard output, everything else to standard error. rich is imported when
something is shown, so that importing this module costs nothing.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import IO, TYPE_CHECKING, Protocol, TextIO

from ..device import format_size
from ..progress import Download, Report, of_download
from .text import clean, join_within, one_line
from .waiting import Waiting, Watch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_LINE_EVERY_S = 5.0
_WIDE = 10_000
_REASONS = {
    "length": "stopped at the token limit",
    "context": "the context is full",
    "interrupted": "interrupted",
}


class ReplyStats(Protocol):
    """The figures of a reply that the footer shows."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    passes: int
    drafted: int
    accepted: int
    ttft_s: float
    bytes_read: int
    gpu_bytes: int
    peak_rss_mb: float
    stop_reason: str

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens read per second."""

    @property
    def decode_tps(self) -> float:
        """Tokens written per second."""

    @property
    def read_bps(self) -> float:
        """Bytes streamed per second."""


class Reply(Protocol):
    """A reply being shown."""

    def write(self, text: str) -> None:
        """Takes the next piece of it."""

    def tick(self) -> None:
        """Is called now and then while there is nothing to write."""

    def close(self) -> None:
        """Shows what is left; nothing may follow."""


def footer_parts(stats: ReplyStats) -> list[str]:
    """The footer under a reply, as the phrases that " · " joins."""
    parts = [_count(stats.completion_tokens, "token")]
    if stats.decode_tps:
        parts.append(f"{_number(stats.decode_tps)} tok/s")
    if stats.drafted:
        parts.append(f"{stats.passes} passes, {stats.accepted} of {stats.drafted} guesses right")
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts.append(f"prompt {_count(stats.prompt_tokens, 'token')}{cached}")
    if stats.prefill_tps:
        parts.append(f"{_number(stats.prefill_tps)} tok/s")
    if stats.ttft_s:
        parts.append(f"first token {stats.ttft_s:.2f} s")
    if stats.bytes_read:
        streamed, rate = format_size(stats.bytes_read), format_size(stats.read_bps)
        parts.append(f"streamed {streamed} at {rate}/s")
    if stats.gpu_bytes:
        parts.append(f"{format_size(stats.gpu_bytes)} of weights on the GPU")
    parts.append(f"peak {_megabytes(stats.peak_rss_mb)}")
    if stats.stop_reason in _REASONS:
        parts.append(_REASONS[stats.stop_reason])
    return parts


class Terminal:
    """Standard output and standard error as one place to show things.

    `plain` True shows replies as unrendered text, False renders their Markdown always, None
    renders on a terminal that can move its cursor. `out` and `err` are for tests.
    """

    def __init__(
        self,
        *,
        plain: bool | None = None,
        out: Console | None = None,
        err: Console | None = None,
    ) -> None:
        self._plain = plain
        if out is not None:
            self.out = out
        if err is not None:
            self.err = err

    @cached_property
    def out(self) -> Console:
        """Standard output."""
        return _console(sys.stdout)

    @cached_property
    def err(self) -> Console:
        """Standard error."""
        return _console(sys.stderr)

    def notice(self, *parts: str) -> None:
        """Says something beside the conversation, joined with " · " and wrapped between parts."""
        width = self.err.width if self.err.is_terminal else sys.maxsize
        for line in join_within([one_line(part) for part in parts], width):
            self.aside(line)

    def aside(self, text: str) -> None:
        """Shows text as it is on standard error, without escape sequences."""
        self.err.print(clean(text), style="dim", markup=False, emoji=False, soft_wrap=True)

    def error(self, message: object) -> None:
        """Shows an error on one line."""
        from rich.text import Text

        text = Text.assemble(("error: ", "bold red"), one_line(str(message)))
        self.err.print(text, soft_wrap=True)

    def text(self, text: str) -> None:
        """Shows text as it is on standard output, without escape sequences."""
        self.out.print(clean(text), markup=False, emoji=False, soft_wrap=True)

    def table(self, rows: Sequence[Sequence[str]], columns: Sequence[str] = ()) -> None:
        """Shows rows of cells, under column titles if there are any."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(columns), pad_edge=False)
        for i in range(max(map(len, [columns, *rows]), default=0)):
            title = columns[i] if i < len(columns) else ""
            table.add_column(title, overflow="fold", header_style="bold")
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        console = self.out if self.out.is_terminal else _unbounded()
        with console.capture() as capture:
            console.print(table)
        lines = capture.get().splitlines()
        self.out.file.write("".join(f"{line.rstrip(' ')}\n" for line in lines))
        self.out.file.flush()

    def footer(self, stats: ReplyStats) -> None:
        """Shows the figures of a reply, and on a terminal a blank line before the next prompt."""
        self.notice(*footer_parts(stats))
        if self.err.is_terminal:
            self.err.print()

    def reply(self, watch: Watch | None = None) -> Reply:
        """A new reply to write to. `watch` tells what is waited for while a token takes long, which
        is shown where the reply is drawn anew all the time."""
        from .markdown import MarkdownReply, PlainReply

        live = self.out.is_terminal and not self.out.is_dumb_terminal
        if self._plain or (self._plain is None and not live):
            return PlainReply(self.out)
        live = live and not self.out.legacy_windows
        waiting = Waiting(watch) if live and watch is not None else None
        return MarkdownReply(self.out, live=live, waiting=waiting)

    @contextmanager
    def streamed(self, watch: Watch) -> Iterator[Callable[[str], None]]:
        """Within, text goes to standard output as it comes, and what is waited for to standard
        error, when that is a terminal. Yields the function to write with."""
        if not self.err.is_terminal or self.err.is_dumb_terminal or self.err.legacy_windows:
            yield partial(_write, self.out.file)
            return
        from .beneath import beneath_output

        with beneath_output(self.out, self.err, Waiting(watch)) as write:
            yield write

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Within, shows what is being done: a bar on a terminal that goes away at the end, else a
        line now and then. Yields the function to report with."""
        if not self.err.is_terminal or self.err.is_dumb_terminal:
            yield _line_report(self.err)
            return
        bar = _bar(self.err)
        task = bar.add_task("", visible=False)

        def report(text: str, fraction: float | None) -> None:
            total = None if fraction is None else 1.0
            done = fraction or 0.0
            bar.update(task, description=one_line(text), completed=done, total=total, visible=True)

        with bar:
            yield report


@contextmanager
def progress() -> Iterator[Report]:
    """`Terminal.progress` on standard error."""
    with Terminal().progress() as report:
        yield report


@contextmanager
def download_progress() -> Iterator[Callable[[Download], None]]:
    """`progress` for a download: yields the callback that the hub reports to."""
    with progress() as report:
        yield of_download(report)


def _write(file: IO[str], text: str) -> None:
    file.write(text)
    file.flush()


def _console(stream: TextIO) -> Console:
    from rich.console import Console, ConsoleDimensions

    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead
    console = Console(file=stream, highlight=False)
    if console.is_dumb_terminal:  # rich assumes 80 columns there
        console.size = ConsoleDimensions(*shutil.get_terminal_size())
    return console


def _unbounded() -> Console:
    """A console for files and pipes, where a table is as wide as it needs to be."""
    from rich.console import Console

    return Console(width=_WIDE, color_system=None, force_terminal=False)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import TaskProgressColumn as Percentage

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Percentage(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else rich would take a file's lines to itself
    )


def _line_report(console: Console, clock: Callable[[], float] = time.monotonic) -> Report:
    """Prints a line when another kind of work begins (its first word), else every few seconds."""
    last_word, last_time = "", 0.0

    def report(text: str, fraction: float | None) -> None:
        nonlocal last_word, last_time
        word, now = text.partition(" ")[0], clock()
        if word == last_word and now - last_time < _LINE_EVERY_S:
            return
        last_word, last_time = word, now
        percent = "" if fraction is None else f" {fraction:.0%}"
        console.print(one_line(text) + percent, markup=False, emoji=False, soft_wrap=True)

    return report


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(value: float) -> str:
    """Three digits or so: 0.42, 35.1, 410."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _megabytes(value: float) -> str:
    return f"{value:.0f} MB" if value < 1000 else f"{value / 1000:.2f} GB"
