"""Tokens chosen on a GPU, simulated, against what the CPU chooses of the same logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array, placed, poisoned

from onnxstream_nb.kernels import cuda_penalties, cuda_sampling, cuda_survey
from onnxstream_nb.kernels.cuda_simulator import ORDERS, simulate
from onnxstream_nb.sampling import Sampler, SamplingParams, log_sum_exp, penalise


class Fixed:
    """A generator of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def launch(
    kernel: Any, grid: int, arrays: list[Array], numbers: list[Any], order: str = "forwards",
    threads: int = 0,
) -> None:  # fmt: skip
    arguments = [*(a.ctypes.data for a in arrays), *numbers]
    simulate(kernel, grid, threads or kernel.threads, arguments, arrays, order=order)


def surveyed(logits: Array, order: str = "forwards") -> tuple[Array, Array]:
    blocks = -(-logits.size // cuda_survey.SURVEYED)
    maxima = poisoned(-(-logits.size // cuda_survey.CHUNK))
    parts = poisoned(blocks, cuda_survey.PART // 4)
    launch(cuda_survey.survey, blocks, [logits, maxima, parts], [logits.size], order)
    return maxima, parts


def drawn(
    logits: Array, params: SamplingParams, uniform: float, order: str = "forwards",
    threads: int = 64,
) -> int:  # fmt: skip
    maxima, parts = surveyed(logits)
    share = float(1 << cuda_sampling.SHARE_BITS)
    room, token = poisoned(2 * logits.size), placed(np.array([-1]))
    place = placed(np.array([int(uniform * share)]))
    least = math.log(params.min_p) if params.min_p else cuda_survey.LOWEST
    launch(
        cuda_sampling.draw, 1, [logits, maxima, parts, room, place, token],
        [logits.size, params.top_k, int(params.top_p * share), least, 1 / params.temperature],
        order, threads,
    )  # fmt: skip
    return int(token[0])


def random(v: int, seed: int = 0, spread: float = 3.0) -> Array:
    values = np.random.default_rng(seed).standard_normal(v).astype(np.float32)
    return placed(values * np.float32(spread))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("v", [1, 31, 1000, 2085])
def test_the_largest_and_its_probability(v: int, order: str) -> None:
    logits = random(v)
    _, parts = surveyed(logits, order)
    token, result = placed(np.array([-1])), poisoned(1)
    launch(cuda_survey.take_largest, 1, [parts, token], [len(parts)], order)
    assert token[0] == np.argmax(logits)
    other = placed(np.array([v // 2]))
    launch(cuda_survey.log_probability, 1, [logits, parts, other, result], [len(parts)], order)
    np.testing.assert_allclose(result[0], logits[v // 2] - log_sum_exp(logits), rtol=0, atol=4e-6)


@pytest.mark.parametrize("place", [0, 33_700])
def test_more_parts_than_a_warp_has_lanes(place: int) -> None:
    logits, token, result = random(33_800), placed(np.array([place])), poisoned(1)
    logits[place] = 15
    _, parts = surveyed(logits)
    assert len(parts) == 34
    launch(cuda_survey.log_probability, 1, [logits, parts, token, result], [len(parts)])
    np.testing.assert_allclose(result[0], 15 - log_sum_exp(logits), rtol=0, atol=4e-6)
    token[0] = -1
    launch(cuda_survey.take_largest, 1, [parts, token], [len(parts)])
    assert token[0] == place


@pytest.mark.parametrize("places", [(700, 40, 1500), (33, 32), (0, 2084)])
def test_of_equal_ones_the_first(places: tuple[int, ...]) -> None:
    """Also 0 and -0, which the bits tell apart, and among logits that are banned."""
    logits = placed(np.full(2085, -np.inf, np.float32))
    logits[list(places)] = [-0.0, 0.0, -0.0][: len(places)]
    _, parts = surveyed(logits)
    token = placed(np.array([-1]))
    launch(cuda_survey.take_largest, 1, [parts, token], [len(parts)])
    assert token[0] == min(places)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1060, 1099])
def test_a_logit_that_is_not_finite_shows(place: int, bad: float) -> None:
    """Also where those of its block are so low that they hardly count."""
    logits = random(1100)
    logits[1024:] -= 500
    logits[place] = bad
    _, parts = surveyed(logits)
    token, result = placed(np.array([3])), poisoned(1)
    result[0] = 0
    launch(cuda_survey.log_probability, 1, [logits, parts, token, result], [len(parts)])
    assert np.isnan(result[0])


FILTERS = [
    {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"top_k": 5, "top_p": 1.0, "min_p": 0.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 0, "top_p": 0.7, "min_p": 0.0},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.1},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.0},
    {"top_k": 1, "top_p": 0.5, "min_p": 1.0},
]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("v", [1, 33, 700])
def test_draws_as_the_cpu_does(v: int, options: dict[str, Any]) -> None:
    logits = random(v, v)
    for uniform, temperature in [(0.0, 0.8), (0.37, 2.0), (0.83, 0.5), (0.9999, 1.0)]:
        params = SamplingParams(temperature=temperature, **options)
        sampler = Sampler(params)
        sampler._random = Fixed(uniform)  # type: ignore[assignment]
        wanted, _ = sampler.next(logits, [])
        assert drawn(logits, params, uniform) == wanted


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 256, cuda_sampling.THREADS])
def test_in_any_order_and_size_of_a_block(threads: int, order: str) -> None:
    logits, params = random(1500, 4), SamplingParams(temperature=1.5)
    sampler = Sampler(params)
    sampler._random = Fixed(0.61)  # type: ignore[assignment]
    assert drawn(logits, params, 0.61, order, threads) == sampler.next(logits, [])[0]


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_k": 0, "top_p": 0.5}, {"top_k": 7, "top_p": 0.6}]
)
def test_ties_go_to_the_lowest_ids(options: dict[str, Any]) -> None:
    """Few values: which of the equal ones are kept shows in what is drawn at each share."""
    logits = placed((np.arange(300) % 5 // 2).astype(np.float32))
    params = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, **options})
    for uniform in (0.01, 0.21, 0.45, 0.77, 0.99):
        sampler = Sampler(params)
        sampler._random = Fixed(uniform)  # type: ignore[assignment]
        distribution = sampler.distribution(logits, [])
        assert drawn(logits, params, uniform) == sampler.draw(distribution)


def test_banned_tokens_are_never_drawn() -> None:
    logits = placed(np.full(200, -np.inf, np.float32))
    logits[[7, 150]] = 1.0, 1.5
    params = SamplingParams(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0)
    assert [drawn(logits, params, u) for u in (0.0, 0.3, 0.5, 0.999)] == [7, 7, 150, 150]


def test_biases_and_penalties() -> None:
    logits, ids = random(300, 9), placed(np.array([3, 299]))
    biases, wanted = placed(np.array([2.5, -np.inf], np.float32)), logits.copy()
    launch(cuda_penalties.add_biases, 1, [logits, ids, biases], [2])
    wanted[ids] += biases
    np.testing.assert_array_equal(logits, wanted)
    window = np.random.default_rng(2).integers(0, 40, 290)
    window[:2] = 299, 400  # a banned one, and one that is outside
    params = SamplingParams(repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    penalise(wanted, window.tolist(), params)
    launch(
        cuda_penalties.penalise, 2, [logits, placed(window)], [290, 300, 1.3, 0.5, 0.25], "random"
    )
    np.testing.assert_allclose(logits, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", FILTERS[2:4])
def test_logits_that_are_not_finite_do_no_harm(bad: float, options: dict[str, Any]) -> None:
    """An id comes of them all the same, or some would be read at one that is none."""
    logits = random(200)
    logits[[3, 130]] = bad
    assert 0 <= drawn(logits, SamplingParams(**options), 0.4) < 200
    logits[:] = bad
    assert 0 <= drawn(logits, SamplingParams(**options), 0.4) < 200
