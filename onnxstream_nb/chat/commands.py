"""The /commands of a chat: a table of names, help lines and functions on a conversation."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..ui import Terminal, footer_parts
from ..ui.text import join_within
from .conversation import Conversation, default_settings
from .saved import SavedChat, chat_names, load_chat

_STATS_WIDTH = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the chat does next: leave, or send `send` to the model, or just go on."""

    leave: bool = False
    send: str | None = None


Run = Callable[[Conversation, Terminal, str], Outcome | None]


@dataclass(frozen=True, slots=True)
class Command:
    """One command: how it is written, what it does, and its function."""

    usage: str
    help: str
    run: Run


def run_command(line: str, conversation: Conversation, terminal: Terminal) -> Outcome:
    """Runs a line that begins with a slash. UsageError if there is no such command."""
    name, _, argument = line[1:].strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean /{close[0]}?" if close else "/help lists the commands."
        raise UsageError(f"there is no command /{name}; {hint} (// begins a message with a slash)")
    return command.run(conversation, terminal, argument.strip()) or Outcome()


def _help(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "begins a message of several lines, and ends it"),
        ("//...", "sends a message that begins with a slash"),
        ("Ctrl-C", "stops the reply"),
        ("Ctrl-D", "leaves"),
    ]
    terminal.table(rows)


def _set(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not name:
        return _list_settings(conversation, terminal)
    name = name.replace("-", "_")
    if value.strip() or name not in default_settings():
        conversation.change(**{name: read_setting(name, value.strip())})
    terminal.notice(f"{name} is {_shown(_setting(conversation, name))}")


def _list_settings(conversation: Conversation, terminal: Terminal) -> None:
    rows = [
        (name, _shown(_setting(conversation, name)), "" if name in conversation.settings else "*")
        for name in default_settings()
    ]
    terminal.table(rows, ("setting", "value", "default"))


def _setting(conversation: Conversation, name: str) -> Any:
    return conversation.settings.get(name, default_settings(conversation.model.sampling)[name])


def _shown(value: Any) -> str:
    return "none" if value is None or value in ((), {}) else json.dumps(value, ensure_ascii=False)


def read_setting(name: str, text: str) -> Any:
    """The value of a setting from what the user typed; "default" gives None.

    Errors: UsageError for an unknown setting, or text that is no value of its kind.
    """
    defaults = default_settings()
    if name not in defaults:
        close = difflib.get_close_matches(name, defaults, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(defaults)}"
        raise UsageError(f"there is no setting {name!r}: {hint}")
    if text in ("default", "none"):
        return None
    kind, read = _KINDS.get(name, _FLOAT)
    try:
        return read(text)
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{name} needs {kind}, not {text!r}") from None


def _read_stops(text: str) -> tuple[str, ...]:
    """A JSON string or list of strings, or the bare text of one stop string."""
    if not text.startswith(('"', "[")):
        if not text:
            raise ValueError("empty")
        return (text,)
    value = json.loads(text)
    return (value,) if isinstance(value, str) else tuple(str(one) for one in value)


def _read_bias(text: str) -> dict[int, float]:
    return {int(token): float(bias) for token, bias in json.loads(text).items()}


_FLOAT: tuple[str, Callable[[str], Any]] = ("a number", float)
_INT: tuple[str, Callable[[str], Any]] = ("a whole number", int)
_KINDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "max_tokens": _INT,
    "top_k": _INT,
    "penalty_window": _INT,
    "seed": _INT,
    "stop": ('a text, or texts like ["a", "b"]', _read_stops),
    "logit_bias": ('token ids and numbers like {"17": -5}', _read_bias),
}


