"""Guesses that are checked several a pass: the same text in fewer passes, whoever guessed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from guessing import RuleLLM, begin, by_hash, decoded, decoder, reciting, token_by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import refusal

from onnxstream_nb.drafting import MOST_GUESSES, guesses_a_pass
from onnxstream_nb.errors import Interrupted, ModelError, UsageError
from onnxstream_nb.sampling import SamplingParams
from onnxstream_nb.speculation import common_prefix

GREEDY = SamplingParams(temperature=0)
SAMPLED = [
    SamplingParams(seed=5),
    SamplingParams(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=6),
    SamplingParams(seed=7, repeat_penalty=1.4, frequency_penalty=0.3, penalty_window=5),
    SamplingParams(temperature=0, presence_penalty=1.0, penalty_window=-1, logit_bias={2: 1.5}),
]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2], [1, 2]) == 2
    assert common_prefix([1, 2, 3], [1, 9, 3]) == 1 and common_prefix([1], [1, 2]) == 1


# -- the same text


@pytest.mark.parametrize("params", [GREEDY, *SAMPLED], ids=range(5))
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("guesses", [1, 3, 7])
def test_ngrams_change_nothing(guesses: int, order: int, params: SamplingParams) -> None:
    """Not even with chance at work: a guess is compared with what the sampler draws anyway."""
    llm = RuleLLM(by_hash(10, order), 10)
    wanted = token_by_token(llm, params, PROMPT, 60)
    llm.close()
    made = decoder(llm, params, guesses)
    assert decoded(made, PROMPT, 60) == wanted
    assert made.drafted >= made.accepted >= 0
    assert made.passes == 59 - made.accepted
    assert max(map(len, llm.fed[-made.passes :])) <= 1 + guesses


@pytest.mark.parametrize("draft_order", [1, 2])
@pytest.mark.parametrize("guesses", [0, 7])
def test_a_greedy_text_with_a_draft_model(guesses: int, draft_order: int) -> None:
    """Good drafts and bad ones, with the text's own guesses and without."""
    rule = by_hash(10, 2)
    wanted = token_by_token(RuleLLM(rule, 10), GREEDY, PROMPT, 80)
    draft = RuleLLM(rule if draft_order == 2 else by_hash(10, 1, seed=9), 10)
    made = decoder(RuleLLM(rule, 10), GREEDY, guesses, draft)
    assert decoded(made, PROMPT, 80) == wanted
    if draft_order == 2:
        assert made.accepted == made.drafted and made.passes == 10
        assert draft.passes < 80  # what was accepted is not read again


def test_penalties_are_those_of_each_position() -> None:
    """The model would repeat its first guess for ever; the penalty of the tokens before forbids."""
    params = SamplingParams(temperature=0, frequency_penalty=30, penalty_window=-1)
    llm = RuleLLM(lambda text: [20, 10, 0, -10, -20], 5)
    wanted = token_by_token(llm, params, [0, 1], 12)
    assert len({token for token, _ in wanted}) == 5
    made = decoder(RuleLLM(llm.rule, 5), params, 7, RuleLLM(llm.rule, 5))
    assert decoded(made, [0, 1], 12) == wanted
    assert made.accepted > 6


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 2), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_any_small_model(seed: int, vocab: int, order: int, count: int) -> None:
    rule, other = by_hash(vocab, order, seed, 1.0), by_hash(vocab, 1, seed + 1, 1.0)
    for params in (GREEDY, SamplingParams(seed=seed)):
        wanted = token_by_token(RuleLLM(rule, vocab), params, [0, 1], count)
        assert decoded(decoder(RuleLLM(rule, vocab), params, 7), [0, 1], count) == wanted
    made = decoder(RuleLLM(rule, vocab), GREEDY, 3, RuleLLM(other, vocab))
    assert decoded(made, [0, 1], count) == token_by_token(
        RuleLLM(rule, vocab), GREEDY, [0, 1], count
    )


