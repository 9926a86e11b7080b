"""A loaded language model: prompts in, a stream of tokens out.

`Model` joins a tokenizer and a `LanguageModel`; `Generation` is one reply, computed lazily in the
thread that iterates it and stoppable from any other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .device import parse_size
from .drafting import beside, guesses_a_pass, left_beside, open_draft
from .errors import UsageError
from .generation import Generation, Host, Stats, Token
from .progress import Report, of_download
from .work import Work

if TYPE_CHECKING:
    from .batch import Batch, BatchRequest
    from .llm import LanguageModel
    from .tokenizer import Tokenizer

__all__ = ["Generation", "Model", "Stats", "Token"]
MakeRoom = Callable[[], Sequence[Mapping[str, str]] | None]
"""Called when the context is full: returns a shorter conversation, or None when it cannot."""


class Model:
    """A language model with its tokenizer. Use `Model.load`; close it, or use it in a `with`.

    Attributes: `name`, `path`, `tokenizer`, `llm`, `context` (tokens), `load_s` (seconds), `draft`
    (the language model that guesses for it, or None), `speculate` (see `load`), `sampling` (fields
    of `SamplingParams` whose defaults are others for this model).
    """

    def __init__(
        self,
        name: str,
        path: Path,
        tokenizer: Tokenizer,
        llm: LanguageModel,
        load_s: float = 0.0,
        *,
        draft: LanguageModel | None = None,
        speculate: int | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.path, self.tokenizer, self.llm = name, path, tokenizer, llm
        self.context = llm.context
        self.load_s = load_s
        self.draft, self.speculate, self.sampling = draft, speculate, sampling or {}
        guesses_a_pass(llm, speculate, draft is not None)
        self._lock = threading.Lock()
        self._active: weakref.ref[Work] | None = None
        self._closed = False

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        load: str = "auto",
        ram: int | str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        cuda: int | str = "auto",
        context: int | None = None,
        precision: str = "auto",
        kv_cache: str = "f16",
        kv_spill: str | Path | None = None,
        draft: str | Path | None = None,
        speculate: int | None = None,
        packed: str | Path | None = None,
        sequences: int = 1,
        progress: Report | None = None,
    ) -> Model:
        """Loads a catalogue name, a hub repository or a local path, downloading what is missing.

        `context` is in tokens; `kv_cache` "q8" keeps it in little more than half the memory of
        "f16". What of it does not fit `ram` lies on disk, in the folder `kv_spill`, by default in
        the cache; with "off" it has to fit. For a batch, `ram` has to hold the contexts of so many
        `sequences`. `progress` is called as work proceeds and may raise to give up.
        `packed` is a folder in which quantised weights are kept as they are packed for the
        kernels: the next start need not pack them, and what is streamed comes so.
        `draft` is a smaller model of the same vocabulary whose guesses are checked several a pass
        over the weights, `speculate` how many (0 to 7) the text so far may propose a pass; without
        it 7 when weights are streamed, and none when they are in memory. Neither changes a greedy
        text, nor how likely any text is: a seed gives the same text at any `speculate`, but another
        one with a draft model.
        With the `device` "cuda" weights lie on a GPU, the draft model's first, as many as fit the
        budget `cuda` (as for `Session`); where there is none, the log says so and the CPU is used.
        Errors: any `OnnxstreamError`, whose message says what to do.
        """
        report = progress or (lambda text, fraction: None)
        started = perf_counter()
        report("importing the engine", None)
        from .hub import resolve, spill_dir
        from .llm import LanguageModel
        from .tokenizer import load_tokenizer

        found = resolve(str(name_or_path), progress=of_download(report))
        report("reading the tokenizer", None)
        tokenizer = load_tokenizer(found.path)
        budget = parse_size(ram, "--ram") if isinstance(ram, str) else ram
        with ExitStack() as undo:
            drafter = None
            if draft is not None:
                drafter = open_draft(
                    str(draft), found, tokenizer, ram=budget, threads=threads, context=context,
                    device=device, cuda=cuda, progress=report,
                )  # fmt: skip
                undo.callback(drafter.close)
                cuda = left_beside(drafter, cuda)
            with beside(drafter, budget) as rest:
                llm = LanguageModel(
                    found.path, load=load, ram=rest, threads=threads, context=context,
                    precision=precision, kv_cache=kv_cache, kv_spill=spill_dir(kv_spill),
                    packed=packed, device=device, cuda=cuda, sequences=sequences, progress=report,
                )  # fmt: skip
            undo.callback(llm.close)
            llm.logits_stay = True  # the sampler looks at them where they are
            model = cls(
                found.name, found.path, tokenizer, llm, draft=drafter, speculate=speculate,
                sampling=found.sampling,
            )  # fmt: skip
            undo.pop_all()
        model.load_s = perf_counter() - started
        return model

    def generate(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int | None = None,
        speculate: int | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answers `prompt`, put into the model's chat template after `system`.

        With `raw` the prompt is continued as it stands, without a template: text of special tokens
        in it means those tokens. `speculate` is as for `load`, whose value it defaults to.
        `sampling` holds fields of `SamplingParams`; those of the model's own `sampling` and then
        the usual defaults stand for the others.
        Errors: UsageError for a bad option or a prompt longer than the context.
        """
        return self._start(self._encoder(prompt, system, raw), max_tokens, speculate, sampling)

    def generate_batch(
        self,
        requests: Iterable[BatchRequest | str],
        *,
        batch_size: int | None = None,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int | None = None,
        **sampling: Any,
    ) -> Batch:
        """Answers many prompts, several in each pass over the weights: see `Batch`.

        Iterating it yields an item each time that it has a further token or has ended, or cannot be
        answered. `sampling` is each reply's own. Errors: UsageError for a bad option.
        """
        from .batch import Batch, BatchRequest
        from .sampling import params_of

        params_of(sampling)

        def start(request: BatchRequest, host: Host) -> Generation:
            own = system if request.system is None else request.system
            most = max_tokens if request.max_tokens is None else request.max_tokens
            encode, given = self._encoder(request.prompt, own, raw), sampling | request.sampling
            guesses = None if host.llm is self.llm else 0  # a shared pass has no rows for them
            return self._start(encode, most, guesses, given, host=host)

        whole = (BatchRequest(r) if isinstance(r, str) else r for r in requests)
        return Batch(self, start, whole, batch_size)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        speculate: int | None = None,
        make_room: MakeRoom | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answers a conversation of {"role", "content"} messages.

        When it no longer fits the context, `make_room` may return a shorter one, again and again,
        also in the middle of the reply, which then goes on. Errors: as for `generate`.
        """

        def shorten() -> list[int] | None:
            shorter = make_room() if make_room else None
            return None if shorter is None else self._encode_chat(shorter)

        return self._start(
            lambda: self._encode_chat(messages), max_tokens, speculate, sampling, shorten
        )

    def render(self, prompt: str, *, system: str | None = None, raw: bool = False) -> str:
        """The text that `generate` with the same arguments makes the model read."""
        if raw:
            return prompt
        return self.render_chat(_conversation(prompt, system))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text that `chat` makes the model read: the messages in the chat template."""
        from .tokenizer import render_chat

        return render_chat(self.tokenizer, messages)

    def close(self) -> None:
        """Ends a reply under way and frees the model; using it afterwards is a UsageError."""
        active = self._active() if self._active else None
        if active is not None:
            active.stop()
        with self._lock:
            if not self._closed:
                self._closed = True
                self.llm.close()
                if self.draft is not None:
                    self.draft.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def claim(self, work: Work) -> Iterator[None]:
        """Holds the model for one step of `work`; UsageError if another thread uses it."""
        busy = UsageError(
            f"{self.name} is already generating in another thread: "
            "wait for that reply, stop() it, or load the model a second time"
        )
        if not self._lock.acquire(blocking=False):
            raise busy
        try:
            if self._closed:
                raise UsageError(f"{self.name} is closed: load it again")
            active = self._active() if self._active else None
            if active is not None and active is not work:
                if not active.abandoned:
                    raise busy
                active.finish("interrupted")
            work.owner = threading.current_thread()
            self._active = weakref.ref(work)
            yield
        finally:
            self._lock.release()

    def _start(
        self,
        encode: Callable[[], list[int]],
        max_tokens: int | None,
        speculate: int | None,
        sampling: Mapping[str, Any],
        shorten: Callable[[], list[int] | None] = lambda: None,
        host: Host | None = None,
    ) -> Generation:
        from .sampling import params_of

        params = params_of({**self.sampling, **sampling})
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}: it must be at least 1")
        asked = self.speculate if speculate is None else speculate
        guesses = guesses_a_pass(self.llm, asked, self.draft is not None)
        started = perf_counter()
        ids = encode()
        if not ids:
            raise UsageError("the prompt is empty: give at least one character")
        encode_s = perf_counter() - started
        return Generation(host or self, ids, params, max_tokens, shorten, encode_s, guesses)

    def _encoder(
        self, prompt: str | Sequence[Mapping[str, str]], system: str | None, raw: bool
    ) -> Callable[[], list[int]]:
        """What gives the ids of a prompt, or of a conversation, which has its own system prompt."""
        if raw and system is not None:
            raise UsageError("--system needs the chat template that --raw leaves out")
        if not isinstance(prompt, str):
            return lambda: self._encode_chat(prompt)
        messages = _conversation(prompt, system)
        return lambda: self._encode_raw(prompt) if raw else self._encode_chat(messages)

    def _encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        from .tokenizer import encode_chat

        return encode_chat(self.tokenizer, messages)

    def _encode_raw(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt, special=True)
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids


def _conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]
