"""The terminal's exact output: streamed Markdown, footers, notices, tables, progress."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
from fake_llm import POEM
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from onnxstream_nb import ui
from onnxstream_nb.generation import Stats
from onnxstream_nb.ui.markdown import (
    MarkdownReply,
    PlainReply,
    finished_prefix,
    render_block,
    render_blocks,
    split_blocks,
)
from onnxstream_nb.ui.text import clean, join_within, one_line

ANSI = re.compile(r"\x1b\[[0-9;]*m")
pieces_of = st.lists(
    st.sampled_from([
        "word", " ", "\n", "\n\n", "- ", "1. ", "2", ". b", "# ", "```", "```py\n", "~~~", "> ",
        "**", "*", "_", "`", "|", "\n|-|-|\n", "| a ", "---", "===", "    ", "\t", "<b>",
        "</b>", "<!--", "[a]", "(u)", "[a]: /u", "![i](x)", "\\", "&amp;", "ß", "漢字", "🙂",
        "\x1b[31m", "\r\n", "~~",
    ]),
    max_size=40,
)  # fmt: skip


def console(width: int = 40, height: int = 10, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=terminal,
        color_system="truecolor" if terminal else None, legacy_windows=False, highlight=False,
        _environ={},
    )  # fmt: skip


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


class Screen:
    """A terminal of `width` columns that knows line feeds and the sequences we use."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.row = width, [""], 0

    def feed(self, text: str) -> Screen:
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
            if token == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif token.endswith("A") and token.startswith("\x1b"):
                self.row -= int(token[2:-1])
                assert self.row >= 0
            elif token == "\x1b[J":
                self.lines[self.row :] = [""]
            elif token == "\r" or token.endswith("m") and token.startswith("\x1b"):
                continue
            else:
                assert not token.startswith("\x1b"), repr(token)
                self.lines[self.row] += token
        return self


def stream(text: str, size: int, to: Console, **options: object) -> None:
    """Writes `text` in pieces of `size` characters, with a frame for each."""
    frames = count()
    reply = MarkdownReply(to, live=True, clock=lambda: float(next(frames)), **options)  # type: ignore[arg-type]
    reply._next_frame = float("-inf")
    for start in range(0, len(text), size):
        reply.write(text[start : start + size])
        reply._next_frame = float("-inf")
    reply.close()


def plain(text: str) -> str:
    return ANSI.sub("", text)


def test_poem_is_rendered_exactly() -> None:
    to = console(terminal=False)
    assert render_blocks(to, POEM) == [
        "The sea",
        "",
        "It is wide, and it is deep,",
        "and its waves are never asleep.",
        "",
        " 1. salt",
        " 2. water",
        "",
        " wave    metres",
        " ──────────────",
        " small      0.5",
        " large       12",
        "",
        "def wave(height: float) -> str:",
        '    return "~" * int(height)',
        "",
        "▌ The end.",
    ]


def test_styles_end_within_their_line() -> None:
    assert render_block(console(), "a **b** `c`") == ["a \x1b[1mb\x1b[0m \x1b[1;36;40mc\x1b[0m"]
    assert render_block(console(), "# Title") == ["\x1b[1;4mTitle\x1b[0m"]


def test_no_color_keeps_bold_only() -> None:
    to = Console(
        file=io.StringIO(), width=40, force_terminal=True, color_system="truecolor", no_color=True
    )
    assert render_block(to, "a **b** `c`") == ["a \x1b[1mb\x1b[0m \x1b[1mc\x1b[0m"]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_streamed_output_is_the_static_render(size: int) -> None:
    to = console(height=6)
    stream(POEM, size, to)
    expected = [plain(line) for line in render_blocks(console(), POEM)]
    assert Screen(40).feed(written(to)).lines == [*expected, ""]


@given(pieces=pieces_of, size=st.integers(1, 9), width=st.integers(8, 60))
@settings(max_examples=80, deadline=None)
def test_any_text_streams_to_its_static_render(pieces: list[str], size: int, width: int) -> None:
    text = "".join(pieces)
    to = console(width, height=5)
    stream(text, size, to)
    expected = [plain(line) for line in render_blocks(console(width), clean(text))]
    assert Screen(width).feed(written(to)).lines == [*expected, ""]