def test_a_seed_gives_one_text_with_a_draft_model() -> None:
    rule, other = by_hash(20, 2, 0, 1.0), by_hash(20, 2, 1, 1.0)

    def ids(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.2, top_k=0, seed=seed)
        made = decoder(RuleLLM(rule, 20), params, 7, RuleLLM(other, 20))
        return [token for token, _ in decoded(made, PROMPT, 50)]

    assert ids(1) == ids(1) != ids(2)


# -- in fewer passes


def test_a_text_that_repeats() -> None:
    verse = [int(i) for i in np.random.default_rng(0).permutation(50)]
    text = verse * 4
    made = decoder(RuleLLM(reciting(text, 50), 50), GREEDY, 7)
    ids = [token for token, _ in decoded(made, text[:60], 140)]
    assert ids == text[60:]
    assert made.passes <= 139 / 8 + 2 and made.accepted == made.drafted


def test_a_text_that_does_not_repeat() -> None:
    """Nothing is guessed where no token comes twice, and next to nothing where guesses fail."""
    text = [int(i) for i in np.random.default_rng(0).permutation(400)]
    made = decoder(RuleLLM(reciting(text, 400), 400), GREEDY, 7)
    decoded(made, text[:100], 300)
    assert (made.passes, made.drafted) == (299, 0)
    noise = [int(i) for i in np.random.default_rng(1).integers(0, 40, 1000)]
    made = decoder(RuleLLM(reciting(noise, 40), 40), GREEDY, 7)
    decoded(made, noise[:100], 900)
    assert made.passes == 899 - made.accepted > 800
    assert made.drafted < 0.4 * made.passes
    llm = RuleLLM(reciting(noise, 40), 40, streams=False)
    in_memory = decoder(llm, GREEDY, 7)
    decoded(in_memory, noise[:100], 900)
    assert in_memory.drafted < 0.03 * in_memory.passes


def test_a_bad_draft_model_is_asked_for_one_token() -> None:
    text = [int(i) for i in np.random.default_rng(0).permutation(200)]
    llm = RuleLLM(reciting(text, 200), 200)
    made = decoder(llm, GREEDY, 0, RuleLLM(lambda so_far: np.eye(200)[0], 200))
    decoded(made, text[:50], 150)
    assert made.accepted == (0 in text[51:]) and made.passes == 149 - made.accepted
    assert [len(ids) for ids in llm.fed[-50:-1]] == [2] * 49


def test_the_text_is_asked_first_where_it_knows_more() -> None:
    verse = [int(i) for i in np.random.default_rng(0).permutation(50)]
    text = verse * 4
    draft = RuleLLM(lambda so_far: np.eye(50)[0], 50)
    made = decoder(RuleLLM(reciting(text, 50), 50), GREEDY, 7, draft)
    decoded(made, text[:60], 140)
    assert made.passes <= 139 / 8 + 5 and draft.passes < 5


def test_no_room_for_guesses() -> None:
    """Nothing is read that could not be said: the last token is never fed, nor is one beyond it."""
    llm = RuleLLM(lambda text: [9, 0], 2)
    made = decoder(llm, GREEDY, 7)
    decoded(made, [0, 0, 0], 5)
    assert [len(ids) for ids in llm.fed] == [3, 4]
    llm = RuleLLM(lambda text: [9, 0], 2)
    made = decoder(llm, GREEDY, 7, RuleLLM(lambda text: [9, 0], 2))
    begin(made, [0, 0])
    for _ in range(4):
        made.next(0, None)
    assert [len(ids) for ids in llm.fed] == [2, 1, 1, 1] and made.drafted == 0


# -- the cache


def test_beginning_anew() -> None:
    """What was guessed of one text is not of the next."""
    llm = RuleLLM(by_hash(10, 2), 10)
    made = decoder(llm, GREEDY, 7)
    decoded(made, PROMPT, 20)
    passes = made.passes
    begin(made, PROMPT)
    while not made.drafted or len(llm.tokens) < len(made.text):
        made.next(50, None)
    wanted = token_by_token(RuleLLM(llm.rule, 10), GREEDY, [1, 2, 9, 9], 20)
    assert decoded(made, [1, 2, 9, 9], 20) == wanted
    assert made.passes > passes


