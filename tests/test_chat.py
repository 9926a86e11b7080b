"""The chat: input, turns, Ctrl-C and the /commands."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_chat import Talk, lines_of
from fake_llm import FakeLLM, shout

from onnxstream_nb.chat import ChatOptions
from onnxstream_nb.chat import saved as saved_chats
from onnxstream_nb.chat.commands import COMMANDS, read_setting, run_command
from onnxstream_nb.chat.line_input import Entry, LineInput


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ONNXSTREAM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        ([" hi "], Entry("hi")),
        (['"""', "a", " b", '"""'], Entry("a\n b", True)),
        (['"""a', 'b"""'], Entry("a\nb", True)),
        (['"""/one"""'], Entry("/one", True)),
        (['  """', "", "x", "", '"""  '], Entry("x", True)),
        (['"""', "cut"], Entry("cut", True)),
        (['say """ here'], Entry('say """ here')),
    ],
)
def test_entries(lines: list[str], entry: Entry) -> None:
    assert LineInput(lines_of(*lines)).read() == entry


def test_the_end_of_input_and_an_interrupted_block() -> None:
    source = LineInput(lines_of('"""', "dropped", "^C", "next"))
    with pytest.raises(KeyboardInterrupt):
        source.read()
    assert source.read() == Entry("next")
    with pytest.raises(EOFError):
        source.read()


def test_a_turn_shows_the_reply_and_the_footer() -> None:
    talk = Talk()
    assert talk.say("hello") == 0
    assert talk.out == "HELLO\n"
    assert re.fullmatch(
        r"6 tokens · [\d.]+ tok/s · prompt 24 tokens · [\d.]+ tok/s · first token [\d.]+ s · "
        r"peak (\d+ MB|\d+\.\d\d GB)\n",  # of this process, with all tests before
        talk.err,
    )
    assert talk.said == ["hello", "HELLO"]


def test_empty_lines_are_no_turns_and_slashes_can_be_said() -> None:
    talk = Talk()
    assert talk.say("", "  ", "//etc is a folder", '"""', "/bye", '"""') == 0
    assert talk.said == ["/etc is a folder", "/ETC IS A FOLDER", "/bye", "/BYE"]


def test_the_second_turn_does_not_read_the_first_again() -> None:
    talk = Talk()
    talk.say("hello there, how are you today?", "fine")
    last = talk.conversation.last
    assert last is not None
    assert last.prompt_tokens - last.cached_tokens < 30 < last.cached_tokens


def test_a_full_context_forgets_the_oldest_turns_and_goes_on() -> None:
    talk = Talk(context=220)
    talk.conversation.system = "be brief"
    assert talk.say(*(f"this is message number {i}" for i in range(6))) == 0
    assert talk.out.splitlines() == [f"THIS IS MESSAGE NUMBER {i}" for i in range(6)]
    assert "the context is full: the 2 oldest messages were forgotten\n" in talk.err
    assert len(talk.said) == 12
    window = talk.conversation.window()
    assert window[0] == {"role": "system", "content": "be brief"}
    assert 1 < len(window) < 12


def test_a_reply_longer_than_the_context_left_goes_on_without_old_turns() -> None:
    answer = "".join(f"{i}," for i in range(60))
    talk = Talk(lambda message: answer if message == "go" else "ok", context=220)
    talk.say("first message of some length", "go")
    assert talk.out == f"ok\n{answer}\n"
    assert "the 2 oldest messages were forgotten" in talk.err


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on() -> None:
    talk = Talk(context=100)
    assert talk.say("x" * 200, "hi") == 0
    assert talk.said == ["hi", "HI"]
    assert talk.err.startswith("error: the prompt has 219 tokens and the context holds 100: ")


def test_an_error_in_a_turn_is_one_line_and_keeps_the_conversation() -> None:
    talk = Talk()
    talk.say("one")
    llm: Any = talk.model.llm
    llm.fail = OSError(2, "No such file or directory", "weights.bin")
    talk.err, talk.out  # noqa: B018
    assert talk.say("two") == 2
    assert talk.err == (
        "error: [Errno 2] No such file or directory: 'weights.bin'\n"
        "no reply was written: the message was taken back · /regen sends it\n"
    )
    llm.fail = None
    assert talk.say("/regen") == 0
    assert talk.said == ["one", "ONE", "two", "TWO"]


