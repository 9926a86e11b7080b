"""Choosing the next token: logits -> id, in NumPy, or on the GPU where they lie.

The steps run in llama.cpp's order: logit bias, penalties, top-k, top-p, min-p, temperature.
Top-p and min-p therefore look at probabilities at temperature 1, and the temperature decides
only among what they leave. Temperature 0 takes the likeliest token after bias and penalties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DeviceMemoryError, ModelError, UsageError
from .registry import internal

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]

_BLOCK = 64


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; a value out of range is a UsageError that names it.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch these off. The penalties
    look at the last `penalty_window` tokens (0: none, -1: all). `logit_bias` adds to the logits
    of ids (-inf bans). Generation ends at any text of `stop`. Equal `seed`s choose equally.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, open_low) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high, open_low)
        for name, smallest in {"top_k": 0, "penalty_window": -1, "seed": 0}.items():
            _check_whole(name, getattr(self, name), smallest)
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError("stop should be a list of texts, none of them empty (--stop)")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, int) or token < 0 or not bias < math.inf:
                raise UsageError(f"logit_bias {{{token!r}: {bias!r}}} should be {{id: number}}")


def params_of(options: Mapping[str, Any]) -> SamplingParams:
    """The params that options name; UsageError for a name that none has."""
    known = [each.name for each in fields(SamplingParams)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"unknown sampling option {unknown[0]}: use one of {', '.join(known)}")
    return SamplingParams(**options)


_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repeat_penalty": (0.0, math.inf, True),
    "presence_penalty": (-math.inf, math.inf, True),
    "frequency_penalty": (-math.inf, math.inf, True),
}
"""Option -> (low, high, whether low itself is left out). Infinity is always left out."""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_number(name: str, value: object, low: float, high: float, open_low: bool) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= float(value) <= high and not (open_low and value == low):  # type: ignore[arg-type]
        return
    least = "" if low == -math.inf else f" {'above' if open_low else 'of at least'} {low:g}"
    most = "" if high == math.inf else f" and at most {high:g}"
    raise UsageError(f"{name} should be a number{least}{most}, not {value!r} ({_option(name)})")


def _check_whole(name: str, value: object, smallest: int) -> None:
    if value is None and name == "seed":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise UsageError(
            f"{name} should be a whole number of at least {smallest}, not {value!r} "
            f"({_option(name)})"
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """Ids (n,), ascending, that may be drawn, and the weight of each (n,), in float64; a
    probability is a weight's share of their sum."""

    ids: Ids
    weights: npt.NDArray[np.float64]

    def probability(self, token: int) -> float:
        """Of one id; 0.0 of those that are not drawn."""
        at = int(np.searchsorted(self.ids, token))
        if at == self.ids.size or self.ids[at] != token:
            return 0.0
        return float(self.weights[at] / self.weights.sum())

    def beyond(self, other: Distribution) -> Distribution:
        """What this one has over the other, max(p - q, 0); itself where rounding leaves nothing."""
        p, q = self.weights / self.weights.sum(), other.weights / other.weights.sum()
        _, here, there = np.intersect1d(
            self.ids, other.ids, assume_unique=True, return_indices=True
        )
        p[here] = np.maximum(p[here] - q[there], 0)
        return Distribution(self.ids, p) if p.any() else self