def test_a_stop_leaves_nothing_but_the_text() -> None:
    stop = threading.Event()
    llm, draft = RuleLLM(by_hash(10, 2), 10), RuleLLM(by_hash(10, 2), 10)
    made = decoder(llm, GREEDY, 7, draft)
    begin(made, PROMPT)
    for _ in range(12):
        made.next(50, stop)
    stop.set()
    with pytest.raises(Interrupted):
        for _ in range(9):
            made.next(50, stop)
    made.forget_guesses()
    assert llm.tokens == made.text[:-1]
    wanted = token_by_token(RuleLLM(llm.rule, 10), GREEDY, PROMPT, 40)
    for token, _ in wanted[len(made.text) - len(PROMPT) :]:
        assert made.next(50, None)[0] == token


# -- draft models that do not fit


def test_a_draft_model_whose_context_is_shorter() -> None:
    rule = by_hash(10, 2)
    wanted = token_by_token(RuleLLM(rule, 10), GREEDY, PROMPT, 60)
    for context in (1, 8, 9, 30):
        llm, draft = RuleLLM(rule, 10), RuleLLM(rule, 10, context=context)
        made = decoder(llm, GREEDY, 0, draft)
        assert decoded(made, PROMPT, 60) == wanted
        # the guess after a draft cache that is full is the last
        assert made.accepted == made.drafted <= max(0, context - len(PROMPT))
        assert (made.drafted > 0) == (context > len(PROMPT))
    made = decoder(RuleLLM(rule, 10), GREEDY, 7, RuleLLM(rule, 10, context=9))
    assert decoded(made, PROMPT, 60) == wanted
    assert made.drafted > 10  # by the text


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, min_p=0, top_k=0, top_p=1)])
@pytest.mark.parametrize("vocab", [7, 13])
def test_a_draft_model_whose_logits_are_padded(vocab: int, params: SamplingParams) -> None:
    """Ids that only one of the two models has are not guessed, whatever it thinks of them."""
    own = by_hash(10, 2)

    def rule(text: Sequence[int]) -> list[float]:
        logits = [*own(text), *([50.0] * 9)]
        return logits[:vocab]

    llm = RuleLLM(own, 10)
    made = decoder(llm, params, 0, RuleLLM(rule, vocab))
    begin(made, [0])
    for _ in range(40):
        made.next(50, None)
    assert all(token < 10 for token in made.text)
    unknown = next((i for i, token in enumerate(made.text) if token >= vocab), 40)
    assert made.drafted >= min(unknown, 40 / 8) and (vocab > 10 or unknown < 40)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_draft_model_that_overflows(wrong: float) -> None:
    made = decoder(RuleLLM(by_hash(4, 1), 4), GREEDY, 0, RuleLLM(lambda text: [wrong] * 4, 4))
    begin(made, [0])
    made.next(9, None)
    message = refusal(lambda: made.next(9, None), ModelError)
    assert "--draft" in message and "not finite" in message


# -- settings


def test_how_many_guesses() -> None:
    streamed, kept = RuleLLM(by_hash(4, 1), 4), RuleLLM(by_hash(4, 1), 4, streams=False)
    assert guesses_a_pass(streamed, None, False) == guesses_a_pass(streamed, None, True) == 7
    assert guesses_a_pass(kept, None, False) == guesses_a_pass(kept, None, True) == 0
    for asked in (0, 3, MOST_GUESSES):
        assert guesses_a_pass(streamed, asked, False) == asked
        assert guesses_a_pass(kept, asked, True) == asked
    for asked in (-1, MOST_GUESSES + 1):
        assert "--speculate" in refusal(lambda n=asked: guesses_a_pass(kept, n, False), UsageError)


def test_a_graph_that_gives_its_last_logits_only() -> None:
    cut = RuleLLM(by_hash(4, 1), 4)
    cut.every_position = False
    assert guesses_a_pass(cut, None, False) == guesses_a_pass(cut, 0, False) == 0
    assert "--speculate" in refusal(lambda: guesses_a_pass(cut, 1, False), UsageError)
    assert "--draft" in refusal(lambda: guesses_a_pass(cut, None, True), UsageError)
