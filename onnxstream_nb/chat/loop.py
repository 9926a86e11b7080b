"""The conversation at the terminal: turns, /commands, saved chats, Ctrl-C."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..errors import Interrupted, OnnxstreamError
from ..model import Generation, Model, Token
from ..ui import Terminal, held
from .commands import ALIASES, COMMANDS, describe, run_command
from .conversation import Conversation, check_settings
from .line_input import Entry, LineInput, open_input
from .saved import chat_names, data_folder, load_chat
from .worker import Insisted, Worker, interrupts, no_echo

INTERRUPTED = 130
FAULTS = (OnnxstreamError, OSError, MemoryError)  # a chat goes on after these


@dataclass(frozen=True)
class ChatOptions:
    """How to chat. `sampling` holds fields of SamplingParams that were given, `load_options` the
    keyword arguments of Model.load. `resume` goes on with the last chat. `plain` True shows
    replies as they are, False as rendered Markdown, None as the terminal can."""

    system: str | None = None
    sampling: Mapping[str, object] = field(default_factory=dict)
    max_tokens: int | None = None
    resume: bool = False
    load_options: Mapping[str, Any] = field(default_factory=dict)
    show_prompt: bool = False
    plain: bool | None = None

    def settings(self) -> dict[str, Any]:
        """`sampling` and `max_tokens` as one, without what was not given."""
        given = {**self.sampling, "max_tokens": self.max_tokens}
        return {name: value for name, value in given.items() if value is not None}


def run(model_name: str, *, options: ChatOptions) -> int:
    """Chats until the end of input. Returns the exit code: 0, 130 after Ctrl-C while loading,
    2 if a message from a pipe could not be answered. Errors while loading are raised."""
    terminal = Terminal(plain=options.plain)
    check_settings(options.settings())
    worker = Worker()
    try:
        model = load_model(worker, terminal, model_name, options.load_options)
    except Interrupted:
        terminal.notice("interrupted while loading")
        return INTERRUPTED
    try:
        return _converse(model, worker, terminal, options)
    finally:
        model.close()
        worker.close()


def load_model(
    worker: Worker, terminal: Terminal, name: str, load_options: Mapping[str, Any]
) -> Model:
    """Loads the model in the worker, with progress; Interrupted after Ctrl-C."""
    cancelled = threading.Event()

    def work(emit: Callable[[tuple[str, float | None] | Model], None]) -> None:
        def report(text: str, fraction: float | None) -> None:
            if cancelled.is_set():
                raise Interrupted("loading was interrupted")
            emit((text, fraction))

        emit(Model.load(name, **load_options, progress=report))

    with interrupts(cancelled.set), terminal.progress() as show:
        for event in worker.run(work):
            if cancelled.is_set():
                # What is deep in a compiler goes on for a moment; nobody waits for it.
                raise Interrupted("loading was interrupted")
            if isinstance(event, Model):
                return event
            if event is not None:
                show(*event)
    raise AssertionError("loading ended without a model")


def _converse(model: Model, worker: Worker, terminal: Terminal, options: ChatOptions) -> int:
    conversation = Conversation(model, options.system, options.settings())
    if options.resume:
        _resume(conversation, terminal, options)
    commands = [f"/{name}" for name in (*COMMANDS, *ALIASES)]
    source = open_input(data_folder() / "history", commands, terminal.error)
    chat = Chat(conversation, worker, terminal, source, options.show_prompt)
    if sys.stdin.isatty():
        about = f"context {model.context} tokens"
        terminal.notice(f"onnxstream_nb {__version__}", model.name, about, "/help", "Ctrl-D leaves")
    return chat.loop(interactive=sys.stdin.isatty())


def _resume(conversation: Conversation, terminal: Terminal, options: ChatOptions) -> None:
    last = next(iter(chat_names()), None)
    if last is None:
        terminal.notice("there is no saved chat to go on with: a new one begins")
        return
    saved = load_chat(last)
    conversation.restore(saved)
    conversation.change(**options.settings())
    if options.system is not None:
        conversation.system = options.system
    terminal.notice(*describe(saved, conversation.model.name), "/show history")


class Chat:
    """The loop over what the user enters."""

    def __init__(
        self,
        conversation: Conversation,
        worker: Worker,
        terminal: Terminal,
        source: LineInput,
        show_prompt: bool = False,
    ) -> None:
        self._conversation = conversation
        self._worker = worker
        self._terminal = terminal
        self._source = source
        self._show_prompt = show_prompt
        self._is_saved = True
        self._code = 0

    def loop(self, *, interactive: bool) -> int:
        """Takes turns until the input ends or the user leaves; returns the exit code."""
        while True:
            try:
                entry = self._source.read()
            except EOFError:
                return 0 if interactive else self._code
            except KeyboardInterrupt:
                if not interactive:
                    return INTERRUPTED
                self._terminal.notice("Ctrl-D or /bye leaves")
                continue
            try:
                if self._handle(entry):
                    return 0 if interactive else self._code
            except FAULTS as error:
                self._show_error(error)
                continue
            except KeyboardInterrupt as interrupt:
                if not interactive or isinstance(interrupt, Insisted):
                    return INTERRUPTED
                self._terminal.notice("interrupted")
            if not interactive and self._interrupted():
                return INTERRUPTED

    def _show_error(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            raise error  # the reader of our output has gone: there is nobody to tell
        self._terminal.error(str(error) or "there is not enough memory")

    def _interrupted(self) -> bool:
        """Whether Ctrl-C ended the last reply, and not an error."""
        last = self._conversation.last
        return self._code == 0 and last is not None and last.stop_reason == "interrupted"

    def _handle(self, entry: Entry) -> bool:
        """Handles one entry; True when the user leaves."""
        text = entry.text
        if not entry.literal and text.startswith("/") and not text.startswith("//"):
            outcome = run_command(text, self._conversation, self._terminal)
            if outcome.send is not None:
                self._turn(outcome.send)
            return outcome.leave
        if not entry.literal:
            text = text.removeprefix("/") if text.startswith("//") else text
        if text.strip():
            self._turn(text)
        return False

    def _turn(self, text: str) -> None:
        """Sends one message and shows the reply; whatever happens, the conversation is kept."""
        conversation, terminal = self._conversation, self._terminal
        start = conversation.start
        self._code = 2  # unless a reply comes
        generation = conversation.ask(text)
        self._save()
        if self._show_prompt:
            terminal.aside(conversation.model.render_chat(conversation.window()))
        pieces: list[str] = []
        failed = True
        try:
            failed = not self._show_reply(generation, pieces)
        finally:
            generation.stop()
            dropped = conversation.start - start
            conversation.answer("".join(pieces), generation.stats)
            self._save()
        if dropped:
            terminal.notice(f"the context is full: the {dropped} oldest messages were forgotten")
        if conversation.unanswered is not None:
            terminal.notice("no reply was written: the message was taken back", "/regen sends it")
        elif failed:
            terminal.notice("the reply is not complete", "/regen answers anew")
        if not failed:
            self._code = 0
            terminal.footer(generation.stats)

    def _show_reply(self, generation: Generation, pieces: list[str]) -> bool:
        """Shows a reply as it comes; False after the error that ended it, which is shown, too."""

        def work(emit: Callable[[Token], None]) -> None:
            for token in generation:
                emit(token)

        reply = self._terminal.reply(generation.progress)
        try:
            with held(), interrupts(generation.stop), no_echo():
                try:
                    for token in self._worker.run(work):
                        if token is None:
                            reply.tick()
                        else:
                            pieces.append(token.text)
                            reply.write(token.text)
                finally:
                    reply.close()
        except FAULTS as error:
            self._show_error(error)
            return False
        return True

    def _save(self) -> None:
        """Saves the chat; says when that begins to fail, and when it works again."""
        try:
            self._conversation.save()
        except OSError as error:
            if self._is_saved:
                self._terminal.error(
                    f"this chat is not being saved in {data_folder()}: {error.strerror or error}; "
                    "free some space or make the folder writable: every turn tries again"
                )
            self._is_saved = False
            return
        if not self._is_saved:
            self._terminal.notice("this chat is saved again")
        self._is_saved = True
