"""One reply of a language model: a lazy iterator of tokens, its limits, and what it cost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from .errors import Interrupted, UsageError
from .progress import ReplyProgress
from .work import Work

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from .llm import LanguageModel
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer


class Host(Protocol):
    """What a reply needs of its model, and of the draft model beside it if there is one."""

    tokenizer: Tokenizer
    llm: LanguageModel
    draft: LanguageModel | None
    context: int
    load_s: float

    def claim(self, work: Work) -> AbstractContextManager[None]:
        """Holds the model for one step of `work`; UsageError if another thread uses it."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text` may be empty while a character or a stop string is undecided;
    `logprob` is the natural logarithm of its probability in the model's own distribution."""

    text: str
    id: int
    logprob: float


@dataclass(slots=True)
class Stats:
    """What one reply cost: tokens, seconds, and the process's peak resident memory in 10^6 bytes.

    `prompt_tokens` counts the whole prompt, `cached_tokens` those of it that were still in the
    cache. `completion_tokens` counts the token that ended the reply. `ttft_s` runs from the call
    to the first token. `decode_s` is the time inside the model after the first token, `passes` are
    those over the weights: one a token, fewer where guesses were read with it (`drafted`) and were
    right (`accepted`). `bytes_read` were streamed from disk for it; `gpu_bytes` of
    weights lay on a GPU when it ended.
    `stop_reason` is eos, stop, length, context or interrupted, and empty while generating.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    load_s: float = 0.0
    bytes_read: int = 0
    gpu_bytes: int = 0
    peak_rss_mb: float = 0.0
    stop_reason: str = ""

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens read per second, cached ones not counted; 0.0 when nothing was read."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first one; 0.0 when there was only one."""
        later = self.completion_tokens - 1
        return later / self.decode_s if later > 0 and self.decode_s > 0 else 0.0

    @property
    def read_bps(self) -> float:
        """Bytes streamed a second of reading the prompt and writing; 0.0 when there were none."""
        seconds = self.prefill_s + self.decode_s
        return self.bytes_read / seconds if seconds > 0 else 0.0


