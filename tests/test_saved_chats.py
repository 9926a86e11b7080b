"""Chats on disk: saved as they go, named, resumed, damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_chat import Talk

from onnxstream_nb.chat import saved as saved_chats
from onnxstream_nb.errors import UsageError


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ONNXSTREAM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_every_turn_is_saved(data_folder: Path) -> None:
    talk = Talk()
    talk.conversation.system = "s"
    talk.say("hé", "/set temperature 0")
    [name] = saved_chats.chat_names()
    assert saved_chats.is_automatic(name)
    stored = json.loads((data_folder / "chats" / f"{name}.json").read_text("utf-8"))
    assert stored == {
        "name": name, "model": "fake", "system": "s", "settings": {},
        "messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "HÉ"}],
    }  # fmt: skip
    if os.name == "posix":
        assert (data_folder / "chats" / f"{name}.json").stat().st_mode & 0o077 == 0
    assert list((data_folder / "chats").glob(".*")) == []


def test_the_message_is_on_disk_before_the_reply_comes() -> None:
    seen: list[list[dict[str, str]]] = []

    def answer(message: str) -> str:
        [name] = saved_chats.chat_names()
        seen.append(saved_chats.load_chat(name).messages)
        return "ok"

    Talk(answer).say("hello")
    assert seen[0] == [{"role": "user", "content": "hello"}]


def test_save_and_load_by_name() -> None:
    talk = Talk()
    talk.say("/set stop STOP", '/set logit_bias {"30": 1}', "/system s", "one", "/save my chat")
    assert saved_chats.chat_names() == ["my chat"]
    other = Talk()
    other.say("/load my chat")
    assert other.said == ["one", "ONE"]
    assert other.conversation.system == "s"
    assert other.conversation.settings == {"stop": ("STOP",), "logit_bias": {30: 1.0}}
    assert other.err == "going on with my chat · 2 messages\n"
    other.say("/set logit_bias none", "two")
    assert saved_chats.load_chat("my chat").messages[-1]["content"] == "TWO"
    other.say("/load")
    assert other.out == "TWO\nsaved chats\nmy chat\n"


def test_saving_under_a_second_name_keeps_the_first() -> None:
    talk = Talk()
    talk.say("one", "/save a", "two", "/save b", "three")
    assert set(saved_chats.chat_names()) == {"a", "b"}
    assert len(saved_chats.load_chat("a").messages) == 4
    assert len(saved_chats.load_chat("b").messages) == 6


def test_a_chat_that_ended_before_the_reply_can_go_on() -> None:
    chat = saved_chats.SavedChat("c", "fake", messages=[{"role": "user", "content": "open"}])
    saved_chats.save_chat(chat)
    talk = Talk()
    talk.say("/load c", "/regen")
    assert talk.said == ["open", "OPEN"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"messages": 3}', '{"model":"m","system":3,"settings":{},"messages":[]}'],
)  # fmt: skip
def test_a_damaged_file_is_named(data_folder: Path, content: str) -> None:
    (data_folder / "chats").mkdir(parents=True)
    (data_folder / "chats" / "bad.json").write_text(content)
    with pytest.raises(UsageError, match=r"cannot read the chat .*bad\.json: .*; delete the file"):
        saved_chats.load_chat("bad")


def test_bad_settings_in_a_file_are_refused_and_change_nothing() -> None:
    saved_chats.save_chat(saved_chats.SavedChat("c", "fake", settings={"temperature": "x"}))
    talk = Talk()
    talk.say("one", "/load c")
    assert talk.said == ["one", "ONE"]
    assert "error: the saved chat 'c' has bad settings: temperature" in talk.err


def test_a_chat_that_cannot_be_saved_says_so_once(data_folder: Path) -> None:
    data_folder.mkdir()
    (data_folder / "chats").write_text("a file where the folder should be")
    talk = Talk()
    assert talk.say("one", "two") == 0
    assert talk.out == "ONE\nTWO\n"
    assert talk.err.count("error: this chat is not being saved in ") == 1


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\\b", "x" * 101, "a\nb"])
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a chat"):
        saved_chats.path_of(name)
