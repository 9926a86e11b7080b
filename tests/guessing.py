"""What the tests of speculation share: models that are rules, and decoding token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxstream_nb.errors import Interrupted
from onnxstream_nb.sampling import Sampler, SamplingParams
from onnxstream_nb.speculation import Decoder

Array = np.ndarray[Any, Any]
Rule = Callable[[Sequence[int]], Sequence[float]]
"""A text to the logits of what follows it."""


class RuleLLM:
    """Logits by a rule. `fed` are the ids of each pass; what is read too far is an error."""

    every_position, gpu_bytes = True, 0

    def __init__(self, rule: Rule, vocab: int, context: int = 10_000, streams: bool = True) -> None:
        self.rule, self.vocab_size, self.context, self.streams = rule, vocab, context, streams
        self.tokens: list[int] = []
        self.fed: list[list[int]] = []

    @property
    def passes(self) -> int:
        return len(self.fed)

    def logits(self, ids: Sequence[int], stop: threading.Event | None = None) -> Array:
        assert ids and all(0 <= i < self.vocab_size for i in ids)
        assert len(self.tokens) + len(ids) <= self.context
        if stop is not None and stop.is_set():
            raise Interrupted("stopped")
        self.fed.append(list(ids))
        rows = []
        for i in ids:
            self.tokens.append(i)
            rows.append(np.asarray(self.rule(self.tokens), np.float32))
        return np.stack(rows)

    def feed(self, ids: Sequence[int], stop: threading.Event | None = None) -> Array:
        row: Array = self.logits(ids, stop)[-1]
        return row

    def rewind(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        del self.tokens[length:]

    def close(self) -> None:
        self.tokens.clear()


def by_hash(vocab: int, order: int, seed: int = 0, spread: float = 3.0) -> Rule:
    """Logits at random, but always the same after the same `order` tokens."""

    def rule(text: Sequence[int]) -> Array:
        recent = [t + 1 for t in text[-order:]]
        return spread * np.random.default_rng([seed, *recent]).standard_normal(vocab)

    return rule


def reciting(text: Sequence[int], vocab: int) -> Rule:
    """Logits of a model that says this text, whatever it has been told."""

    def rule(so_far: Sequence[int]) -> Array:
        logits = np.zeros(vocab)
        logits[text[len(so_far)] if len(so_far) < len(text) else 0] = 20
        return logits

    return rule


def token_by_token(
    llm: RuleLLM, params: SamplingParams, prompt: Sequence[int], count: int
) -> list[tuple[int, float]]:
    """(id, logprob) of `count` tokens as plain decoding gives them."""
    sampler, text = Sampler(params), list(prompt)
    llm.rewind(0)
    logits, given = llm.feed(prompt), []
    for _ in range(count):
        given.append(sampler.next(logits, text))
        text.append(given[-1][0])
        logits = llm.feed(text[-1:])
    return given


def decoder(
    llm: RuleLLM, params: SamplingParams, guesses: int = 0, draft: RuleLLM | None = None
) -> Decoder:
    rules: Any = (llm, draft)
    return Decoder(rules[0], Sampler(params), guesses, rules[1])


def begin(made: Decoder, text: Sequence[int]) -> None:
    """Let the model read the text, and the decoder go on from it."""
    made._llm.rewind(0)
    made.begin(text, made._llm.feed(text))


def decoded(made: Decoder, prompt: Sequence[int], count: int) -> list[tuple[int, float]]:
    """The same with guesses; after each token the cache holds the text before it, and guesses."""
    begin(made, prompt)
    given = []
    for i in range(count):
        given.append(made.next(count - i - 1, None))
        read = made._llm.tokens
        assert read[: len(made.text) - 1] == made.text[:-1]
        assert len(read) <= len(prompt) + count - 1
    made.forget_guesses()
    assert made._llm.tokens == made.text[:-1]
    assert made.text == [*prompt, *(token for token, _ in given)]
    return given
