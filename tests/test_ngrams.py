"""Guesses that the text itself gives: what followed its end, where that was before."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxstream_nb.speculation import LONGEST, NGrams


def ids_of(ngrams: NGrams, text: Sequence[int], most: int = 7, worth: float = 0.0) -> list[int]:
    return [guess.id for guess in ngrams.guess(text, most, worth)]


def looked_up(text: Sequence[int], most: int) -> list[int]:
    """What followed the longest end of the text that was there before, where it was last."""
    for equal in range(min(LONGEST, len(text) - 1), 0, -1):
        end = list(text[-equal:])
        for start in range(len(text) - equal - 1, -1, -1):
            if list(text[start : start + equal]) == end:
                copied = list(text)
                for i in range(most):
                    copied.append(copied[start + equal + i])
                return copied[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 9))
@settings(deadline=None, max_examples=300)
def test_the_longest_end_that_came_before_is_looked_up(text: list[int], most: int) -> None:
    assert ids_of(NGrams(), text, most) == looked_up(text, most)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=60), st.integers(1, 6))
@settings(deadline=None)
def test_a_text_that_grows(text: list[int], step: int) -> None:
    ngrams = NGrams()
    for end in range(1, len(text), step):
        assert ids_of(ngrams, text[:end], 5) == looked_up(text[:end], 5)
    ngrams.begin()
    other = text[::-1]
    assert ids_of(ngrams, other, 5) == looked_up(other, 5)


def test_a_period_goes_on() -> None:
    assert ids_of(NGrams(), [8, 8], 5) == [8] * 5
    assert ids_of(NGrams(), [1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert ids_of(NGrams(), [1, 2, 3, 4], 7) == [] and ids_of(NGrams(), [1], 7) == []


def test_ids_beyond_16_bits() -> None:
    text = [151_000, 65_536, 2**40, 151_000]
    assert ids_of(NGrams(), text, 2) == [65_536, 2**40]


def test_chances_follow_what_came() -> None:
    """The chance of each guess is the product of the rates so far; rates move by an eighth."""
    ngrams = NGrams()
    first = ngrams.guess([5, 6, 5], 3, 0)
    assert [g.chance for g in first] == pytest.approx([0.25, 0.25 * 0.5, 0.25 * 0.5 * 0.7])
    assert all(g.drawn_from is None for g in first)
    # right with one equal token, wrong with two
    found = ngrams.guess([5, 6, 5, 6, 7, 6], 2, 0)
    one, two = 0.25 + 0.75 / 8, 0.5 - 0.5 / 8
    assert [g.id for g in found] == [7, 6]
    assert [g.chance for g in found] == pytest.approx([one, one * two])


def test_guesses_that_fail_are_given_up_and_taken_up_again() -> None:
    """What is not proposed is still looked up, so that it is known when a text begins to repeat."""
    ngrams, text = NGrams(), [0, 1]
    for i in range(2, 40):  # 0 is always followed by something new
        text += [0, i]
        ngrams.guess(text[:-1], 7, 1 / 16)
    text.append(0)
    assert ids_of(ngrams, text, 7, 1 / 16) == []
    text += [39, 0, 39]
    for _ in range(40):
        found = ids_of(ngrams, text, 7, 1 / 16)
        text += [0, 39]
    assert found == [0, 39, 0, 39, 0, 39, 0]