@given(pieces=pieces_of)
@settings(max_examples=200, deadline=None)
def test_finished_blocks_never_change(pieces: list[str]) -> None:
    text, done = "", ""
    for piece in pieces:
        text += clean(piece)
        done += text[len(done) :][: finished_prefix(text[len(done) :])]
    assert split_blocks(done) + split_blocks(text[len(done) :]) == split_blocks(text)


@given(pieces=pieces_of)
@settings(max_examples=150, deadline=None)
def test_no_word_is_lost(pieces: list[str]) -> None:
    text = clean("".join(pieces))
    shown = "".join(render_blocks(console(terminal=False), text))
    # An info string names a fence's language and entities become characters; the rest stays.
    fenced = "```" in text or "~~~" in text
    for word in ("word", "漢字", "🙂", "ß"):
        if not fenced:
            assert shown.count(word) >= text.count(word)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("<think>why</think> so", ["<think>why</think> so"]),
        ("<div>\nx\n</div>", ["<div>", "x", "</div>"]),
        ("[site](http://a.b/c)", ["site (http://a.b/c)"]),
        ("![alt](pic.png)", ["!alt (pic.png)"]),
        ("[a]: http://x.y", ["[a]: http://x.y"]),
        ("3. c\n4. d", [" 3. c", " 4. d"]),
        ("- a\n  - b\n\n-", [" • a", "    • b", " •"]),
        ("[bold]not markup[/bold] :smile:", ["[bold]not markup[/bold] :smile:"]),
        ("", []),
        ("\n\n \n", []),
    ],
)
def test_blocks_that_renderers_like_to_swallow(source: str, shown: list[str]) -> None:
    assert render_blocks(console(terminal=False), source) == shown


def test_a_list_is_not_finished_by_what_may_become_its_next_item() -> None:
    assert finished_prefix("1. a\n\n2") == 0
    assert finished_prefix("1. a\n\nnext\n") == len("1. a\n\n")
    assert finished_prefix("```\na\n\nb\n\n") == 0
    assert finished_prefix("a\n\nb") == 0
    assert finished_prefix("a\n\nb\n") == 3


def test_table_cells_wrap_in_a_narrow_terminal() -> None:
    lines = render_blocks(console(12, terminal=False), "|a|b|\n|-|-|\n|abcdefghijkl|mnopqrstuvwx|")
    letters = sorted("".join(lines).replace("─", "").replace(" ", ""))
    assert letters == sorted("ab" + "abcdefghijkl" + "mnopqrstuvwx")
    assert max(map(len, lines)) <= 12


def test_deep_nesting_in_a_narrow_terminal_is_shown() -> None:
    lines = render_blocks(console(10, terminal=False), "> " * 15 + "deep")
    assert lines == ["> > > > >"] * 3 + ["deep"]


def test_only_changed_lines_are_redrawn() -> None:
    to = console()
    reply = MarkdownReply(to, live=True, clock=lambda: 0.0)
    reply.write("one\ntwo")
    reply._next_frame = -1.0
    reply.write(" more")
    reply.close()
    assert written(to) == "one\ntwo\n\r\x1b[1A\x1b[Jtwo more\n"


def test_a_live_block_taller_than_the_screen_shows_its_end() -> None:
    to = console(height=4)
    reply = MarkdownReply(to, live=True, clock=lambda: 0.0)
    reply.write("```\n" + "\n".join(f"line {i}" for i in range(9)))
    assert plain(written(to)) == "line 6\nline 7\nline 8\n"
    reply.close()
    whole = "".join(f"line {i}\n" for i in range(9))
    assert plain(written(to)) == "line 6\nline 7\nline 8\n" + "\r\x1b[3A\x1b[J" + whole


