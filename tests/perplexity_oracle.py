"""What the tests of perplexity share: the figures by their definitions, two tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from llama_fixtures import random_weights, write_gguf
from llama_oracle import Array, Tiny
from tokenizer_fixtures import gguf_metadata, small_bpe

VOCAB = small_bpe().get_vocab_size()
TINY = Tiny(vocab=VOCAB, context=64)

Pairs = Sequence[tuple[Array, int]]
"""The logits (V,) before each counted token, and its id."""


def probabilities(row: Array) -> list[float]:
    top = float(max(row))
    total = math.fsum(math.exp(float(x) - top) for x in row)
    return [float(x) - top - math.log(total) for x in row]


def counted(
    cuts: Sequence[Sequence[int]], rows: Callable[[Sequence[int]], Array]
) -> Iterator[tuple[Array, int]]:
    """(logits, target) of all positions in the second halves; `rows` gives a window's logits."""
    for cut in cuts:
        logits = rows(cut)
        for position in range(len(cut)):
            if position > len(cut) // 2:
                yield logits[position - 1], cut[position]


def expected(pairs: Pairs) -> dict[str, float]:
    nll = [-probabilities(row)[target] for row, target in pairs]
    mean = math.fsum(nll) / len(nll)
    variance = math.fsum((x - mean) ** 2 for x in nll) / (len(nll) - 1)
    value = math.exp(mean)
    return {"perplexity": value, "perplexity_error": value * math.sqrt(variance / len(nll))}


def expected_divergence(pairs: Pairs, references: Pairs) -> dict[str, float]:
    kl = []
    for (row, _), (reference, _) in zip(pairs, references, strict=True):
        q, p = probabilities(row), probabilities(reference)
        kl.append(math.fsum(math.exp(b) * (b - a) for a, b in zip(q, p, strict=True)))
    ours, theirs = (np.stack([row for row, _ in each]) for each in (pairs, references))
    difference = ours.astype(np.float64) - theirs
    return {
        "kl_mean": math.fsum(kl) / len(kl),
        "kl_error": float(np.std(kl, ddof=1)) / math.sqrt(len(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)), "kl_max": max(kl),
        "same_best": float(np.mean(ours.argmax(1) == theirs.argmax(1))),
        "logit_max_difference": float(np.abs(difference).max()),
        "logit_rms_difference": float(np.sqrt((difference**2).mean())),
        "logit_correlation": float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]),
    }  # fmt: skip


@dataclass(frozen=True)
class Held:
    """GGUF files with a tokenizer, and the weights that they hold."""

    paths: tuple[Path, Path]
    weights: tuple[dict[str, Array], dict[str, Array]]


def two_models(folder: Path) -> Held:
    """A model of random weights, and one whose weights are a little off."""
    rng = np.random.default_rng(5)
    off = {
        name: (w + 0.05 * w.std() * rng.standard_normal(w.shape)).astype(np.float32)
        for name, w in random_weights(TINY).items()
    }
    paths = (folder / "a.gguf", folder / "b.gguf")
    first = write_gguf(paths[0], TINY, extra=tokenizer)
    return Held(paths, (first, write_gguf(paths[1], TINY, weights=off, extra=tokenizer)))


def tokenizer(writer: gguf.GGUFWriter, **changes: Any) -> None:
    """`small_bpe`, with a BOS before every text."""
    fields = gguf_metadata(small_bpe()) | {"tokenizer.ggml.add_bos_token": True} | changes
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(fields["tokenizer.ggml.add_bos_token"])
