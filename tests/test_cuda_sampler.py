"""Whole steps of a Sampler on a GPU, simulated: what it draws there, and what it downloads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice

from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.gpu.board import Board
from onnxstream_nb.kernels import cuda_sampler
from onnxstream_nb.sampling import Sampler, SamplingParams, log_sum_exp

RECORD = cuda_sampler.RECORD.itemsize
SIZES = [1, 31, 1025]
BIASES = {0: 1.5, 30: -np.inf, 17: -2.0, 1024: 3.0}


def logits_of(v: int, seed: int = 0) -> Array:
    return (3 * np.random.default_rng(seed + v).standard_normal(v)).astype(np.float32)


class Watched(FakeDevice):
    """Knows the bytes of each download."""

    def __init__(self, order: str = "forwards") -> None:
        super().__init__(order=order)
        self.fetched: list[int] = []

    def download(self, array: Array, address: int, stream: int) -> None:
        self.fetched.append(array.nbytes)
        super().download(array, address, stream)


class WatchedBoard(Board):
    """A Board whose device is watched, and what it tells."""

    device: Watched

    def __init__(self, order: str = "forwards", most: int = 1 << 24) -> None:
        self.told: list[str] = []
        super().__init__(Watched(order), most, self.told.append)

    def place(self, logits: Array) -> Any:
        return self.put(logits)


def check(params: SamplingParams, steps: int, v: int, logits: Array | None = None) -> WatchedBoard:
    """Draw by two samplers of one seed, here and there; ids and logarithms are the same."""
    here, there, board = Sampler(params), Sampler(params), WatchedBoard()
    recent = [v - 1, 0, v // 2, 0]
    for step in range(steps):
        each = logits_of(v, 100 * step) if logits is None else logits
        placed = board.place(each)
        wanted, logprob = here.next(each, recent)
        token, its = there.next(placed, recent)
        assert token == wanted and its == pytest.approx(logprob, rel=0, abs=4e-6)
        assert board.device.fetched == [RECORD]
        np.testing.assert_array_equal(board.fetch(placed), each)
        board.device.fetched.clear()
        recent.append(token)
    return board


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "cold": {"temperature": 1e-12, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "top_k": {"temperature": 1.0, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
    "many": {"temperature": 1.0, "top_k": 1 << 40, "top_p": 1.0, "min_p": 0.0},
    "top_p": {"temperature": 1.0, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
    "min_p": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
    "defaults": {},
    "penalties": {
        "temperature": 0.0, "repeat_penalty": 2.0, "presence_penalty": 1.0,
        "frequency_penalty": 0.5, "penalty_window": 3,
    },
    "all": {"repeat_penalty": 1.3, "penalty_window": -1},
    "no window": {"repeat_penalty": 1.3, "penalty_window": 0},
}  # fmt: skip


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_draws_what_the_cpu_draws(name: str, v: int) -> None:
    check(SamplingParams(seed=5, **OPTIONS[name]), 3, v)


@pytest.mark.parametrize("v", SIZES)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"repeat_penalty": 1.2}])
def test_biases_too(v: int, options: dict[str, Any]) -> None:
    biases = {token: bias for token, bias in BIASES.items() if token < v}
    check(SamplingParams(seed=1, logit_bias=biases, **options), 2, v)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 3}, {"top_k": 0}])
def test_ties(options: dict[str, Any]) -> None:
    logits = (np.arange(1025) % 7 // 3).astype(np.float32)
    check(SamplingParams(seed=2, **options), 4, 1025, logits)


def test_greedy_launches_no_more_than_it_needs() -> None:
    board = check(SamplingParams(temperature=0.0), 1, 33)
    assert board.device.launched == ["survey", "take_largest", "log_probability"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    logits, board = logits_of(1100), WatchedBoard()
    logits[1070] = bad
    with pytest.raises(ModelError, match="not finite .id 1070"):
        Sampler(SamplingParams(temperature=temperature)).next(board.place(logits), [])


@pytest.mark.filterwarnings("ignore:overflow")
def test_extreme_logits_that_are_finite() -> None:
    """Their difference is not, in float32: then the CPU says it."""
    most = float(np.finfo(np.float32).max)
    logits, board = np.array([most, -most, 0], np.float32), WatchedBoard()
    params = SamplingParams(temperature=0.0, logit_bias={0: -np.inf, 2: -np.inf})
    found = Sampler(params).next(board.place(logits), [])
    assert found == Sampler(params).next(logits, []) == (1, pytest.approx(-2 * most))


@pytest.mark.parametrize(
    ("biases", "message"),
    [({40: 1.0}, "names id 40, but the vocabulary has 33"),
     (dict.fromkeys(range(33), -np.inf), "bans every token")],
)  # fmt: skip
def test_errors_are_those_of_the_cpu(biases: dict[int, float], message: str) -> None:
    board = WatchedBoard()
    sampler = Sampler(SamplingParams(logit_bias=biases))
    with pytest.raises(UsageError, match=message):
        sampler.next(board.place(logits_of(33)), [])


def test_a_larger_vocabulary_than_sums_hold_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sampler, "MOST", 100)
    logits, board, params = logits_of(101), WatchedBoard(), SamplingParams(seed=3)
    assert Sampler(params).next(board.place(logits), []) == Sampler(params).next(logits, [])
    assert board.device.fetched == [404] and not board.device.launched
    greedy = Sampler(SamplingParams(temperature=0.0))
    assert greedy.next(board.place(logits), [])[0] == np.argmax(logits)
    assert board.device.fetched == [404, RECORD]


def test_guesses_and_distributions_are_the_cpus() -> None:
    logits, board, params = logits_of(50), WatchedBoard(), SamplingParams(seed=4)
    here, there, placed = Sampler(params), Sampler(params), board.place(logits)
    wanted = here.distribution(logits, [])
    found = there.distribution(placed, [])
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.weights, wanted.weights)
    guess = int(wanted.ids[0])
    taken = there.next_or_guess(placed, [], guess, wanted)
    assert taken == here.next_or_guess(logits, [], guess, wanted)
    assert taken[1] == pytest.approx(float(logits[taken[0]]) - log_sum_exp(logits))


def test_another_board_gets_a_sampler_of_its_own() -> None:
    logits, sampler = logits_of(20), Sampler(SamplingParams(temperature=0.0))
    boards = WatchedBoard(), WatchedBoard("backwards")
    for board in (*boards, boards[0]):
        assert sampler.next(board.place(logits), [])[0] == np.argmax(logits)
    assert [board.device.fetched for board in boards] == [[RECORD] * 2, [RECORD]]


@pytest.mark.parametrize("most", [0, 600, 3 << 10, 12 << 10])
def test_too_little_memory_leaves_it_to_the_cpu(most: int) -> None:
    """Wherever it ends; the random numbers go on as if nothing were."""
    logits, params = logits_of(1025), SamplingParams(seed=6, top_k=20, repeat_penalty=1.1)
    here, there, board = Sampler(params), Sampler(params), WatchedBoard(most=1 << 24)
    placed = board.place(logits)
    board._most = board._taken + most
    for _ in range(3):
        assert there.next(placed, [3, 4]) == here.next(logits, [3, 4])
    assert len(board.told) == 1 and "the CPU computes what does not fit" in board.told[0]
    assert board.device.fetched == [4 * 1025] * 3
