"""What happens to a chat when its weight file, its disk or its folder fails: in real processes at
a pseudo-terminal, over a small model that is streamed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal
from streamed_chat import write_model

from onnxstream_nb.chat import saved as saved_chats

PROGRAM = [sys.executable, str(Path(__file__).parent / "streamed_chat.py")]
STREAMED = ("--load", "stream", "--threads", "1", "--seed", "1")
KEPT = "no reply was written: the message was taken back · /regen sends it"
CUT = "the reply is not complete · /regen answers anew"


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ONNXSTREAM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write_model(tmp_path / "models" / "m.gguf")


@pytest.fixture
def run() -> Iterator[Callable[..., PseudoTerminal]]:
    opened: list[PseudoTerminal] = []

    def start(*arguments: str | Path, **options: object) -> PseudoTerminal:
        command = [*PROGRAM, *map(str, arguments)]
        opened.append(PseudoTerminal(command, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def ready(chat: PseudoTerminal) -> None:
    chat.expect(">>>", timeout=300)  # kernels may have to be compiled


def say(chat: PseudoTerminal, text: str) -> None:
    chat.send(text + "\r")


def error_of(chat: PseudoTerminal, timeout: float = 30) -> str:
    """The one line of an error, and the hint behind it is still to come."""
    chat.expect("error: ", timeout)
    return chat.expect("\r\n").removeprefix("\x1b[0m")


def answers(chat: PseudoTerminal, text: str) -> None:
    """A short reply comes to an end without an error."""
    say(chat, "/set max_tokens 3")
    chat.expect("max_tokens is 3")
    ready(chat)
    say(chat, text)
    before = chat.expect("stopped at the token limit")
    assert "error" not in before and "streamed " in before
    ready(chat)


def leaves(chat: PseudoTerminal) -> None:
    say(chat, "/bye")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen and "Exception" not in chat.seen


def messages() -> list[tuple[str, str]]:
    [name] = saved_chats.chat_names()
    return [(m["role"], m["content"]) for m in saved_chats.load_chat(name).messages]


def in_the_middle_of_a_reply(chat: PseudoTerminal, text: str) -> None:
    """Asks for a long reply, and waits until some of it is there: noise, but longer than a line."""
    say(chat, text)
    end = time.monotonic() + 60
    while len(chat.seen) < 600:
        assert time.monotonic() < end, chat.seen
        chat.read()


@pytest.mark.parametrize("ram", [False, True])
def test_a_file_that_shrinks_in_the_middle_of_a_reply(
    run: Callable[..., PseudoTerminal], model: Path, ram: bool
) -> None:
    if ram:
        write_model(model, wide=True)
    whole = model.read_bytes()
    budget = ("--ram", least(run, model)) if ram else ()
    chat = run("chat", model, *STREAMED, *budget)
    ready(chat)
    in_the_middle_of_a_reply(chat, "first")
    os.truncate(model, len(whole) // 2)
    error = error_of(chat)
    assert f"{model}: the file ends before blk." in error
    assert error.endswith("it is truncated, fetch it again")
    chat.expect(CUT)
    ready(chat)
    assert [role for role, _ in messages()] == ["user", "assistant"]
    say(chat, "second")
    assert "is truncated, fetch it again" in error_of(chat)
    chat.expect(KEPT)
    ready(chat)
    assert messages()[2:] == [("user", "second")]
    model.write_bytes(whole)
    answers(chat, "/regen")
    assert [text for role, text in messages() if role == "user"] == ["first", "second"]
    assert messages()[3][0] == "assistant"
    leaves(chat)


def least(run: Callable[..., PseudoTerminal], model: Path) -> str:
    """The smallest budget that the program names, and a little more."""
    asked = run("chat", model, *STREAMED, "--ram", "1MB")
    asked.expect("at least ", timeout=300)
    found = asked.expect(" MB is needed")
    assert asked.wait() == 2
    return f"{1.05 * float(found):.0f}MB"


def test_a_file_that_was_replaced_after_it_failed(
    run: Callable[..., PseudoTerminal], model: Path
) -> None:
    """As a download puts it there: a new file in the place of the old one."""
    fresh, other = model.with_name("fresh"), write_model(model.with_name("o"), name="other")
    shutil.copy(model, fresh)
    chat = run("chat", model, *STREAMED)
    ready(chat)
    in_the_middle_of_a_reply(chat, "hello")
    os.truncate(model, 20_000)
    assert f"{model}: the file ends before" in error_of(chat)
    ready(chat)
    os.replace(other, model)
    say(chat, "/regen")
    error = error_of(chat)
    assert f"{model}: this is another file than the one that was opened" in error
    assert error.endswith("put that back, or load the model again")
    chat.expect(KEPT)
    ready(chat)
    model.unlink()
    say(chat, "/regen")
    error = error_of(chat)
    assert f"{model}: cannot open the weight file: No such file or directory" in error
    assert error.endswith("put it back, or fetch it again")
    ready(chat)
    os.replace(fresh, model)
    answers(chat, "/regen")
    assert [text for role, text in messages() if role == "user"] == ["hello"]
    leaves(chat)


def test_a_folder_that_goes_away(run: Callable[..., PseudoTerminal], model: Path) -> None:
    """Before it is read it is missed; what is open is read on."""
    away = model.parent.with_name("away")
    chat = run("chat", model, *STREAMED)
    ready(chat)
    model.parent.rename(away)
    say(chat, "hello")
    assert f"{model}: cannot open the weight file: No such file" in error_of(chat)
    chat.expect(KEPT)
    ready(chat)
    away.rename(model.parent)
    answers(chat, "/regen")
    shutil.rmtree(model.parent)
    answers(chat, "more")
    assert [role for role, _ in messages()] == ["user", "assistant"] * 2
    leaves(chat)


def test_a_disk_that_fails_for_a_while(run: Callable[..., PseudoTerminal], model: Path) -> None:
    chat = run("--fail-after", "400", "chat", model, *STREAMED)
    ready(chat)
    say(chat, "hello")
    error = error_of(chat)
    assert re.search(r"m\.gguf: reading \S+ failed: Input/output error; look after", error)
    chat.expect(CUT)
    ready(chat)
    model.with_name("m.gguf.mended").touch()
    answers(chat, "/regen")
    leaves(chat)


def test_ctrl_c_while_the_disk_does_not_answer(
    run: Callable[..., PseudoTerminal], model: Path
) -> None:
    chat = run("--hang-after", "150", "chat", model, *STREAMED)
    ready(chat)
    say(chat, "hello")
    chat.expect("reading ", timeout=60)
    chat.expect("B/s", timeout=60)
    chat.send("\x03")
    pressed = time.monotonic()
    chat.expect("interrupted")
    assert time.monotonic() - pressed < 2
    ready(chat)
    assert [role for role, _ in messages()] == ["user", "assistant"]
    say(chat, "more")
    chat.expect("prompt ", timeout=60)
    chat.send("\x03")
    chat.expect(KEPT)
    ready(chat)
    leaves(chat)  # though threads are still waiting


def test_ctrl_c_in_the_middle_of_a_pass(run: Callable[..., PseudoTerminal], model: Path) -> None:
    """A slow disk: what it takes to be noticed is a read, not a pass."""
    chat = run("--delay", "0.2", "chat", model, *STREAMED)
    ready(chat)
    say(chat, "a")
    chat.expect("reading ", timeout=60)
    chat.send("\x03")
    pressed = time.monotonic()
    chat.expect("interrupted")
    assert time.monotonic() - pressed < 2
    ready(chat)
    answers(chat, "/regen")
    leaves(chat)


# Disks that are full


def limited() -> None:
    """No file may become longer than 300 bytes: chats do not fit."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit is Linux's")
