"""A streamed reply as rendered Markdown. Finished blocks are printed once; the last one is live.

Imports rich at once: import this module only when a terminal is about to be written to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import box, markdown
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .text import clean
from .waiting import SPINNER, Waiting

SHORTEST_FRAME_S = 0.08
WAIT_BEFORE_SPINNER_S = 0.3
NARROWEST_TEXT = 8


def _parser() -> MarkdownIt:
    """CommonMark with tables, without what would swallow text: HTML, images, references."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    return parser.disable(["image", "reference"])


class _CodeBlock(markdown.CodeBlock):
    """Code without a background or padding, so that it can be copied from the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default"
        )


class _Heading(markdown.Heading):
    """A heading at the left edge."""

    LEVEL_ALIGN = {}


class _Table(markdown.TableElement):
    """A table whose cells wrap, also within words, instead of being cut off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=box.SIMPLE, pad_edge=False, style="markdown.table.border")
        for cell in self.header.row.cells if self.header and self.header.row else ():
            table.add_column(cell.content, header_style="bold", overflow="fold")
        for row in self.body.rows if self.body else ():
            table.add_row(*(cell.content for cell in row.cells))
        yield table


class _ListItem(markdown.ListItem):
    """A list item whose number keeps its dot, and which is there even when it is empty."""

    def render_number(
        self, console: Console, options: ConsoleOptions, number: int, last_number: int
    ) -> RenderResult:
        yield from self._render(console, options, f"{number}. ".rjust(len(str(last_number)) + 3))

    def render_bullet(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._render(console, options, " • ")

    def _render(self, console: Console, options: ConsoleOptions, marker: str) -> RenderResult:
        inner = options.update(width=max(1, options.max_width - len(marker)))
        style = console.get_style("markdown.item.number")
        for i, line in enumerate(console.render_lines(self.elements, inner) or [[]]):
            yield Segment(marker if i == 0 else " " * len(marker), style)
            yield from line
            yield Segment("\n")


class _Markdown(markdown.Markdown):
    """Rich's Markdown with our parser and elements."""

    elements = markdown.Markdown.elements | {
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
        "table_open": _Table,
        "list_item_open": _ListItem,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _parser().parse(source)
        _keep_line_breaks(self.parsed)


def _keep_line_breaks(tokens: Sequence[Token]) -> None:
    """Makes single line breaks visible: models write verse and addresses with them."""
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"


def split_blocks(source: str) -> list[str]:
    """The top-level Markdown blocks of `source`, in order, without the blank lines between."""
    lines = source.split("\n")
    bounds = [0, *_starts(source)[1:], len(lines)]
    blocks = ("\n".join(lines[a:b]).rstrip() for a, b in pairwise(bounds))
    return [block for block in blocks if block]


def _starts(source: str) -> list[int]:
    """The first line of each top-level block."""
    return [t.map[0] for t in _parser().parse(source) if t.level == 0 and t.map]


def finished_prefix(source: str) -> int:
    """How many characters of `source` hold blocks that no further text can change.

    Only whole lines decide: "1. a\\n\\n2" looks like a list and a paragraph until ". b" follows.
    """
    whole = source.rfind("\n") + 1
    starts = _starts(source[:whole])
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in source.split("\n")[: starts[-1]])


def render_block(console: Console, block: str) -> list[str]:
    """One block as terminal lines with their escape sequences, no blank line before or after."""
    rendered = _Markdown(block)
    with console.capture() as capture:
        if _indent(rendered.parsed) + NARROWEST_TEXT > console.width:
            console.print(Text(block))
        else:
            console.print(rendered)
    lines = [line.rstrip(" ") for line in capture.get().split("\n")]
    shown = [i for i, line in enumerate(lines) if Text.from_ansi(line).plain.strip()]
    return lines[shown[0] : shown[-1] + 1] if shown else []


def _indent(tokens: Sequence[Token]) -> int:
    """Columns that nested quotes and lists take from the text, at most."""
    depth = accumulate(t.nesting for t in tokens if t.type.startswith(("blockquote_", "list_item")))
    return 6 * max(depth, default=0)


def render_blocks(console: Console, source: str) -> list[str]:
    """A whole reply as terminal lines: its blocks with one blank line between."""
    lines: list[str] = []
    for block in split_blocks(source):
        rendered = render_block(console, block)
        lines += [""] * bool(lines and rendered) + rendered
    return lines


def dimmed(console: Console, line: str) -> str:
    """One line of plain text as it is shown beside a reply, cut to the console's width."""
    text = Text(line, style="dim", no_wrap=True)
    text.truncate(console.width)
    with console.capture() as capture:
        console.print(text, end="")
    return capture.get()


class MarkdownReply:
    """Renders a reply while it is written. Call `write` with text, `tick` now and then, `close`.

    With `live`, the unfinished block is redrawn in place, at most its last lines that fit the
    screen, and beneath it what `waiting` says; without, only finished blocks are printed and no
    cursor is moved.
    """

    def __init__(
        self,
        console: Console,
        *,
        live: bool,
        waiting: Waiting | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._live, self._clock = console, live, clock
        self._waiting = waiting
        self._source = ""
        self._shown: list[str] = []
        self._width = console.width
        self._printed_any = False
        self._started = clock()
        self._next_frame = self._started

    def write(self, text: str) -> None:
        """Takes the next piece of the reply, of any length."""
        self._source += clean(text)
        if self._waiting is not None:
            self._waiting.arrived()
        self.tick()

    def tick(self) -> None:
        """Redraws if the last frame is old enough; drawing takes at most a fifth of the time."""
        now = self._clock()
        if now < self._next_frame:
            return
        self._draw()
        self._next_frame = now + max(SHORTEST_FRAME_S, 4 * (self._clock() - now))

    def close(self) -> None:
        """Prints what is still unfinished and leaves the cursor at the beginning of a line."""
        self._put(self._finish(len(self._source)), [])

    def _draw(self) -> None:
        finished = self._finish(finished_prefix(self._source))
        if not self._live:
            return self._put(finished, [])
        tail = self._separated(render_blocks(self._console, self._source))
        beneath = self._beneath(is_empty=not tail)
        room = max(1, self._console.height - 1 - len(beneath))
        self._put(finished, tail[-room:] + beneath)

    def _finish(self, length: int) -> list[str]:
        lines = self._separated(render_blocks(self._console, self._source[:length]))
        self._source = self._source[length:]
        self._printed_any |= bool(lines)
        return lines

    def _separated(self, lines: list[str]) -> list[str]:
        return ["", *lines] if lines and self._printed_any else lines

    def _beneath(self, is_empty: bool) -> list[str]:
        """What is said of a wait: a spinner before the first text, more when it takes long."""
        line = self._waiting.line(self._console.width) if self._waiting is not None else ""
        if line:
            return [dimmed(self._console, line)]
        waited = self._clock() - self._started
        if not is_empty or self._printed_any or waited < WAIT_BEFORE_SPINNER_S:
            return []
        line = f"{SPINNER[int(waited * 10) % len(SPINNER)]} reading the prompt"
        return [line[: self._console.width]]

    def _put(self, finished: list[str], live: list[str]) -> None:
        """Replaces the live lines on the screen by `finished` lines, which stay, and new ones."""
        lines = finished + live
        same = next(
            (i for i, (a, b) in enumerate(zip(self._shown, lines, strict=False)) if a != b),
            min(len(self._shown), len(lines)),
        )
        if self._console.width != self._width:
            same = 0  # the terminal has wrapped our lines anew
        up = self._rows(self._shown[same:])
        self._width, self._shown = self._console.width, live
        text = (f"\r\x1b[{up}A\x1b[J" if up else "") + "".join(f"{x}\n" for x in lines[same:])
        if text:
            self._console.file.write(text)
            self._console.file.flush()

    def _rows(self, lines: list[str]) -> int:
        width = max(1, self._console.width)
        cells = (cell_len(Text.from_ansi(line).plain) for line in lines)
        return sum(max(1, -(-count // width)) for count in cells)


class PlainReply:
    """Writes a reply as it comes, as plain text: for pipes, files and dumb terminals."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._last = "\n"

    def write(self, text: str) -> None:
        """Takes the next piece of the reply, of any length."""
        if shown := clean(text):
            self._file.write(shown)
            self._file.flush()
            self._last = shown[-1]

    def tick(self) -> None:
        """Does nothing: there is nothing to redraw."""

    def close(self) -> None:
        """Ends the last line if the reply did not."""
        if self._last != "\n":
            self._file.write("\n")
            self._file.flush()
