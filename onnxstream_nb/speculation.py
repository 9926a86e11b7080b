"""Several tokens a pass over the weights: guess what comes next, and check the guesses together.

A pass that reads the last token and k guesses gives the logits after each of them. The first tells
whether the first guess was right, and so on; of the first wrong one what follows is forgotten. The
text is the very same as token by token, or as likely: see `Sampler.next_or_guess`. (Leviathan et
al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.)

Guesses come from the text itself (Saxena 2023, "Prompt Lookup Decoding") or from a smaller model.
Dims: V vocabulary.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .drafting import MOST_GUESSES
from .errors import ModelError
from .sampling import Distribution, Sampler, log_sum_exp

if TYPE_CHECKING:
    from .llm import LanguageModel, Logits

LONGEST = 4  # tokens at the end of the text that are looked for before
RATE = 1 / 8  # of the newest guess, in how often guesses were right
WORTH_STREAMED = 1 / 16  # least chance of a guess that is worth its part of a pass, which
WORTH_IN_PLACE = 1 / 3  # waits for the disk, or computes


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next, and the chance that it and those before it are right.

    `drawn_from` is the distribution it was drawn from, None when it was no matter of chance.
    """

    id: int
    chance: float
    drawn_from: Distribution | None = None


class NGrams:
    """Guesses that the text goes on as it did after the same tokens, where they were last.

    How often that is right is known for each number of equal tokens, 1 to LONGEST, from what came
    in the end, guessed or not.
    """

    def __init__(self) -> None:
        self._rates = [0.0, 0.25, 0.5, 0.7, 0.8]  # by equal tokens, until it is known better
        self._ids = array("q")
        self._expected: tuple[int, int, int] | None = None

    def begin(self) -> None:
        """Forget the text, not how often guesses were right."""
        self._ids, self._expected = array("q"), None

    def guess(self, text: Sequence[int], most: int, worth: float) -> list[Guess]:
        """What may follow `text`, up to `most` tokens, each with a chance of at least `worth`."""
        self._learn(text)
        self._ids.extend(text[len(self._ids) :])
        guesses: list[Guess] = []
        self._expected = found = self._last_match()
        if found is None:
            return guesses
        end, at, equal = found
        chance = self._rates[equal]
        while len(guesses) < most and chance >= worth:
            beyond = at - end  # a period that reaches the end goes on with its own guesses
            guesses.append(Guess(text[at] if beyond < 0 else guesses[beyond].id, chance))
            at, equal = at + 1, min(equal + 1, LONGEST)
            chance *= self._rates[equal]
        return guesses

    def _learn(self, text: Sequence[int]) -> None:
        """Compare what came with what was expected, up to the first difference."""
        if self._expected is None:
            return
        end, at, equal = self._expected
        for token in text[end:]:
            right = token == text[at]
            self._rates[equal] += RATE * (right - self._rates[equal])
            if not right:
                return
            at, equal = at + 1, min(equal + 1, LONGEST)

    def _last_match(self) -> tuple[int, int, int] | None:
        """(length of the text, place after the last equal tokens before its end, how many)."""
        ids = np.frombuffer(self._ids, np.int64)
        end = len(ids)
        (places,) = np.nonzero(ids[: end - 1] == ids[end - 1])
        places += 1
        equal = 1
        while places.size and equal < LONGEST:
            longer = places[places > equal]
            longer = longer[ids[longer - equal - 1] == ids[end - equal - 1]]
            if not longer.size:
                break
            places, equal = longer, equal + 1
        return (end, int(places[-1]), equal) if places.size else None


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would say, drawn as `sampler` draws.

    `vocab_size` is the checked model's V, 0 if unknown; `rate` how often guesses were right.
    """

    def __init__(self, llm: LanguageModel, sampler: Sampler, vocab_size: int) -> None:
        self.rate = 0.7
        self._llm, self._sampler, self._vocab_size = llm, sampler, vocab_size

    def guess(
        self, text: Sequence[int], most: int, worth: float, stop: threading.Event | None
    ) -> list[Guess]:
        """What may follow `text`, at least one token while the draft model's context lasts, then
        each with a chance of at least `worth`. Raises ModelError when its logits are no numbers."""
        llm, ids = self._llm, list(text)
        guesses: list[Guess] = []
        llm.rewind(common_prefix(llm.tokens, text[:-1]))
        if 0 < llm.vocab_size <= max(ids[len(llm.tokens) :]):
            return guesses  # an id that pads the checked model's vocabulary
        chance = self.rate
        while len(guesses) < most and len(ids) <= llm.context and (not guesses or chance >= worth):
            logits = self._fitted(llm.feed(ids[len(llm.tokens) :], stop))
            drawn_from = self._sampler.distribution(logits, ids)
            guesses.append(Guess(self._sampler.draw(drawn_from), chance, drawn_from))
            ids.append(guesses[-1].id)
            chance *= self.rate
        return guesses

    def learn(self, right: bool) -> None:
        """Take in whether a guess of its own was right."""
        self.rate += RATE * (right - self.rate)

    def _fitted(self, logits: Logits) -> Logits:
        """The logits of the checked model's vocabulary: ids that pad only one of them are out."""
        try:
            log_sum_exp(logits)
        except ModelError as error:
            raise ModelError(f"the draft model (--draft) is unusable: {error}") from error
        size = self._vocab_size or logits.size
        missing = max(0, size - logits.size)
        return np.pad(logits[:size], (0, missing), constant_values=-np.inf)


