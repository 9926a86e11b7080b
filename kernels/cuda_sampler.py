"""Tokens drawn on a GPU: what is launched for the logits of one position, and what comes back.

Dims: V logits of one position, W tokens that are looked back at, B biases.

A board (onnxstream_nb/gpu/board.py) has the memory and the stream. One array goes up, of whole
numbers that the kernels read: a random one, the W tokens, the ids and the values of the biases.
RECORD comes back: the token and the logarithm of its probability.
"""

import math

import numpy as np

from ..registry import op
from .cuda_penalties import add_biases, penalise
from .cuda_sampling import MOST, SHARE_BITS, draw
from .cuda_survey import CHUNK, LOWEST, PART, SURVEYED, log_probability, survey, take_largest

RECORD = np.dtype([("token", np.int64), ("logprob", np.float32), ("unused", np.float32)])
SHARE = 1 << SHARE_BITS
COOLEST = 1e8  # times what LOWEST stands for, a float32 still: 1 / temperature is at most this


class DeviceSampler:
    """Draws as `params` say, which has the attributes of a SamplingParams (sampling.py)."""

    def __init__(self, board, params):
        self._board, self._params = board, params
        self._ids = np.array(list(params.logit_bias), np.int64)
        with np.errstate(over="ignore"):
            self._biases = np.array(list(params.logit_bias.values()), np.float64).astype(np.float32)
        self._banned = int(np.isneginf(self._biases).sum())

    def able(self, v):
        """Whether V logits can be drawn from here: not where the CPU has an error to raise for the
        biases, nor where there are so many that `draw` could not sum up their weights."""
        named = self._ids.max(initial=-1) < v and self._banned < v
        return bool(named and (self._params.temperature == 0 or v <= MOST))

    def next(self, logits, window, uniform):
        """logits (V,) float32 of the board, tokens (W,) that are penalised, a number in [0, 1) ->
        the id, and the natural logarithm of its probability before all options, which is no
        number where a logit is not finite; then the id means nothing."""
        board, v = self._board, logits.size
        given = board.put(self._given(window, uniform))
        record = board.room((RECORD.itemsize // 8,), np.int64)
        found = adjusted_found = self._survey(logits.address, v)
        adjusted = logits
        if len(window) or self._ids.size:
            adjusted = self._adjusted(logits, given.address + 8, len(window))
            adjusted_found = self._survey(adjusted.address, v)
        self._choose(adjusted.address, adjusted_found, given.address, record.address, v)
        parts = found[1].address
        where = logits.address, parts, record.address, record.address + 8
        board.launch(log_probability, (1,), (32,), (*where, -(-v // SURVEYED)))
        came = board.fetch(record).view(RECORD)[0]
        return int(came["token"]), float(came["logprob"])

    def _given(self, window, uniform):
        """What the kernels read, as int64."""
        biases = np.zeros(-(-self._biases.size // 2) * 2, np.float32)
        biases[: self._biases.size] = self._biases
        numbers = [int(uniform * SHARE)], np.asarray(window, np.int64), self._ids
        return np.concatenate([*numbers, biases.view(np.int64)])

    def _survey(self, logits, v):
        """The largest logits of chunks, and the parts, that `survey` finds."""
        blocks = -(-v // SURVEYED)
        found = self._board.room((-(-v // CHUNK),)), self._board.room((blocks, PART // 4))
        arguments = logits, found[0].address, found[1].address, v
        self._board.launch(survey, (blocks,), (survey.threads,), arguments)
        return found

    def _adjusted(self, logits, window, count):
        """A copy of the logits after biases and penalties; the window's tokens, the ids and the
        values of the biases lie there one after the other."""
        board, v, p = self._board, logits.size, self._params
        copy = board.room((v,))
        board.device.copy(copy.address, logits.address, 4 * v, board.stream)
        biased = self._ids.size
        if biased:
            ids = window + 8 * count
            arguments = copy.address, ids, ids + 8 * biased, biased
            board.launch(
                add_biases, (-(-biased // add_biases.threads),), (add_biases.threads,), arguments
            )
        if count:
            penalties = p.repeat_penalty, p.presence_penalty, p.frequency_penalty
            arguments = copy.address, window, count, v, *penalties
            board.launch(penalise, (-(-count // penalise.threads),), (penalise.threads,), arguments)
        return copy

    def _choose(self, logits, found, uniform, token, v):
        """Launch what writes the token."""
        board, p = self._board, self._params
        maxima, parts = (array.address for array in found)
        if p.temperature == 0:
            board.launch(take_largest, (1,), (32,), (parts, token, -(-v // SURVEYED)))
            return
        top_k = min(p.top_k, v)
        room = board.room((2 * v,)) if top_k else None
        where = logits, maxima, parts, room.address if room else 0, uniform, token
        least = math.log(p.min_p) if p.min_p else LOWEST
        cooled = min(1 / p.temperature, COOLEST)
        options = v, top_k, int(p.top_p * SHARE), least, cooled
        board.launch(draw, (1,), (draw.threads,), (*where, *options))


@op("DeviceSampler", domain="onnxstream_nb")
def device_sampler(board, params):
    """What draws tokens on a board."""
    return DeviceSampler(board, params)