def test_frames_are_rare_while_text_is_fast() -> None:
    now = [0.0]
    to = console()
    reply = MarkdownReply(to, live=True, clock=lambda: now[0])
    for _ in range(100):
        reply.write("x")
        now[0] += 0.001
    reply.close()
    # Frames at 0 and 0.08 s, then the end, which leaves full lines alone.
    wide = "x" * 40
    redraw = "\r\x1b[1A\x1b[J"
    assert written(to) == f"x\n{redraw}{wide}\n{wide}\nx\n{redraw}{'x' * 20}\n"


def test_spinner_while_the_prompt_is_read() -> None:
    now = [0.0]
    to = console()
    reply = MarkdownReply(to, live=True, clock=lambda: now[0])
    reply.tick()
    assert written(to) == ""
    now[0] = 1.0
    reply.tick()
    assert written(to) == "⠋ reading the prompt\n"
    reply.close()
    assert written(to) == "⠋ reading the prompt\n\r\x1b[1A\x1b[J"


def test_rendered_but_not_live_moves_no_cursor() -> None:
    to = console(terminal=False)
    reply = MarkdownReply(to, live=False)
    for character in "# T\n\ntext **bold** here":
        reply.write(character)
    reply.close()
    assert written(to) == "T\n\ntext bold here\n"


def test_plain_reply_is_the_text_without_escapes() -> None:
    to = console(terminal=False)
    reply = PlainReply(to)
    for piece in ("a\x1b[31mb", "\x07\tc\r\n", "", "\x9b2Jd"):
        reply.write(piece)
    reply.close()
    assert written(to) == "a[31mb\tc\n2Jd\n"


def test_clean_keeps_text_and_drops_every_control_character() -> None:
    everything = "".join(map(chr, range(0x250)))
    kept = clean(everything)
    assert set(everything) - set(kept) == {
        chr(c) for c in [*range(9), *range(11, 32), *range(127, 160)]
    }
    assert one_line("a\n b\t\x1bc ") == "a b c"


STATS = Stats(
    prompt_tokens=37, cached_tokens=12, completion_tokens=42, prefill_s=25 / 410,
    decode_s=41 / 35.1, ttft_s=0.21, peak_rss_mb=310.4, stop_reason="eos",
)  # fmt: skip


def terminal(width: int = 120, is_terminal: bool = False) -> tuple[ui.Terminal, Console, Console]:
    out, err = console(width, terminal=is_terminal), console(width, terminal=is_terminal)
    return ui.Terminal(out=out, err=err), out, err


def test_footer() -> None:
    screen, out, err = terminal()
    screen.footer(STATS)
    assert written(out) == ""
    assert written(err) == (
        "42 tokens · 35.1 tok/s · prompt 37 tokens (12 cached) · 410 tok/s · "
        "first token 0.21 s · peak 310 MB\n"
    )


def test_footer_of_a_cut_reply_of_one_token() -> None:
    stats = Stats(prompt_tokens=5, completion_tokens=1, prefill_s=10, peak_rss_mb=2345)
    stats.stop_reason = "interrupted"
    assert ui.footer_parts(stats) == [
        "1 token", "prompt 5 tokens", "0.50 tok/s", "peak 2.35 GB", "interrupted",
    ]  # fmt: skip


def test_footer_of_a_reply_with_guesses() -> None:
    stats = replace(STATS, passes=12, drafted=40, accepted=29)
    assert ui.footer_parts(stats)[1:4] == [
        "35.1 tok/s", "12 passes, 29 of 40 guesses right", "prompt 37 tokens (12 cached)",
    ]  # fmt: skip
    assert ui.footer_parts(replace(stats, drafted=0, accepted=0)) == ui.footer_parts(STATS)


def test_footer_wraps_between_its_parts_on_a_terminal() -> None:
    screen, _, err = terminal(50, is_terminal=True)
    screen.footer(STATS)
    assert plain(written(err)).split("\n") == [
        "42 tokens · 35.1 tok/s",
        "prompt 37 tokens (12 cached) · 410 tok/s",
        "first token 0.21 s · peak 310 MB",
        "", "",
    ]  # fmt: skip
    assert written(err).startswith("\x1b[2m42 tokens · 35.1 tok/s\x1b[0m\n")