class Generation(Work, Iterator[Token]):
    """One reply: iterate it for its tokens. `stats` fills as it goes, `stop()` ends it; `params`
    are the SamplingParams that it is drawn with.

    Text that was held back (half a character, the beginning of a stop string) comes with the last
    token; a stopped reply drops it. `guesses` is how many tokens the text may propose a pass.
    """

    def __init__(
        self,
        model: Host,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int | None,
        shorten: Callable[[], list[int] | None],
        encode_s: float = 0.0,
        guesses: int = 0,
    ) -> None:
        from .sampling import Sampler
        from .speculation import Decoder
        from .tokenizer import StopStrings

        self.params, self.stats = params, Stats(load_s=model.load_s)
        self.prompt_ids = list(prompt)
        self.ids: list[int] = []
        self._model = model
        self._max_tokens = max_tokens
        self._shorten = shorten
        self._encode_s = encode_s
        self._stop = threading.Event()
        self._decoder = Decoder(model.llm, Sampler(params), guesses, model.draft)
        self._stream = model.tokenizer.stream()
        self._stops = StopStrings(params.stop)
        self._in_step = False  # whether the decoder has the text as it is now
        self._fit_prompt()

    def stop(self) -> None:
        """Ends the reply with stop reason "interrupted"; callable from any thread, at any time."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """True when no further token will come."""
        return bool(self.stats.stop_reason) or self._stop.is_set()

    def progress(self) -> ReplyProgress:
        """How far the reply is, for whoever looks from another thread.

        What is left counts the context as it stands: where old turns make room, more may come.
        """
        llm, written = self._model.llm, len(self.ids)
        left = self._model.context - len(llm.tokens)
        if self._max_tokens is not None:
            left = min(left, self._max_tokens - written)
        mean = self.stats.decode_s / (written - 1) if written > 1 else None
        return ReplyProgress(llm.reading(), written, left, mean)

    @property
    def most_positions(self) -> int:
        """How many positions of the context it may come to fill."""
        context = self._model.context
        if self._max_tokens is None:
            return context
        return min(context, len(self.prompt_ids) + self._max_tokens)

    def finish(self, reason: str) -> None:
        """Marks the reply as ended for `reason`, unless it has ended already."""
        if not self.stats.stop_reason:
            self._decoder.forget_guesses()
            self.stats.stop_reason = reason
            self.stats.peak_rss_mb = _peak_rss_mb()
            self.stats.gpu_bytes = self._model.llm.gpu_bytes

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Token:
        with self._model.claim(self):
            if self.stats.stop_reason:
                raise StopIteration
            read_before = self._model.llm.bytes_streamed
            try:
                return self._step()
            except Interrupted:
                self.finish("interrupted")
                raise StopIteration from None
            except BaseException:
                self.finish("interrupted")
                raise
            finally:
                self.stats.bytes_read += self._model.llm.bytes_streamed - read_before

    def _step(self) -> Token:
        started = perf_counter()
        if self._stop.is_set():
            raise Interrupted("the reply was stopped")
        token_id, logprob = self._draw()
        drawn = perf_counter()
        first = not self.ids
        token = self._take(token_id, logprob)
        decoder, stats = self._decoder, self.stats
        stats.completion_tokens, stats.passes = len(self.ids), decoder.passes
        stats.drafted, stats.accepted = decoder.drafted, decoder.accepted
        if first:
            stats.prefill_s = drawn - started
            stats.ttft_s = self._encode_s + perf_counter() - started
        else:
            stats.decode_s += perf_counter() - started
        return token

    def _draw(self) -> tuple[int, float]:
        if not self._in_step:
            self._read()
        decoder = self._decoder
        room = self._model.context - len(decoder.text)
        if self._max_tokens is not None:
            room = min(room, self._max_tokens - len(self.ids) - 1)
        return decoder.next(room, self._stop)

    def _read(self) -> None:
        """Reads what the cache lacks of the prompt, and of the reply where that was shortened."""
        from .speculation import common_prefix

        llm, text = self._model.llm, self.prompt_ids + self.ids
        known = common_prefix(llm.tokens, text[:-1])
        if not self.ids:
            self.stats.prompt_tokens, self.stats.cached_tokens = len(text), known
        llm.rewind(known)
        self._decoder.begin(text, llm.feed(text[known:], self._stop))
        self._in_step = True

    def _take(self, token_id: int, logprob: float) -> Token:
        """Decides whether a token is the last one."""
        tokenizer = self._model.tokenizer
        self.ids.append(token_id)
        if token_id in tokenizer.eos_ids:
            text, reason = "", "eos"
        else:
            text, stopped = self._stops.push(self._stream.push(token_id))
            reason = "stop" if stopped else self._limit()
        if reason and reason != "stop":
            text += self._held_text()
        if reason:
            self.finish(reason)
        return Token(text, token_id, logprob)

    def _limit(self) -> str:
        if len(self.ids) == self._max_tokens:
            return "length"
        if len(self._decoder.text) <= self._model.context or self._make_room():
            return ""
        return "context"

    def _held_text(self) -> str:
        text, stopped = self._stops.push(self._stream.flush())
        return text if stopped else text + self._stops.flush()

    def _fit_prompt(self) -> None:
        """Shortens the conversation until a quarter of the context is left for the reply."""
        context = self._model.context
        reserve = min(self._max_tokens or context, context // 4)
        if len(self.prompt_ids) > context - reserve:
            self._make_room()
        if len(self.prompt_ids) > context:
            raise UsageError(
                f"the prompt has {len(self.prompt_ids)} tokens and the context holds {context}: "
                "shorten the prompt or raise --context"
            )

    def _make_room(self) -> bool:
        """Drops old turns until a quarter of the context is free; False if that freed nothing."""
        context = self._model.context
        while len(self.prompt_ids) + len(self.ids) > context - context // 4:
            shorter = self._shorten()
            if shorter is None:
                break
            self.prompt_ids, self._in_step = shorter, False
        return len(self.prompt_ids) + len(self.ids) <= context


def _peak_rss_mb() -> float:
    from .device import peak_rss

    return peak_rss() / 1e6