def _show(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    topic = argument or "info"
    if topic not in _TOPICS:
        raise UsageError(f"/show knows {', '.join(_TOPICS)}; not {topic!r}")
    _TOPICS[topic](conversation, terminal)


def _show_info(conversation: Conversation, terminal: Terminal) -> None:
    model = conversation.model
    used = len(model.llm.tokens)
    rows = [
        ("model", model.name),
        ("path", str(model.path)),
        ("context", f"{used} of {model.context} tokens used"),
        ("chat", conversation.name),
        ("turns", str(sum(m["role"] == "user" for m in conversation.messages))),
    ]
    terminal.table(rows)


def _show_system(conversation: Conversation, terminal: Terminal) -> None:
    terminal.text(conversation.system or "no system prompt is set; the template may bring its own")


def _show_template(conversation: Conversation, terminal: Terminal) -> None:
    template = conversation.model.tokenizer.chat_template
    terminal.text(template or "the model brings no chat template; a built-in one is used")


def _show_history(conversation: Conversation, terminal: Terminal) -> None:
    if not conversation.messages:
        terminal.text("nothing has been said yet")
    for i, message in enumerate(conversation.messages):
        forgotten = " (forgotten by the model)" if i < conversation.start else ""
        terminal.text(f"{message['role']}{forgotten}: {message['content']}")


def _show_stats(conversation: Conversation, terminal: Terminal) -> None:
    if conversation.last is None:
        terminal.text("no reply yet")
        return
    total = conversation.total
    spent = f"{total.prefill_s:.1f} s reading, {total.decode_s:.1f} s writing"
    rows = [
        ("last reply", "\n".join(join_within(footer_parts(conversation.last), _STATS_WIDTH))),
        ("replies", str(conversation.replies)),
        ("prompt tokens", f"{total.prompt_tokens} ({total.cached_tokens} cached)"),
        ("written tokens", str(total.completion_tokens)),
        ("time", spent),
        ("loading", f"{conversation.last.load_s:.1f} s"),
    ]
    terminal.table(rows)


_TOPICS: Mapping[str, Callable[[Conversation, Terminal], None]] = {
    "info": _show_info,
    "system": _show_system,
    "template": _show_template,
    "stats": _show_stats,
    "history": _show_history,
}


def _system(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    if not argument:
        return _show_system(conversation, terminal)
    conversation.system = None if argument in ('""', "none") else argument.strip('"')
    terminal.notice("the system prompt is set" if conversation.system else "no system prompt")


def _clear(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    conversation.clear()
    terminal.notice("a new conversation begins")


def _undo(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    terminal.notice(f"took back: {conversation.undo()}")
    conversation.save()


def _regen(conversation: Conversation, terminal: Terminal, argument: str) -> Outcome:
    return Outcome(send=conversation.undo())


def _save(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    if not argument:
        raise UsageError("/save needs a name")
    conversation.save_as(argument)
    terminal.notice(f"saved as {argument}", f"/load {argument} brings it back")


def _load(conversation: Conversation, terminal: Terminal, argument: str) -> None:
    if not argument:
        terminal.table([(name,) for name in chat_names()], ("saved chats",))
        return
    saved = load_chat(argument)
    conversation.restore(saved)
    terminal.notice(*describe(saved, conversation.model.name))


def describe(saved: SavedChat, model: str) -> list[str]:
    """The phrases that say which chat goes on."""
    other = [f"it was held with {saved.model}"] if saved.model != model else []
    return [f"going on with {saved.name}", f"{len(saved.messages)} messages", *other]


def _bye(conversation: Conversation, terminal: Terminal, argument: str) -> Outcome:
    return Outcome(leave=True)


COMMANDS: Mapping[str, Command] = {
    "help": Command("/help, /?", "shows this", _help),
    "set": Command("/set [NAME VALUE]", "changes a sampling setting, or lists them", _set),
    "show": Command(f"/show [{'|'.join(_TOPICS)}]", "shows what the chat knows", _show),
    "system": Command("/system [TEXT]", "sets the system prompt; none removes it", _system),
    "clear": Command("/clear", "begins a new conversation", _clear),
    "undo": Command("/undo", "takes the last turn back", _undo),
    "regen": Command("/regen", "answers the last message anew", _regen),
    "save": Command("/save NAME", "saves the conversation under a name", _save),
    "load": Command("/load [NAME]", "goes on with a saved one, or lists them", _load),
    "stats": Command("/stats", "shows what the replies cost", lambda c, t, a: _show_stats(c, t)),
    "bye": Command("/bye", "leaves", _bye),
}
ALIASES: Mapping[str, str] = {"?": "help", "exit": "bye", "quit": "bye"}