def test_a_full_disk_ends_no_chat(
    run: Callable[..., PseudoTerminal], model: Path, data_folder: Path
) -> None:
    import resource

    chat = run("generate", model, "--prompt", "a", "--max-tokens", "1", *STREAMED)
    assert chat.wait(timeout=300) == 0  # compiles what is missing, which takes more than 300 bytes
    chat = run("chat", model, *STREAMED, "--max-tokens", "3", prepare=limited)
    ready(chat)
    say(chat, "a" * 400)
    assert re.match(
        r"this chat is not being saved in \S+/data: File too large; free some space or make the "
        "folder writable: every turn tries again$",
        error_of(chat),
    )
    chat.expect("stopped at the token limit")
    assert re.match(
        r"what is entered is not being saved in \S+/data/history: File too large$", error_of(chat)
    )
    ready(chat)
    say(chat, "b")
    before = chat.expect("stopped at the token limit")
    assert "not being saved" not in before  # it was said
    ready(chat)
    assert not list((data_folder / "chats").iterdir())
    say(chat, "/save mine")
    assert "File too large" in error_of(chat)
    ready(chat)
    resource.prlimit(chat.pid, resource.RLIMIT_FSIZE, (10**9, resource.RLIM_INFINITY))
    say(chat, "c")
    chat.expect("this chat is saved again")
    chat.expect("stopped at the token limit")
    ready(chat)
    assert [text for role, text in messages() if role == "user"] == ["a" * 400, "b", "c"]
    leaves(chat)


def test_a_folder_that_cannot_be_written(
    run: Callable[..., PseudoTerminal], model: Path, data_folder: Path
) -> None:
    data_folder.write_text("a file where the folder should be")
    chat = run("chat", model, *STREAMED, "--max-tokens", "3")
    assert error_of(chat, 300).startswith(f"what is entered is not being saved in {data_folder}")
    ready(chat)
    say(chat, "hello")
    assert error_of(chat).startswith("this chat is not being saved in ")
    chat.expect("stopped at the token limit")
    ready(chat)
    leaves(chat)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("as_json", [True, False])
def test_output_to_a_full_disk_is_one_line(
    run: Callable[..., PseudoTerminal], model: Path, as_json: bool
) -> None:
    def to_full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    given = ("--json",) if as_json else ()
    run_ = run(
        "generate", model, "--prompt", "a", "--max-tokens", "2", *STREAMED, *given, prepare=to_full
    )
    assert run_.wait(timeout=300) == 2
    end = run_.seen[run_.seen.index("error: ") :]
    assert end == "error: [Errno 28] No space left on device; free some space on that disk\r\n"