def test_join_within() -> None:
    assert join_within([], 10) == []
    assert join_within(["abcdefghijklmnop", "q"], 10) == ["abcdefghijklmnop", "q"]
    assert join_within(["abc", "def", "g"], 9) == ["abc · def", "g"]


def test_notice_and_error_are_one_line_and_hold_no_escapes() -> None:
    screen, out, err = terminal(20)
    screen.notice("file \x1b[2J[b]odd[/b]\nname " + "x" * 40)
    screen.error("no such\nfile: [red]a.bin[/red]")
    assert written(out) == ""
    assert written(err) == (
        "file [2J[b]odd[/b] name " + "x" * 40 + "\nerror: no such file: [red]a.bin[/red]\n"
    )


def test_error_is_red_on_a_terminal() -> None:
    screen, _, err = terminal(is_terminal=True)
    screen.error("broken")
    assert written(err) == "\x1b[1;31merror: \x1b[0mbroken\n"


def test_table_without_trailing_spaces_and_without_cutting_in_pipes() -> None:
    screen, out, _ = terminal(20)
    screen.table([("a", "x" * 30), ("long\x1b", "y")], ("name", "value"))
    assert written(out) == f"name  value\na     {'x' * 30}\nlong  y\n"


def test_table_wraps_on_a_narrow_terminal() -> None:
    screen, out, _ = terminal(12, is_terminal=True)
    screen.table([("ab", "abcdefghijkl")])
    assert plain(written(out)) == "ab  abcdefgh\n    ijkl\n"


def test_progress_lines_where_there_is_no_terminal() -> None:
    screen, out, err = terminal()
    with screen.progress() as report:
        report("downloading a.bin 1.0 of 2.0 MB", 0.5)
        report("downloading a.bin 2.0 of 2.0 MB", 1.0)
        report("compiling gemv (1/3)", None)
    assert written(out) == ""
    assert written(err) == "downloading a.bin 1.0 of 2.0 MB 50%\ncompiling gemv (1/3)\n"


def test_progress_bar_goes_away_and_shows_names_as_they_are() -> None:
    screen, _, err = terminal(80, is_terminal=True)
    with screen.progress() as report:
        report("compiling gemv_q4_1 (3/12) [b]", 0.25)
    shown = written(err)
    assert "compiling gemv_q4_1 (3/12) [b]" in plain(shown)
    assert "25%" in plain(shown)
    assert shown.endswith("\x1b[2K") or shown.endswith("\x1b[?25h") or "\x1b[2K" in shown[-40:]


def test_download_progress_names_file_number_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    from onnxstream_nb.progress import of_download

    class At:
        file, file_index, file_count, note = "a.bin", 2, 3, ""
        done_bytes, total_bytes = 12_300_000, 98_400_000

    seen: list[tuple[str, float | None]] = []
    of_download(lambda text, fraction: seen.append((text, fraction)))(At())
    assert seen == [("downloading a.bin (2/3) 12.3 of 98.4 MB", 0.125)]
    with ui.download_progress() as on_progress:
        on_progress(At())
    assert capsys.readouterr().err == "downloading a.bin (2/3) 12.3 of 98.4 MB 12%\n"


@pytest.fixture
def replies() -> Iterator[dict[str, type]]:
    yield {"plain": PlainReply, "markdown": MarkdownReply}


@pytest.mark.parametrize(
    ("plain_option", "is_terminal", "term", "kind"),
    [
        (None, True, "xterm", "markdown"), (None, False, "xterm", "plain"),
        (None, True, "dumb", "plain"), (True, True, "xterm", "plain"),
        (False, False, "xterm", "markdown"),
    ],
)  # fmt: skip
def test_kind_of_reply(
    replies: dict[str, type], plain_option: bool | None, is_terminal: bool, term: str, kind: str
) -> None:
    out = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={"TERM": term})
    assert type(ui.Terminal(plain=plain_option, out=out).reply()) is replies[kind]


def test_importing_the_chat_imports_nothing_heavy() -> None:
    heavy = "rich prompt_toolkit numba numpy onnx tokenizers jinja2 markdown_it platformdirs"
    code = (
        "import sys, onnxstream_nb.chat\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
