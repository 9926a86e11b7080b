"""Perplexity and divergence, against the same figures computed one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llama_oracle import Array
from llama_oracle import logits as oracle
from llm_checks import Countdown, near
from onnx_models import refusal
from perplexity_oracle import TINY, Held, counted, expected, expected_divergence, two_models

from onnxstream_nb import passes
from onnxstream_nb.errors import Interrupted, UnsupportedError, UsageError
from onnxstream_nb.formats import load
from onnxstream_nb.graph import Graph, WeightRef
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.perplexity import Divergence, Reader, log_softmax, read_windows, windows

IDS = [int(i) for i in np.random.default_rng(1).integers(0, TINY.vocab, 24)]


def silent(text: str, fraction: float | None) -> None:
    assert text and (fraction is None or 0 <= fraction < 1)


class RuledLLM:
    """Logits that depend on every id in the cache, of a rule that `seed` varies by a little."""

    def __init__(self, vocab: int = 50, seed: int = 0) -> None:
        self.vocab, self.seed, self.chunk = vocab, seed, 1000
        self.tokens: list[int] = []
        self.fed: list[int] = []

    def row(self, ids: Sequence[int]) -> Array:
        own = np.random.default_rng([self.seed, *ids]).standard_normal(self.vocab)
        common = np.random.default_rng([99, *ids]).standard_normal(self.vocab)
        return (20 + 3 * common + self.seed * own).astype(np.float32)

    def rows(self, ids: Sequence[int]) -> Array:
        return np.stack([self.row(ids[: i + 1]) for i in range(len(ids))])

    def logits(self, ids: Sequence[int]) -> Array:
        assert 0 < len(ids) <= self.chunk
        self.fed.append(len(ids))
        before, self.tokens = len(self.tokens), [*self.tokens, *ids]
        return self.rows(self.tokens)[before:]

    def feed(self, ids: Sequence[int]) -> Array:
        self.tokens += ids
        return self.row(self.tokens)

    def rewind(self, length: int) -> None:
        del self.tokens[length:]


def reader(llm: Any, name: str = "m") -> Reader:
    return Reader(name, llm, "exact")


CUTS = [[int(i) for i in np.random.default_rng(size).integers(0, 50, size)] for size in (8, 9, 64)]


@pytest.mark.parametrize("batch", [1, 3, 20, 1000])
@pytest.mark.parametrize("cut", CUTS, ids=len)
def test_perplexity_of_two_windows(cut: list[int], batch: int) -> None:
    cuts = [cut, cut[::-1]]
    llm = RuledLLM()
    only = reader(llm)
    read_windows(cuts, [only], batch, silent)
    pairs = list(counted(cuts, llm.rows))
    assert only.figures() == pytest.approx(expected(pairs), rel=1e-12)
    assert sum(map(len, only.nll)) == len(pairs) == 2 * (len(cut) - 1 - len(cut) // 2)
    assert only.tokens == 2 * (len(cut) - 1) and only.seconds > 0
    assert llm.tokens == cut[::-1][:-1]  # the second window began with an empty cache


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_divergence_from_a_reference(batch: int) -> None:
    cuts = [CUTS[2], CUTS[2][::-1], CUTS[1]]
    ours, theirs = RuledLLM(seed=1), RuledLLM(seed=2)
    readers = [reader(ours), reader(theirs)]
    found = read_windows(cuts, readers, batch, silent)
    pairs, references = (list(counted(cuts, llm.rows)) for llm in (ours, theirs))
    wanted = expected_divergence(pairs, references)
    assert found.figures() == pytest.approx(wanted, rel=1e-11)
    assert 0.1 < wanted["same_best"] < 0.9 and wanted["kl_mean"] > 0.1
    assert readers[1].figures() == pytest.approx(expected(references), rel=1e-12)


def test_a_model_beside_itself() -> None:
    found = read_windows([CUTS[2]], [reader(RuledLLM()), reader(RuledLLM())], 7, silent).figures()
    assert (found["same_best"], found["logit_correlation"]) == (1.0, pytest.approx(1, abs=1e-12))
    assert all(v == 0 for k, v in found.items() if k.startswith("kl_") or k.endswith("difference"))


def test_moments_of_logits_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    a = 1e6 + rng.standard_normal((40, 30))
    b = a + 0.5 * rng.standard_normal(a.shape)
    found = Divergence()
    for rows in (slice(0, 1), slice(1, 23), slice(23, 40)):
        found.add(a[rows], b[rows], log_softmax(a[rows]), log_softmax(b[rows]))
    wanted = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert found.figures()["logit_correlation"] == pytest.approx(wanted, rel=1e-9)


def test_log_softmax_of_large_logits() -> None:
    row = np.array([[1e4, 1e4, -1e4], [-3e38, 3e38, 0]], np.float32)
    np.testing.assert_allclose(log_softmax(row)[0], [-math.log(2), -math.log(2), -2e4], rtol=1e-4)
    assert log_softmax(row)[1, 1] == 0 and np.isfinite(log_softmax(row)).all()


def test_windows_are_whole_and_begin_with_bos() -> None:
    ids = list(range(100, 125))
    assert windows(ids, 8, None) == [ids[0:8], ids[8:16], ids[16:24]]
    assert windows(ids, 8, 1) == [[1, *ids[1:8]], [1, *ids[9:16]], [1, *ids[17:24]]]
    assert windows(ids, 25, None) == [ids] and windows(ids, 26, None) == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = RuledLLM()
    row = llm.row
    monkeypatch.setattr(llm, "row", lambda ids: row(ids) if len(ids) < 60 else row(ids) * wrong)
    with np.errstate(all="ignore"):
        message = refusal(lambda: read_windows([CUTS[2]], [reader(llm, "x.gguf")], 9, silent))
    assert message.startswith("x.gguf: its logits are not all finite")


def test_vocabularies_of_two_sizes() -> None:
    readers = [reader(RuledLLM()), reader(RuledLLM(vocab=51), "other")]
    message = refusal(lambda: read_windows([CUTS[1]], readers, 9, silent), UsageError)
    assert message.startswith("--reference other: the two vocabularies have 50 and 51 tokens")


# -- logits of every position --------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return two_models(tmp_path_factory.mktemp("perplexity"))


@pytest.mark.parametrize("load", ["mmap", "stream"])
@pytest.mark.parametrize("chunk", [1, 5, 24, 512])
def test_logits_of_every_position(chunk: int, load: str, held: Held) -> None:
    wanted = oracle(TINY, held.weights[0], IDS)
    model = LanguageModel(held.paths[0], load=load, precision="exact")
    model.chunk = chunk
    near(model.logits(IDS), wanted)
    assert model.tokens == IDS
    model.rewind(0)
    near(model.feed(IDS[:9]), wanted[8])
    near(model.logits(IDS[9:10]), wanted[9:10])
    near(model.logits(IDS[10:]), wanted[10:])
    assert model.passes == sum(-(-n // chunk) for n in (24, 9, 1, 14))
    model.close()


def test_logits_a_few_at_a_time(held: Held) -> None:
    model = LanguageModel(held.paths[0], precision="exact")
    model.logit_chunk = 5
    near(model.logits(IDS), oracle(TINY, held.weights[0], IDS))
    assert model.passes == 5 and model.chunk > len(IDS)
    model.close()


def test_logits_and_feed_refuse_alike(held: Held) -> None:
    model = LanguageModel(held.paths[0], context=8)
    refusal(lambda: model.logits([]), UsageError)
    assert "--context" in refusal(lambda: model.logits(IDS), UsageError)
    with pytest.raises(Interrupted):
        model.logits(IDS[:8], Countdown(3))
    assert model.tokens == []
    model.close()


def of_the_last_position(graph: Graph) -> Graph:
    """As some exports are: the head sees one position, whatever is asked."""
    picked = passes.rewrite_logit_rows(graph)
    logits = replace(picked.outputs[0], shape=(1, 1, TINY.vocab))
    last = WeightRef("last", (1,), "int64", np.array([-1]).tobytes(), 0, 8)
    nodes = [
        replace(n, inputs=tuple("last" if i == passes.LOGIT_ROWS else i for i in n.inputs))
        for n in picked.nodes
    ]
    return picked.with_(
        nodes=tuple(nodes), inputs=graph.inputs, outputs=(logits, *picked.outputs[1:]),
        initializers={**picked.initializers, "last": last},
    )  # fmt: skip


def test_models_that_compute_the_last_logits_only(held: Held) -> None:
    cut = LanguageModel(of_the_last_position(load(held.paths[0])), precision="exact")
    near(cut.feed(IDS), oracle(TINY, held.weights[0], IDS)[-1])
    cut.rewind(0)
    message = refusal(lambda: cut.logits(IDS), UnsupportedError)
    assert "1 of 24 positions" in message and "--batch 1" in message
    cut.rewind(0)
    near(cut.logits(IDS[:1]), oracle(TINY, held.weights[0], IDS[:1]))
    cut.close()
