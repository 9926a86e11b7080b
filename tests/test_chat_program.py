"""The chat as a program: in pipes, and at a pseudo-terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal, environment

from onnxstream_nb.chat import saved as saved_chats

FAKE = [sys.executable, str(Path(__file__).parent / "fake_llm.py")]


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ONNXSTREAM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def piped(text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FAKE, *arguments], input=text, capture_output=True, text=True, encoding="utf-8",
        env=environment(), timeout=60, check=False,
    )  # fmt: skip


def test_a_pipe_gets_replies_and_nothing_else() -> None:
    done = piped('hello\n\n"""\ntwo\nlines\n"""\n/show system\nescape\nno line break')
    assert done.returncode == 0
    assert done.stdout == (
        "HELLO\nTWO\nLINES\nno system prompt is set; the template may bring its own\n"
        "red [31mtext]0;title 2J end\nNO LINE BREAK\n"
    )
    assert "compiling gemv_q4_1" in done.stderr
    assert done.stderr.count("tok/s · first token") == 4
    assert "\x1b" not in done.stdout + done.stderr


def test_bytes_that_are_no_text_do_not_end_the_chat() -> None:
    done = subprocess.run(
        FAKE, input=b"a\xff\n", capture_output=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stdout.decode() == "A\ufffd\n"


def test_a_pipe_whose_messages_fail_exits_2() -> None:
    done = piped("hello\n", "--fail")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: [Errno 2] No such file or directory: 'weights.bin'" in done.stderr


def test_the_chat_ends_when_nobody_reads_its_output() -> None:
    with subprocess.Popen(
        FAKE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(),
    ) as chat:  # fmt: skip
        assert chat.stdout and chat.stdin and chat.stderr
        chat.stdout.close()
        chat.stdin.write(b"one\n")
        chat.stdin.flush()
        assert b"BrokenPipeError" in chat.stderr.read()  # for the command line to handle
    assert chat.returncode != 0


def test_continue_goes_on_with_the_last_chat() -> None:
    assert "there is no saved chat to go on with" in piped("", "--continue").stderr
    piped("first\n", "--system", "short")
    done = piped("/show history\n/show system\nsecond\n", "--continue")
    assert done.stdout == "user: first\nassistant: FIRST\nshort\nSECOND\n"
    assert "2 messages" in done.stderr
    assert len(saved_chats.chat_names()) == 1


# A pseudo-terminal


@pytest.fixture
def at_terminal() -> Iterator[Callable[..., PseudoTerminal]]:
    opened: list[PseudoTerminal] = []

    def start(*arguments: str, term: str = "xterm") -> PseudoTerminal:
        opened.append(PseudoTerminal([*FAKE, *arguments], term))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_ctrl_c_stops_the_reply_and_ctrl_d_leaves(
    at_terminal: Callable[..., PseudoTerminal], term: str
) -> None:
    chat = at_terminal("--delay", "0.005", term=term)
    chat.expect("Ctrl-D leaves")
    chat.expect(">>>")
    chat.send("long\r")
    chat.expect("Paragraph 2 goes on")
    chat.send("\x03")
    pressed = time.monotonic()
    before = chat.expect("interrupted")
    assert time.monotonic() - pressed < 1
    assert "Paragraph 900" not in before
    chat.expect(">>>")
    chat.send("still alive\r")
    chat.expect("STILL ALIVE")
    chat.expect("first token")
    chat.expect(">>>")
    chat.send("\x03")
    chat.expect("Ctrl-D or /bye leaves")
    chat.expect(">>>")
    chat.send("\x04")
    assert chat.wait() == 0
    [name] = saved_chats.chat_names()
    messages = saved_chats.load_chat(name).messages
    assert [m["content"] for m in messages][2:] == ["still alive", "STILL ALIVE"]
    assert messages[1]["content"].startswith("Paragraph 0")


def test_ctrl_c_while_the_prompt_is_read(at_terminal: Callable[..., PseudoTerminal]) -> None:
    chat = at_terminal("--delay", "0.5")
    chat.expect(">>>")
    chat.send("word " * 100 + "\r")
    chat.expect("reading the prompt")
    chat.send("\x03")
    pressed = time.monotonic()
    chat.expect("the message was taken back")
    assert time.monotonic() - pressed < 1
    chat.expect(">>>")
    chat.send("/bye\r")
    assert chat.wait() == 0


def test_a_slow_token_says_what_it_waits_for(at_terminal: Callable[..., PseudoTerminal]) -> None:
    chat = at_terminal("--delay", "1.5", "--pass-bytes", "3000000000", term="xterm")
    chat.expect(">>>")
    chat.send("hi\r")
    chat.expect("prompt 0 of 21 tokens · blk.12.ffn_up.weight · ")
    assert re.match(r"[12]\.\d\d GB/s · 0:0\d left\x1b\[0m\r", chat.expect("\n"))
    chat.expect("prompt 16 of 21 tokens · ")
    chat.expect("\r\x1b[1A\x1b[JH\r\n")
    chat.expect("reading blk.12.ffn_up.weight · ")
    assert re.match(r"[12]\.\d\d GB/s · at most 1:\d\d:\d\d left\x1b\[0m\r", chat.expect("\n"))
    chat.expect("\r\x1b[2A\x1b[JHI\r\n")
    chat.expect("streamed ")
    assert re.match(r"\d+\.\d GB at [12]\.\d+ GB/s · peak", chat.expect("MB"))
    chat.send("\x04")
    assert chat.wait() == 0


def test_a_slow_token_of_generate(at_terminal: Callable[..., PseudoTerminal]) -> None:
    slow = ("--delay", "1.5", "--pass-bytes", "3000000000", "--generate", "a")
    run = at_terminal(*slow)
    run.expect("prompt 16 of ")
    run.expect("A")
    run.expect("\n\r\x1b[K")
    run.expect("reading blk.12.ffn_up.weight · ")
    run.expect("\r\x1b[K\x1b[A\x1b[1C")
    assert run.wait() == 0
    assert at_terminal(*slow, "--json").wait() == 0


def test_ctrl_c_while_loading_leaves_with_one_line(
    at_terminal: Callable[..., PseudoTerminal],
) -> None:
    chat = at_terminal("--load-s", "60")
    chat.expect("compiling gemv_q4_1")
    chat.send("\x03")
    assert chat.wait() == 130
    assert "interrupted while loading" in chat.seen
    assert "Traceback" not in chat.seen


def test_input_history_is_kept_across_runs(
    at_terminal: Callable[..., PseudoTerminal], data_folder: Path
) -> None:
    for _ in range(2):
        chat = at_terminal()
        chat.expect(">>>")
        chat.send("remember me\r")
        chat.expect("REMEMBER ME")
        chat.expect("first token")
        chat.expect(">>>")
        chat.send("\x04")
        assert chat.wait() == 0
    assert (data_folder / "history").read_text().count("+remember me\n") >= 1
    chat = at_terminal()
    chat.expect(">>>")
    chat.send("\x1b[A")
    chat.expect("remember me")
    chat.send("\r")
    chat.expect("REMEMBER ME")
