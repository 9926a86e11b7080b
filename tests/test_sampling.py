"""Sampling against a plain-Python reference, and the promises about seeds, ties and bad input."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.sampling import Sampler, SamplingParams, top_k

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def naive_distribution(logits, recent, p: SamplingParams) -> dict[int, float]:
    """The documented chain in plain Python: id -> probability of being drawn."""
    values = {i: float(x) for i, x in enumerate(logits)}
    for token, bias in p.logit_bias.items():
        values[token] += bias
    window = list(recent)[-p.penalty_window :] if p.penalty_window > 0 else list(recent)
    for token, count in Counter(window if p.penalty_window else []).items():
        x = values[token]
        x = x / p.repeat_penalty if x > 0 else x * p.repeat_penalty
        values[token] = x - count * p.frequency_penalty - p.presence_penalty
    order = sorted(values, key=lambda i: (-values[i], i))
    order = order[: p.top_k or None]
    total = sum(math.exp(values[i]) for i in order)
    likely, mass = [], 0.0
    for token in order:
        if p.top_p < 1 and mass >= p.top_p:
            break
        likely.append(token)
        mass += math.exp(values[token]) / total
    best = math.exp(values[order[0]])
    likely = [i for i in likely if math.exp(values[i]) >= p.min_p * best]
    weights = {i: math.exp((values[i] - values[order[0]]) / p.temperature) for i in likely}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


CHAINS = [
    NEUTRAL,
    {**NEUTRAL, "temperature": 0.5},
    {**NEUTRAL, "top_k": 3},
    {**NEUTRAL, "top_p": 0.7},
    {**NEUTRAL, "min_p": 0.2},
    {**NEUTRAL, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    {**NEUTRAL, "repeat_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {**NEUTRAL, "repeat_penalty": 2.0, "penalty_window": 2},
    {**NEUTRAL, "repeat_penalty": 2.0, "penalty_window": 0},
    {**NEUTRAL, "repeat_penalty": 1.3, "penalty_window": -1, "logit_bias": {3: 2.0, 9: -math.inf}},
    {},
]


@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_draws_follow_the_documented_chain(options):
    params = SamplingParams(**options, seed=7)
    logits = np.array([1.5, -0.5, 0.2, 2.0, -3.0, 1.5, 0.0, 0.9, -1.0, 1.0, 0.7], np.float32)
    recent = [3, 3, 0, 4, 10, 5]
    expected = naive_distribution(logits, recent, params)
    sampler = Sampler(params)
    draws = 6000
    counts = Counter(sampler.next(logits, recent)[0] for _ in range(draws))
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[token] / draws - probability) <= 5 * spread + 1e-12, token


@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_the_distribution_is_that_of_the_documented_chain(options):
    params = SamplingParams(**options)
    logits = np.array([1.5, -0.5, 0.2, 2.0, -3.0, 1.5, 0.0, 0.9, -1.0, 1.0, 0.7], np.float32)
    found = Sampler(params).distribution(logits, [3, 3, 0, 4, 10, 5])
    expected = naive_distribution(logits, [3, 3, 0, 4, 10, 5], params)
    drawn = {i for i in range(11) if found.probability(i)}
    assert drawn == {i for i in expected if expected[i]}
    for token, probability in expected.items():
        assert found.probability(token) == pytest.approx(probability, rel=1e-5)
    assert found.ids.tolist() == sorted(found.ids.tolist())


def test_the_greedy_distribution_is_certain():
    greedy = Sampler(SamplingParams(temperature=0, logit_bias={1: 4.0}))
    found = greedy.distribution(np.array([3.0, 1.0, 2.0], np.float32), [])
    assert (found.ids.tolist(), found.probability(1), found.probability(0)) == ([1], 1.0, 0.0)
    assert greedy.draw(found) == 1


def test_logprob_is_of_the_models_own_distribution():
    logits = np.array([3.0, 1.0, -2.0, 0.5], np.float32)
    params = SamplingParams(temperature=0, logit_bias={2: 100.0})
    token, logprob = Sampler(params).next(logits, [])
    reference = float(logits[2]) - math.log(sum(math.exp(x) for x in logits.tolist()))
    assert token == 2
    assert logprob == pytest.approx(reference, rel=1e-6)
    assert logits.tolist() == [3.0, 1.0, -2.0, 0.5]  # the caller's array is untouched


def test_greedy_takes_the_lowest_of_equals_and_honours_penalties():
    logits = np.array([1.0, 5.0, 5.0, 4.9], np.float32)
    greedy = Sampler(SamplingParams(temperature=0, repeat_penalty=1.5, frequency_penalty=0.1))
    assert greedy.next(logits, [])[0] == 1
    assert greedy.next(logits, [1])[0] == 2
    assert greedy.next(logits, [1, 2])[0] == 3


def test_top_k_settles_ties_by_id():
    logits = np.array([0.0, 2.0, 1.0, 1.0, 1.0, 2.0, 1.0], np.float32)
    assert top_k(logits, 4).tolist() == [1, 2, 3, 5]
    assert top_k(logits, 2).tolist() == [1, 5]
    assert top_k(logits, 0).tolist() == top_k(logits, 99).tolist() == list(range(7))


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40), st.integers(1, 41)
)
@settings(deadline=None)
def test_top_k_equals_a_stable_sort(values, k):
    logits = np.array(values, np.float32)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert top_k(logits, k).tolist() == sorted(order)


@pytest.mark.parametrize("k", [1, 40, 700, 5000])
def test_top_k_of_a_large_vocabulary(k):
    logits = np.random.default_rng(k).normal(size=49_999).round(2).astype(np.float32)
    assert top_k(logits, k).tolist() == np.sort(np.argsort(-logits, kind="stable")[:k]).tolist()


def test_seed_decides_the_ids():
    logits = np.random.default_rng(0).normal(size=(30, 5000)).astype(np.float32)

    def ids(seed):
        sampler = Sampler(SamplingParams(temperature=1.2, seed=seed))
        return [sampler.next(row, [])[0] for row in logits]

    assert ids(11) == ids(11)
    assert ids(11) != ids(12)
    assert ids(None) != ids(None)


def test_the_random_numbers_are_pinned():
    # PCG64's stream is specified: these draws are the same on every platform
    sampler = Sampler(SamplingParams(**NEUTRAL, seed=2024))
    even = np.zeros(1000, np.float32)
    assert [sampler.next(even, [])[0] for _ in range(5)] == [675, 214, 309, 799, 995]


def test_temperature_near_zero_is_greedy():
    logits = np.random.default_rng(1).normal(size=777).astype(np.float32) * 50
    sampler = Sampler(SamplingParams(temperature=1e-30, seed=1))
    assert sampler.next(logits, [])[0] == int(logits.argmax())


def test_sizes_from_one_token_to_a_large_vocabulary():
    sampler = Sampler(SamplingParams(seed=3))
    assert sampler.next(np.array([-4.0], np.float32), [])[0] == 0
    logits = np.full(150_001, -20.0, np.float32)
    logits[150_000] = 9.0
    token, logprob = sampler.next(logits, [150_000] * 10)
    assert token == 150_000
    assert logprob == pytest.approx(-math.log1p(150_000 * math.exp(-29)), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(bad):
    logits = np.zeros(9, np.float32)
    logits[4] = bad
    with pytest.raises(ModelError, match="id 4 has"):
        Sampler(SamplingParams()).next(logits, [])


def test_bias_outside_the_vocabulary_or_banning_all():
    logits = np.zeros(3, np.float32)
    with pytest.raises(UsageError, match="names id 3, but the vocabulary has 3"):
        Sampler(SamplingParams(logit_bias={3: 1.0})).next(logits, [])
    ban = SamplingParams(logit_bias={0: -math.inf, 1: -math.inf, 2: -math.inf})
    with pytest.raises(UsageError, match="bans every token"):
        Sampler(ban).next(logits, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature should be a number of at least 0, not -1"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": "hot"}, "not 'hot'"),
        ({"top_k": -1}, "top_k should be a whole number of at least 0, not -1 .--top-k"),
        ({"top_k": 1.5}, "--top-k"),
        ({"top_p": 0}, "top_p should be a number above 0 and at most 1, not 0 .--top-p"),
        ({"top_p": 1.01}, "--top-p"),
        ({"min_p": -0.1}, "--min-p"),
        ({"repeat_penalty": 0}, "--repeat-penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty should be a number, not inf"),
        ({"frequency_penalty": True}, "--frequency-penalty"),
        ({"penalty_window": -2}, "--penalty-window"),
        ({"seed": -1}, "--seed"),
        ({"seed": 1.0}, "--seed"),
        ({"stop": "END"}, "--stop"),
        ({"stop": ("",)}, "none of them empty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ],
    ids=str,
)
def test_values_out_of_range_name_their_option(options, message):
    with pytest.raises(UsageError, match=message):
        SamplingParams(**options)