class Decoder:
    """A text that a language model continues, token by token, in as few passes as guesses allow.

    `text` is what was read and written so far; the cache of `llm` holds it without the last token
    written, and guesses that are not refuted yet. `guesses` is how many the text may give a pass
    (0: none), `draft` a model for what the text does not tell. `drafted` counts guesses that were
    read, `accepted` those that were right.
    """

    def __init__(
        self,
        llm: LanguageModel,
        sampler: Sampler,
        guesses: int = 0,
        draft: LanguageModel | None = None,
    ) -> None:
        self.text: list[int] = []
        self.drafted = self.accepted = 0
        self._llm, self._sampler, self._most = llm, sampler, guesses
        self._worth = WORTH_STREAMED if llm.streams else WORTH_IN_PLACE
        self._ngrams = NGrams() if guesses else None
        self._draft = DraftModel(draft, sampler, llm.vocab_size) if draft is not None else None
        self._rows: deque[tuple[Logits, Guess | None]] = deque()
        self._first_pass: int | None = None

    @property
    def passes(self) -> int:
        """Passes over the weights since the first token."""
        return 0 if self._first_pass is None else self._llm.passes - self._first_pass

    def begin(self, text: Sequence[int], logits: Logits) -> None:
        """Go on from `text`, which the cache holds, and the logits (V,) that follow it."""
        self.text = list(text)
        self._rows.clear()
        self._rows.append((logits, None))
        if self._ngrams is not None:
            self._ngrams.begin()
        if self._first_pass is None:
            self._first_pass = self._llm.passes

    def next(self, room: int, stop: threading.Event | None) -> tuple[int, float]:
        """The next token, now the last of `text`, and the natural logarithm of its probability.

        At most `room` further ones are guessed with it. Raises as `LanguageModel.feed`.
        """
        if not self._rows:
            self._read(room, stop)
        logits, guess = self._rows.popleft()
        if guess is None or guess.drawn_from is None:
            token, logprob = self._sampler.next(logits, self.text)
        else:
            token, logprob = self._sampler.next_or_guess(
                logits, self.text, guess.id, guess.drawn_from
            )
        self.text.append(token)
        if guess is not None:
            self._judge(guess, token == guess.id)
        return token, logprob

    def forget_guesses(self) -> None:
        """Take back from the cache what was read beyond the text."""
        self._rows.clear()
        if 0 < len(self.text) <= len(self._llm.tokens):
            self._llm.rewind(len(self.text) - 1)

    def _judge(self, guess: Guess, right: bool) -> None:
        self.accepted += right
        if guess.drawn_from is not None and self._draft is not None:
            self._draft.learn(right)
        if not right:
            self.forget_guesses()

    def _read(self, room: int, stop: threading.Event | None) -> None:
        """One pass over the last token and guesses."""
        last, guesses = self.text[-1:], self._guesses(room, stop)
        if guesses:
            logits = self._llm.logits([*last, *(guess.id for guess in guesses)], stop)
            self.drafted += len(guesses)
            self._rows.extend(zip(logits, [*guesses, None], strict=True))
        else:
            self._rows.append((self._llm.feed(last, stop), None))

    def _guesses(self, room: int, stop: threading.Event | None) -> list[Guess]:
        """From the text, unless the draft model's are more often right."""
        found: list[Guess] = []
        if self._ngrams is not None:
            found = self._ngrams.guess(self.text, min(room, self._most), self._worth)
        if self._draft is None or (found and found[0].chance >= self._draft.rate):
            return found
        most = min(room, MOST_GUESSES)
        return self._draft.guess(self.text, most, self._worth, stop) or found


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)
