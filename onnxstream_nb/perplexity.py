"""How well a model predicts a text, and how far its logits are from a reference's.

Windows, halves and the standard error are those of llama.cpp's `llama-perplexity`: each window of
the text starts from an empty cache, and only the tokens of its second half count, so that each has
half a window before it. Dims: T positions, V vocabulary; logarithms are natural, sums in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ModelError, UsageError
from .progress import Report

if TYPE_CHECKING:
    from .llm import LanguageModel

Array = np.ndarray[Any, Any]

ROWS = 16  # positions whose probabilities are computed at once, in float64


@dataclass
class Reader:
    """A model that reads the windows. `nll` holds what the counted tokens cost it, in nats;
    `tokens` and `seconds` are what it has read, and in what time."""

    name: str
    llm: LanguageModel
    precision: str
    nll: list[Array] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def begin(self, ids: Sequence[int]) -> None:
        """Read the tokens of a window that do not count."""
        self.llm.rewind(0)
        self._timed(self.llm.feed, ids)

    def read(self, ids: Sequence[int]) -> Array:
        """Read on; the logits (T, V) float32."""
        return self._timed(self.llm.logits, ids)

    def score(self, logits: Array, targets: Sequence[int]) -> Array:
        """The log probabilities (T, V) of a block; those of `targets` (T,) are kept.

        Raises ModelError when a logit is no finite number.
        """
        if not np.isfinite(logits).all():
            raise ModelError(
                f"{self.name}: its logits are not all finite numbers: the file is damaged, or its "
                "numbers overflow; try the model from another file or in another storage"
            )
        logs = log_softmax(logits)
        self.nll.append(-logs[np.arange(len(targets)), list(targets)])
        return logs

    def figures(self) -> dict[str, float]:
        """The perplexity of what counted so far, and its standard error."""
        mean, error = mean_and_error(np.concatenate(self.nll))
        return {"perplexity": math.exp(mean), "perplexity_error": math.exp(mean) * error}

    def _timed(self, run: Callable[[Sequence[int]], Array], ids: Sequence[int]) -> Array:
        started = time.perf_counter()
        result = run(ids)
        self.seconds += time.perf_counter() - started
        self.tokens += len(ids)
        return result


@dataclass
class Divergence:
    """How far a model is from a reference, gathered block by block: KL(reference || model) of each
    position, positions with the same best token, differences and co-moments of all logits."""

    kl: list[Array] = field(default_factory=list)
    same_best: int = 0
    largest: float = 0.0
    squares: float = 0.0
    count: int = 0
    means: Array = field(default_factory=lambda: np.zeros(2))
    comoments: Array = field(default_factory=lambda: np.zeros((2, 2)))

    def add(self, model: Array, reference: Array, log_q: Array, log_p: Array) -> None:
        """Take in a block: the logits (T, V) of both, and their log probabilities."""
        self.kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        self.same_best += int((model.argmax(axis=-1) == reference.argmax(axis=-1)).sum())
        pair = np.stack([model.ravel(), reference.ravel()]).astype(np.float64)
        difference = pair[0] - pair[1]
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.squares += float(difference @ difference)
        self._add_moments(pair)

    def _add_moments(self, pair: Array) -> None:
        """Merge means and co-moments of a block (2, n), as Chan, Golub and LeVeque (1979) do."""
        old, new = self.count, pair.shape[1]
        means = pair.mean(axis=1)
        pair -= means[:, None]
        shift = means - self.means
        self.count = old + new
        self.comoments += pair @ pair.T + np.outer(shift, shift) * (old * new / self.count)
        self.means += shift * (new / self.count)

    def figures(self) -> dict[str, float]:
        """All figures: kl_* in nats a token, same_best a share, logit_* of the logits as given."""
        kl = np.concatenate(self.kl)
        mean, error = mean_and_error(kl)
        deviations = math.sqrt(self.comoments[0, 0]) * math.sqrt(self.comoments[1, 1])
        return {
            "kl_mean": mean, "kl_error": error,
            "kl_p99": float(np.percentile(kl, 99)), "kl_max": float(kl.max()),
            "same_best": self.same_best / len(kl),
            "logit_max_difference": self.largest,
            "logit_rms_difference": math.sqrt(self.squares / self.count),
            "logit_correlation": min(1.0, float(self.comoments[0, 1]) / deviations),
        }  # fmt: skip


def log_softmax(logits: Array) -> Array:
    """Logits (T, V) to log probabilities (T, V) in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def mean_and_error(values: Array) -> tuple[float, float]:
    """The mean of at least two values, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


def windows(ids: Sequence[int], size: int, bos: int | None) -> list[list[int]]:
    """The whole windows of a text; where there is a `bos`, it takes the place of each one's first
    id. The text's own BOS is among `ids`."""
    cuts = [list(ids[at : at + size]) for at in range(0, len(ids) - size + 1, size)]
    return cuts if bos is None else [[bos, *cut[1:]] for cut in cuts]


def read_windows(
    cuts: Sequence[Sequence[int]], readers: Sequence[Reader], batch: int, report: Report
) -> Divergence:
    """Let a model, or a model and its reference, read all windows, `batch` tokens at a time.

    Raises UsageError when their vocabularies differ in size.
    """
    divergence = Divergence()
    for reader in readers:
        reader.llm.chunk = batch
    for i, cut in enumerate(cuts):
        so_far = f": perplexity {readers[0].figures()['perplexity']:.3f} so far" if i else ""
        report(f"window {i + 1} of {len(cuts)}{so_far}", i / len(cuts))
        half, last = len(cut) // 2, len(cut) - 1  # what would follow the last is not known
        for reader in readers:
            reader.begin(cut[:half])
        for at in range(half, last, batch):
            end = min(at + batch, last)
            _count(readers, cut[at:end], cut[at + 1 : end + 1], divergence)
    return divergence


def _count(
    readers: Sequence[Reader], ids: Sequence[int], targets: Sequence[int], divergence: Divergence
) -> None:
    """Read `ids`, and see how the models expected `targets`, which follow them one by one."""
    logits = [reader.read(ids) for reader in readers]
    if logits[0].shape != logits[-1].shape:
        sizes = " and ".join(str(each.shape[-1]) for each in logits)
        raise UsageError(
            f"--reference {readers[-1].name}: the two vocabularies have {sizes} tokens; "
            "give a model with the same vocabulary"
        )
    for row in range(0, len(ids), ROWS):
        part = slice(row, row + ROWS)
        blocks = [each[part] for each in logits]
        logs = [r.score(b, targets[part]) for r, b in zip(readers, blocks, strict=True)]
        if len(readers) == 2:
            divergence.add(*blocks, *logs)
