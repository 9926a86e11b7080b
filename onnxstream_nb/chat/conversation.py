"""The state of a chat: its messages, its settings, and the window of it that the model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import UsageError
from ..model import Generation, Model, Stats
from .saved import SavedChat, automatic_name, delete_chat, is_automatic, save_chat

Message = dict[str, str]


@dataclass
class Conversation:
    """`messages` alternate between user and assistant. The model sees the system prompt and
    `messages[start:]`; `start` moves on when the context is full. `settings` are the sampling
    options and max_tokens that the user chose. `unanswered` is a message that got no reply.
    """

    model: Model
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    name: str = field(default_factory=automatic_name)
    start: int = 0
    unanswered: str | None = None
    last: Stats | None = None
    replies: int = 0
    total: Stats = field(default_factory=Stats)

    def window(self) -> list[Message]:
        """The messages that the model sees, the system prompt first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages[self.start :]

    def ask(self, text: str) -> Generation:
        """Adds a user message and returns the reply to iterate. Follow it by `answer`."""
        self.messages.append({"role": "user", "content": text})
        self.unanswered = None
        try:
            return self.model.chat(self.window(), make_room=self.drop_oldest, **self.settings)
        except BaseException:
            self.answer("")
            raise

    def answer(self, text: str, stats: Stats | None = None) -> None:
        """Adds the reply to the last user message, or withdraws that message if there is none."""
        if stats is not None:
            self._count(stats)
        if text:
            self.messages.append({"role": "assistant", "content": text})
            self.unanswered = None
        else:
            self.unanswered = self.messages.pop()["content"]
        self.start = min(self.start, len(self.messages))

    def drop_oldest(self) -> list[Message] | None:
        """Forgets the oldest turn the model sees; None when only the last message is left."""
        later = range(self.start + 1, len(self.messages))
        start = next((i for i in later if self.messages[i]["role"] == "user"), None)
        if start is None:
            return None
        self.start = start
        return self.window()

    def undo(self) -> str:
        """Removes the last turn and returns its user message; UsageError when there is none."""
        if self.unanswered is not None:
            text, self.unanswered = self.unanswered, None
            return text
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise UsageError("there is no turn to take back")
        text = self.messages[users[-1]]["content"]
        del self.messages[users[-1] :]
        self.start = min(self.start, len(self.messages))
        return text

    def clear(self) -> None:
        """Begins anew under the same system prompt and settings; the old chat stays saved."""
        self.messages, self.start, self.unanswered = [], 0, None
        self.name = automatic_name()

    def save(self) -> None:
        """Writes the chat to disk if anything was said; OSError when that fails."""
        if self.messages or self.unanswered is not None:
            save_chat(self._saved())

    def save_as(self, name: str) -> None:
        """Gives the chat a name of the user's and saves it; an automatic name goes."""
        if not self.messages:
            raise UsageError("there is nothing to save yet")
        old = self.name
        save_chat(replace(self._saved(), name=name))
        self.name = name
        if is_automatic(old):
            delete_chat(old)

    def restore(self, saved: SavedChat) -> None:
        """Takes over a saved chat: messages, system prompt and settings."""
        settings = _from_json(saved)
        self.system, self.settings, self.name = saved.system, settings, saved.name
        self.messages, self.start, self.unanswered = list(saved.messages), 0, None
        if self.messages and self.messages[-1]["role"] == "user":
            self.answer("")  # the program ended before a reply came

    def change(self, **settings: Any) -> None:
        """Changes settings after checking them; the value None goes back to the default."""
        wanted = self.settings | settings
        wanted = {name: value for name, value in wanted.items() if value is not None}
        check_settings(wanted)
        self.settings = wanted

    def _saved(self) -> SavedChat:
        messages = list(self.messages)
        if self.unanswered is not None:
            messages.append({"role": "user", "content": self.unanswered})
        return SavedChat(self.name, self.model.name, self.system, self.settings, messages)

    def _count(self, stats: Stats) -> None:
        self.last = stats
        self.replies += 1
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            setattr(self.total, name, getattr(self.total, name) + getattr(stats, name))
        self.total.prefill_s += stats.prefill_s
        self.total.decode_s += stats.decode_s


def default_settings(sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that /set knows, with their defaults: SamplingParams, of which a model may have
    its own `sampling`, and max_tokens."""
    from ..sampling import SamplingParams

    params = SamplingParams(**sampling or {})
    return {"max_tokens": None, **{f.name: getattr(params, f.name) for f in fields(params)}}


def check_settings(settings: dict[str, Any]) -> None:
    """UsageError for an unknown setting or a value that makes no sense."""
    from ..sampling import SamplingParams

    known = default_settings()
    for name in settings:
        if name not in known:
            raise UsageError(f"there is no setting {name!r}: use one of {', '.join(known)}")
    most = settings.get("max_tokens")
    if most is not None and (not isinstance(most, int) or most < 1):
        raise UsageError(f"max_tokens is {most}: it must be a whole number of at least 1")
    SamplingParams(**{name: v for name, v in settings.items() if name != "max_tokens"})


def _from_json(saved: SavedChat) -> dict[str, Any]:
    """Settings as they were before JSON made lists of tuples and texts of token ids."""
    settings = dict(saved.settings)
    try:
        if "stop" in settings:
            settings["stop"] = tuple(settings["stop"])
        if "logit_bias" in settings:
            bias = settings["logit_bias"].items()
            settings["logit_bias"] = {int(token): value for token, value in bias}
        check_settings(settings)
    except (UsageError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"the saved chat {saved.name!r} has bad settings: {error}") from error
    return settings