def test_ctrl_c_at_the_prompt_gives_a_hint_and_ends_a_pipe() -> None:
    talk = Talk()
    assert talk.say("^C", "hi", interactive=True) == 0
    assert "Ctrl-D or /bye leaves\n" in talk.err
    assert talk.out == "HI\n"
    assert talk.say("^C", "hi") == 130


@pytest.mark.parametrize("interactive", [True, False])
def test_ctrl_c_stops_the_reply_and_keeps_its_text(interactive: bool) -> None:
    def answer(message: str) -> str:
        return "y" * 5000 if message == "long" else shout(message)

    talk = Talk(answer, delay=0.002)
    llm: Any = talk.model.llm
    at = len(talk.model.render("long")) - 31 + 40
    llm.feed = interrupting(llm, after=at)
    started = time.monotonic()
    code = talk.say("long", "more", interactive=interactive)
    assert time.monotonic() - started < 20
    text = talk.said[1]
    assert set(text) == {"y"} and 10 < len(text) < 1000
    assert "interrupted\n" in talk.err
    assert code == (0 if interactive else 130)
    assert talk.said[2:] == (["more", "MORE"] if interactive else [])


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back() -> None:
    talk = Talk(delay=0.004)
    llm: Any = talk.model.llm
    llm.feed = interrupting(llm, after=0)
    assert talk.say("hello " * 30, "/regen", interactive=True) == 0
    assert "no reply was written: the message was taken back · /regen sends it\n" in talk.err
    assert talk.said == [("hello " * 30).strip(), ("HELLO " * 30).strip()]


def interrupting(llm: FakeLLM, after: int) -> Callable[..., Any]:
    """`llm.feed`, pressing Ctrl-C once, when `after` tokens are in the cache."""
    feed, pressed = llm.feed, []

    def wrapped(ids: Any, stop: Any = None) -> Any:
        if len(llm.tokens) >= after and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return feed(ids, stop)

    return wrapped


# Commands


def test_help_lists_every_command() -> None:
    talk = Talk()
    talk.say("/help")
    listed = talk.out
    assert all(f"/{name}" in listed for name in COMMANDS)
    talk.say("/?")
    assert talk.out == listed


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "there is no command /hlep; did you mean /help? "),
        ("/qwertz", "there is no command /qwertz; /help lists the commands. "),
        ("/set temprature 1", "there is no setting 'temprature': did you mean temperature?"),
        ("/set temperature hot", "temperature needs a number, not 'hot'"),
        ("/set top_k 1.5", "top_k needs a whole number, not '1.5'"),
        ("/set temperature -1", "temperature should be a number of at least 0, not -1.0"),
        ("/set max_tokens 0", "max_tokens is 0: "),
        ("/set logit_bias [1]", "logit_bias needs token ids and numbers"),
        ("/show nothing", "/show knows info, system, template, stats, history; not 'nothing'"),
        ("/undo", "there is no turn to take back"),
        ("/regen", "there is no turn to take back"),
        ("/save", "/save needs a name"),
        ("/save a", "there is nothing to save yet"),
        ("/load ../x", "'../x' cannot name a chat: "),
        ("/load gone", "there is no saved chat 'gone'; saved are: none"),
    ],
)
def test_commands_that_make_no_sense(line: str, message: str) -> None:
    talk = Talk()
    assert talk.say(line) == 0
    assert talk.err.startswith(f"error: {message}")
    assert talk.err == ""


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0), ("top_k", "3", 3), ("seed", "7", 7), ("seed", "none", None),
        ("stop", "END", ("END",)), ("stop", '"a b"', ("a b",)), ("stop", '["a", "b"]', ("a", "b")),
        ("stop", '"\\n\\n"', ("\n\n",)), ("logit_bias", '{"5": -1}', {5: -1.0}),
        ("max_tokens", "9", 9), ("top_p", "default", None),
    ],
)  # fmt: skip
def test_read_setting(name: str, text: str, value: object) -> None:
    assert read_setting(name, text) == value


