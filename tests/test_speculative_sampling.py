"""Drawing with guesses gives every text its own probability: all outcomes counted, none drawn.

Random numbers are replaced by the middles of n equal parts of [0, 1), every one of them in turn.
Where all shares are multiples of 1 / n, the share of outcomes is the probability, exactly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from guessing import RuleLLM, begin, decoder
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxstream_nb.sampling import Distribution, Sampler, SamplingParams

Shares = Sequence[int]
"""Probabilities as whole parts of their sum."""

PLAIN = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0)


class Outcomes:
    """Stands for a random generator: n equally likely numbers, of which `path` says which come."""

    def __init__(self, parts: int, path: Sequence[int]) -> None:
        self.parts, self.path = parts, list(path)
        self.taken: list[int] = []

    def random(self) -> float:
        at = len(self.taken)
        self.taken.append(self.path[at] if at < len(self.path) else 0)
        return (self.taken[-1] + 0.5) / self.parts


def all_outcomes(run: Callable[[Any], Any], parts: int) -> Iterator[tuple[Any, Fraction]]:
    """What `run` gives with each sequence of random numbers, and how likely that is."""
    path: list[int] = []
    while True:
        random = Outcomes(parts, path)
        yield run(random), Fraction(1, parts ** len(random.taken))
        path = random.taken
        while path and path[-1] == parts - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


def distribution_of(run: Callable[[Any], Any], parts: int) -> dict[Any, Fraction]:
    found: Counter[Any] = Counter()
    for result, share in all_outcomes(run, parts):
        found[result] += share  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


def logits_of(shares: Shares) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([math.log(s) if s else -200.0 for s in shares], np.float32)


def exact(shares: Shares) -> dict[int, Fraction]:
    return {i: Fraction(s, sum(shares)) for i, s in enumerate(shares) if s}


def sampler(random: Any) -> Sampler:
    made = Sampler(PLAIN)
    made._random = random
    return made


def test_all_outcomes_are_met_once() -> None:
    def run(random: Any) -> tuple[float, ...]:
        first = random.random()
        return (first, random.random()) if first > 0.5 else (first,)

    found = distribution_of(run, 2)
    quarter = Fraction(1, 4)
    assert found == {(0.25,): 2 * quarter, (0.75, 0.25): quarter, (0.75, 0.75): quarter}


def drawn(p: Shares, q: Shares, parts: int) -> dict[tuple[int, bool], Fraction]:
    """(token, whether it is the guess) of every guess that q has, checked against p."""
    found: Counter[Any] = Counter()
    for guess, likely in exact(q).items():

        def run(random: Any, guess: int = guess) -> tuple[int, bool]:
            made = sampler(random)
            drawn_from = made.distribution(logits_of(q), [])
            token, _ = made.next_or_guess(logits_of(p), [], guess, drawn_from)
            return token, token == guess

        for result, share in distribution_of(run, parts).items():
            found[result] += likely * share  # type: ignore[assignment]
    return dict(found)  # type: ignore[arg-type]


def parts_for(p: Shares, q: Shares) -> int:
    """A number of parts in which p / q and what p has over q are whole."""
    a, b = sum(p), sum(q)
    beyond = sum(max(x * b - y * a, 0) for x, y in zip(p, q, strict=True))
    return math.lcm(*(a * y for y in q if y), beyond or 1)


CASES = [
    ([1, 1], [1, 1]), ([1, 1], [3, 1]), ([1, 3], [1, 0]), ([0, 1], [1, 1]), ([1, 0], [0, 1]),
    ([4, 2, 1, 1], [1, 1, 4, 2]), ([2, 1, 0, 1], [0, 0, 3, 1]), ([1, 2, 3], [1, 1, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("p", "q"), CASES)
def test_a_guess_leaves_the_distribution_alone(p: Shares, q: Shares) -> None:
    found = drawn(p, q, parts_for(p, q))
    tokens: Counter[int] = Counter()
    for (token, _), share in found.items():
        tokens[token] += share  # type: ignore[assignment]
    assert tokens == exact(p)


@pytest.mark.parametrize(("p", "q"), CASES)
def test_a_guess_is_right_as_often_as_can_be(p: Shares, q: Shares) -> None:
    """In the share that the two distributions have in common (Leviathan et al., theorem 3.5)."""
    found = drawn(p, q, parts_for(p, q))
    right = sum((s for (_, is_guess), s in found.items() if is_guess), Fraction())
    ours, theirs = exact(p), exact(q)
    assert right == sum(min(ours[i], theirs.get(i, Fraction())) for i in ours)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=3))
@settings(deadline=None, max_examples=30)
def test_any_two_distributions(pairs: list[tuple[int, int]]) -> None:
    p, q = ([pair[i] for pair in pairs] for i in (0, 1))
    assume(sum(p) and sum(q) and parts_for(p, q) < 100)
    tokens: Counter[int] = Counter()
    for (token, _), share in drawn(p, q, parts_for(p, q)).items():
        tokens[token] += share  # type: ignore[assignment]
    assert tokens == exact(p)


# -- whole texts


def by_last(*rows: Shares) -> Callable[[Sequence[int]], Any]:
    """A model whose next token depends on the last one, and on how long the text is."""

    def rule(text: Sequence[int]) -> Any:
        return logits_of(rows[(text[-1] + len(text)) % len(rows)])

    return rule


def texts(rule: Callable[[Sequence[int]], Any], start: Sequence[int], count: int) -> Any:
    """The probability of each continuation, by the chain rule."""
    vocab = len(rule(start))
    found = {}
    for ids in product(range(vocab), repeat=count):
        share = Fraction(1)
        for i, token in enumerate(ids):
            weights = np.exp(rule([*start, *ids[:i]]).astype(np.float64))
            share *= Fraction(round(float(weights[token])), round(float(weights.sum())))
        if share:
            found[ids] = share
    return found


@pytest.mark.parametrize("guesses", [0, 7])
@pytest.mark.parametrize(
    ("parts", "count", "own", "others"),
    [
        # p / q is in quarters, and so is what p has over q
        (4, 3, ([2, 1, 1], [1, 0, 3], [2, 2, 0]), ([1, 2, 1], [2, 0, 2], [4, 0, 0])),
        (2, 5, ([1, 1], [2, 0], [1, 1]), ([2, 0], [1, 1], [0, 2])),
    ],
)
def test_every_text_keeps_its_probability(
    parts: int, count: int, own: Sequence[Shares], others: Sequence[Shares], guesses: int
) -> None:
    """With a draft model that is often wrong, and with guesses of the text itself beside it."""
    rule, start = by_last(*own), [1, 0, 1]
    seen: Counter[str] = Counter()

    def run(random: Any) -> tuple[int, ...]:
        vocab = len(own[0])
        draft = RuleLLM(by_last(*others), vocab)
        made = decoder(RuleLLM(rule, vocab), PLAIN, guesses, draft)
        made._sampler._random = random
        begin(made, start)
        ids = tuple(made.next(count - i - 1, None)[0] for i in range(count))
        seen.update(right=made.accepted, wrong=made.drafted > made.accepted)
        return ids

    assert distribution_of(run, parts) == texts(rule, start, count)
    assert seen["right"] > 10 and seen["wrong"] > 10


def test_without_guesses_too() -> None:
    """The oracle, and the counting, against plain decoding."""
    rule, start = by_last([2, 1, 1], [1, 0, 3]), [2, 0]

    def run(random: Any) -> tuple[int, ...]:
        text, made = list(start), sampler(random)
        for _ in range(3):
            text.append(made.next(rule(text), text)[0])
        return tuple(text[2:])

    assert distribution_of(run, 4) == texts(rule, start, 3)


# -- distributions


def test_probabilities_of_a_distribution() -> None:
    one = Distribution(np.array([2, 5, 9]), np.array([1.0, 2.0, 5.0]))
    assert [one.probability(i) for i in (2, 5, 9)] == [0.125, 0.25, 0.625]
    assert [one.probability(i) for i in (0, 3, 10)] == [0, 0, 0]


def test_what_one_has_over_another() -> None:
    one = Distribution(np.array([1, 2, 3, 7]), np.array([4.0, 2.0, 1.0, 1.0]))
    other = Distribution(np.array([0, 1, 3]), np.array([1.0, 1.0, 2.0]))
    beyond = one.beyond(other)
    assert beyond.ids.tolist() == [1, 2, 3, 7]
    assert beyond.weights.tolist() == [0.25, 0.25, 0, 0.125]
    assert one.weights.tolist() == [4, 2, 1, 1]  # left alone
    itself = one.beyond(one)
    assert itself.weights.tolist() == one.weights.tolist()


def test_rounding_leaves_a_choice() -> None:
    """Where p is below q by a rounding error only, nothing is left over: then p decides."""
    p = Distribution(np.array([0, 1]), np.array([1 - 2**-53, 1.0]))
    q = Distribution(np.array([0, 1]), np.array([1.0, 1.0]))
    assert p.beyond(q).weights.sum() > 0
