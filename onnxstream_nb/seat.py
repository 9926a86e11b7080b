"""One reply of a batch: what was asked, what has come of it, and where its logits come from.

The reply itself is a `Generation`, which here is given its logits instead of computing them.
Dims: V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .errors import OnnxstreamError
from .generation import Generation, Stats, Token
from .work import Work

if TYPE_CHECKING:
    from .llm import LanguageModel, Logits
    from .sequences import Strand
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class BatchRequest:
    """A prompt, or the messages of a conversation; what is None is as for the whole batch.
    `sampling` holds fields of `SamplingParams` that differ from the batch's."""

    prompt: str | Sequence[Mapping[str, str]]
    system: str | None = None
    max_tokens: int | None = None
    id: str | int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


class BatchItem:
    """A request and what has become of it: `index` counts from 0, `tokens` are those of the reply
    so far, `error` why there are none, or no more."""

    def __init__(self, request: BatchRequest, index: int) -> None:
        self.request, self.index = request, index
        self.tokens: list[Token] = []
        self.generation: Generation | None = None
        self.error: OnnxstreamError | None = None
        self.is_stopped = False

    @property
    def text(self) -> str:
        """The reply so far."""
        return "".join(token.text for token in self.tokens)

    @property
    def stop_reason(self) -> str:
        """As `Stats.stop_reason`, or "error"; empty while it is waiting or under way."""
        if self.error is not None:
            return "error"
        if self.generation is not None and self.generation.stats.stop_reason:
            return self.generation.stats.stop_reason
        return "interrupted" if self.is_stopped and self.generation is None else ""

    @property
    def done(self) -> bool:
        """True when nothing more will come."""
        return bool(self.stop_reason)

    def stop(self) -> None:
        """Ends this reply, with stop reason "interrupted"; callable from any thread."""
        self.is_stopped = True
        if self.generation is not None:
            self.generation.stop()


class Seat:
    """A reply under way, and what it takes for its language model: logits that are there already.

    `strand` is its sequence; None where the reply has the model to itself, which then computes.
    `tokens` are the ids whose logits it has been given, `positions` and `nbytes` what its cache may
    come to take.
    """

    def __init__(self, item: BatchItem, llm: LanguageModel) -> None:
        self.item, self.positions, self.nbytes = item, 0, 0
        self.strand: Strand | None = None
        self.logits: Logits | None = None
        self._llm = llm
        self._read: list[int] = []
        self._started = self._first = 0.0

    @property
    def tokens(self) -> list[int]:
        """The ids that came before the last logits, in order."""
        return self._llm.tokens if self.strand is None else self._read

    def __getattr__(self, name: str) -> Any:
        """What else a reply asks of its model is the model's own."""
        return getattr(self._llm, name)

    def feed(self, ids: Sequence[int], stop: threading.Event | None = None) -> Logits:
        """The logits (V,) after `ids`, which the batch has read."""
        if self.strand is None:
            return self._llm.feed(ids, stop)
        logits, self.logits = self.logits, None
        self._read += ids
        assert logits is not None and len(self.strand.tokens) == len(self._read)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if self.strand is None:
            self._llm.rewind(length)
        elif length < len(self._read):
            del self._read[length:]
            self.strand.rewind(length)

    def begin(self, strand: Strand | None) -> None:
        """Take a sequence, or the model itself, and let it read the prompt."""
        assert self.item.generation is not None
        self._started, self.strand = perf_counter(), strand
        if strand is None:
            self._llm.rewind(0)  # what others have left there would cut the prompt elsewhere
        else:
            strand.waiting = list(self.item.generation.prompt_ids)

    def take(self) -> None:
        """The reply's next token, or its end."""
        item, generation = self.item, self.item.generation
        assert generation is not None
        try:
            token = next(generation)
        except StopIteration:
            return
        except OnnxstreamError as error:
            item.error = error
            return
        item.tokens.append(token)
        if self.strand is not None:
            self.strand.waiting = [token.id]
            self._count_time(generation.stats)

    def _count_time(self, stats: Stats) -> None:
        """Passes that are shared count in full for each reply."""
        now = perf_counter()
        if len(self.item.tokens) == 1:
            stats.prefill_s, self._first = now - self._started, now
            stats.ttft_s += stats.prefill_s
        stats.decode_s = now - self._first


@dataclass
class Place:
    """A `Host` for a reply of a batch, which has claimed the model for all of them."""

    tokenizer: Tokenizer
    llm: Any
    draft: LanguageModel | None
    context: int
    load_s: float

    def claim(self, work: Work) -> AbstractContextManager[None]:
        """Nothing is left to claim."""
        return nullcontext()