class Sampler:
    """Draws ids. Its random numbers depend on the seed alone, on every platform (PCG64).

    Logits that lie on a GPU (gpu/board.py) are looked at there by `next`, and come here otherwise.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._board: Any = None
        self._device: Any = None

    def next(self, logits: npt.NDArray[np.float32], recent: Sequence[int]) -> tuple[int, float]:
        """logits (V,), and the tokens so far for the penalties -> an id, and the natural
        logarithm of its probability in the model's own distribution (before every option)."""
        if hasattr(logits, "board"):
            if self._on(logits.board).able(logits.size):
                return self._next_there(logits, recent)
            logits = np.asarray(logits)
        total = log_sum_exp(logits)
        token = self.draw(self.distribution(logits, recent))
        return token, float(logits[token]) - total

    def _on(self, board: Any) -> Any:
        """What draws on a board (kernels/cuda_sampler.py)."""
        if self._board is not board:
            self._board, self._device = board, internal("DeviceSampler")(board, self.params)
        return self._device

    def _next_there(self, logits: Any, recent: Sequence[int]) -> tuple[int, float]:
        """`next`, where the logits lie; what is odd about them is told by the CPU."""
        uniform, token, logprob = self._random.random(), 0, math.nan
        try:
            token, logprob = self._device.next(logits, self._window(recent), uniform)
        except DeviceMemoryError as error:
            logits.board.failed(error)
        if math.isfinite(logprob):
            return token, logprob
        here = np.asarray(logits)
        total = log_sum_exp(here)
        token = self.draw(self.distribution(here, recent), uniform)
        return token, float(here[token]) - total

    def next_or_guess(
        self,
        logits: npt.NDArray[np.float32],
        recent: Sequence[int],
        guess: int,
        drawn_from: Distribution,
    ) -> tuple[int, float]:
        """As `next`, for who has drawn `guess` from another distribution, q: it is taken with
        probability min(1, p / q), else what p has over q decides. Which ids come, and how often, is
        as of `next`; how often the guess is right is the most that can be (Leviathan et al., arXiv
        2211.17192; Chen et al., arXiv 2302.01318)."""
        logits = np.asarray(logits)
        total = log_sum_exp(logits)
        wanted = self.distribution(logits, recent)
        p, q = wanted.probability(guess), drawn_from.probability(guess)
        token = guess if self._random.random() * q < p else self.draw(wanted.beyond(drawn_from))
        return token, float(logits[token]) - total

    def distribution(self, logits: npt.NDArray[np.float32], recent: Sequence[int]) -> Distribution:
        """What `next` draws from: after bias, penalties, top-k, top-p, min-p and temperature."""
        p, adjusted = self.params, self._adjusted(np.asarray(logits), recent)
        if p.temperature == 0:
            return Distribution(np.array([np.argmax(adjusted)]), np.ones(1))
        ids = top_k(adjusted, p.top_k)
        below = adjusted[ids].astype(np.float64)
        below -= below.max()
        chosen = nucleus(np.exp(below), p.top_p, p.min_p)
        return Distribution(ids[chosen], np.exp(below[chosen] / p.temperature))

    def draw(self, distribution: Distribution, uniform: float | None = None) -> int:
        """One of its ids, for a number in [0, 1), by default the next random one."""
        cumulative = np.cumsum(distribution.weights)
        uniform = self._random.random() if uniform is None else uniform
        point = uniform * cumulative[-1]
        return int(distribution.ids[np.searchsorted(cumulative, point, side="right")])

    def _window(self, recent: Sequence[int]) -> Sequence[int]:
        """The tokens that the penalties look at; none where there are no penalties."""
        p = self.params
        penalised = p.repeat_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        if not penalised or p.penalty_window == 0:
            return ()
        return recent[-p.penalty_window :] if p.penalty_window > 0 else recent

    def _adjusted(self, logits: npt.NDArray[np.float32], recent: Sequence[int]) -> Floats:
        """The logits after bias and penalties; the given array where neither changes anything."""
        p, window = self.params, self._window(recent)
        if len(window) == 0 and not p.logit_bias:
            return logits
        result = logits.copy()
        add_bias(result, p.logit_bias)
        if len(window):
            penalise(result, window, p)
        return result


def log_sum_exp(logits: npt.NDArray[np.float32]) -> float:
    """The logarithm of the sum of exp(logits); ModelError if any is not finite."""
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise ModelError(
            f"the model's logits are not finite (id {bad} has {float(logits[bad])}): its weights "
            "are damaged, or it overflows in this precision"
        )
    largest = logits.max()
    return float(largest) + math.log(float(np.exp(logits - largest).sum(dtype=np.float64)))


def add_bias(logits: Floats, bias: Mapping[int, float]) -> None:
    """Add each id's bias in place."""
    for token, value in bias.items():
        if token >= logits.size:
            raise UsageError(
                f"logit_bias names id {token}, but the vocabulary has {logits.size} (--logit-bias)"
            )
        logits[token] += value
    if bias and logits.max() == -np.inf:
        raise UsageError("logit_bias bans every token: leave at least one (--logit-bias)")


def penalise(logits: Floats, window: Sequence[int], params: SamplingParams) -> None:
    """Lower, in place, the logits of ids in `window`. Repeat: divide if positive, else multiply
    (CTRL, arXiv 1909.05858); then frequency * count and presence are taken away."""
    ids, counts = np.unique(np.asarray(window, np.int64), return_counts=True)
    counts, ids = counts[ids < logits.size], ids[ids < logits.size]
    value = logits[ids]
    repeat = params.repeat_penalty
    value = np.where(value > 0, value / repeat, value * repeat)
    logits[ids] = value - counts * params.frequency_penalty - params.presence_penalty


def top_k(logits: Floats, k: int) -> Ids:
    """The ids of the k largest logits, ascending; of equal ones the lowest ids. 0: all."""
    if k == 0 or k >= logits.size:
        return np.arange(logits.size)
    # the k-th largest of the blocks' maxima is a floor that few logits reach
    maxima = logits[: logits.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK).max(axis=1)
    reaching = logits[logits >= _largest(maxima, k)] if maxima.size > k else logits
    least = _largest(reaching, k)
    ids = np.flatnonzero(logits >= least)
    if ids.size > k:  # partition alone would settle ties differently from CPU to CPU
        tied = np.flatnonzero(logits[ids] == least)
        ids = np.delete(ids, tied[k - ids.size :])
    return ids


def _largest(values: Floats, k: int) -> np.floating:
    """The k-th largest value."""
    value: np.floating = np.partition(values, values.size - k)[values.size - k]
    return value


def nucleus(relative: Floats, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Mark the fewest, largest entries that hold a share `top_p` of the sum (arXiv 1904.09751),
    less those below `min_p`. `relative`: probabilities as multiples of the largest one."""
    likely = relative >= min_p
    if top_p >= 1:
        return likely
    total = relative.sum()
    # entries below this hold less than 1 - top_p together: the nucleus is without them
    likely &= relative >= (1 - top_p) * total / relative.size
    (places,) = np.nonzero(likely)
    order = places[np.argsort(-relative[places], kind="stable")]
    count = int(np.searchsorted(np.cumsum(relative[order]), top_p * total)) + 1
    likely[order[count:]] = False
    return likely