def test_set_changes_lists_and_resets() -> None:
    talk = Talk()
    talk.say("/set max-tokens 3", "hello", "/set max_tokens")
    assert talk.out == "HEL\n"
    assert "stopped at the token limit" in talk.err
    talk.say("/set")
    listed = [line.split() for line in talk.out.splitlines()]
    assert ["max_tokens", "3"] in listed
    assert ["temperature", "0.8", "*"] in listed
    talk.say("/set max_tokens default", "hello")
    assert talk.out == "HELLO\n"
    assert talk.conversation.settings == {}


def test_the_models_own_sampling_is_its_default() -> None:
    talk = Talk()
    talk.conversation.model.sampling = {"temperature": 0.2}
    talk.say("/set")
    assert ["temperature", "0.2", "*"] in [line.split() for line in talk.out.splitlines()]
    talk.say("/set temperature 0.5", "/set temperature default", "/set temperature")
    assert talk.err.splitlines()[-1] == "temperature is 0.2"
    assert talk.conversation.settings == {}


def test_a_bad_setting_changes_nothing() -> None:
    talk = Talk()
    talk.say("/set temperature 0.5", "/set temperature -5")
    assert talk.conversation.settings == {"temperature": 0.5}


def test_system_prompt_is_set_shown_sent_and_removed() -> None:
    talk = Talk()
    talk.say("/system", "/system Be brief.", "/system", "/show system")
    shown = "no system prompt is set; the template may bring its own\nBe brief.\nBe brief.\n"
    assert talk.out == shown
    assert talk.conversation.window() == [{"role": "system", "content": "Be brief."}]
    talk.say("/system none")
    assert talk.conversation.window() == []


def test_show_and_stats() -> None:
    talk = Talk()
    talk.say("/stats", "/show history", "/show template")
    assert talk.out == (
        "no reply yet\nnothing has been said yet\n"
        "the model brings no chat template; a built-in one is used\n"
    )
    talk.say("hi \x1b[31m", "yo")
    talk.out  # noqa: B018
    talk.say("/show history")
    assert talk.out == "user: hi [31m\nassistant: HI [31M\nuser: yo\nassistant: YO\n"
    talk.say("/show")
    shown = dict(line.split(maxsplit=1) for line in talk.out.splitlines())
    assert (shown["model"], shown["turns"]) == ("fake", "2")
    assert re.fullmatch(r"\d+ of 4096 tokens used", shown["context"])
    talk.say("/stats")
    figures = talk.out
    assert "replies         2\n" in figures
    assert "written tokens  12\n" in figures


def test_undo_and_regen() -> None:
    talk = Talk()
    talk.say("one", "two", "/undo")
    assert talk.said == ["one", "ONE"]
    assert "took back: two\n" in talk.err
    talk.say("/regen")
    assert talk.said == ["one", "ONE"]
    assert talk.out == "ONE\nTWO\nONE\n"


def test_clear_forgets_but_keeps_the_system_prompt_and_the_saved_chat() -> None:
    talk = Talk()
    talk.conversation.system = "s"
    talk.say("one", "/clear")
    assert talk.conversation.window() == [{"role": "system", "content": "s"}]
    assert len(saved_chats.chat_names()) == 1
    talk.say("two")
    assert len(saved_chats.chat_names()) == 2


def test_bye_leaves() -> None:
    for word in ("/bye", "/exit", "/quit"):
        talk = Talk()
        assert talk.say(word, "never") == 0
        assert talk.said == []


def test_run_command_keeps_the_argument_whole() -> None:
    talk = Talk()
    run_command("/system  two  words ", talk.conversation, talk.terminal)
    assert talk.conversation.system == "two  words"


def test_options_become_settings() -> None:
    options = ChatOptions(sampling={"temperature": 0.0, "seed": None}, max_tokens=4)
    assert options.settings() == {"temperature": 0.0, "max_tokens": 4}
