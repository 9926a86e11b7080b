"""Sequences side by side: each must get what it gets alone, to the last bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from llm_checks import Countdown

from onnxstream_nb import passes, session
from onnxstream_nb.errors import Interrupted
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.lowering import Replay
from onnxstream_nb.sequences import Sequences, Strand, can_share_passes, packed
from onnxstream_nb.session import Session, decode_constant, load_graph

FOLDER = Path(__file__).parent / "fixtures" / "models"
TINY = Tiny(hidden=64, head_dim=16, intermediate=96, context=1024)

Array = np.ndarray[Any, Any]


def random_ids(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(count).integers(3, TINY.vocab, count)]


def written(folder: Path, encoding: str = "Q8_0", tiny: Tiny = TINY) -> Path:
    path = folder / "tiny.gguf"
    if not path.exists():
        write_gguf(path, tiny, encoding)
    return path


def alone(path: Path, prompt: Sequence[int], steps: int, **options: Any) -> list[Array]:
    """The logits after a prompt and after each of the likeliest tokens that follow."""
    model = LanguageModel(path, **options)
    rows = [model.feed(prompt).copy()]
    for _ in range(steps):
        rows.append(model.feed([int(rows[-1].argmax())]).copy())
    model.close()
    return rows


def advance(
    sequences: Sequences, strands: Sequence[Strand], rows: dict[Strand, list[Array]]
) -> None:
    """One step; whoever got logits waits for the likeliest token."""
    for strand, logits in sequences.step(strands):
        rows[strand].append(logits.copy())
        strand.waiting = [int(logits.argmax())]


def same(got: Sequence[Array], wanted: Sequence[Array]) -> None:
    for mine, other in zip(got, wanted, strict=False):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_cache", ["f16", "q8"])
@pytest.mark.parametrize(
    ("encoding", "load", "precision"),
    [("F32", "stream", "exact"), ("F16", "stream", "fast"), ("F16", "mmap", "exact"),
     ("BF16", "ram", "fast"), ("Q8_0", "ram", "auto"), ("Q4_0", "stream", "auto")],
)  # fmt: skip
def test_each_gets_what_it_gets_alone(
    encoding: str, load: str, precision: str, kv_cache: str, threads: int, tmp_path: Path,
    panels_pay: None,
) -> None:  # fmt: skip
    """Prompts of one token, of a few, of many and of several chunks; two come in later."""
    options = {"load": load, "precision": precision, "kv_cache": kv_cache, "threads": threads}
    path = written(tmp_path, encoding)
    prompts = [random_ids(n) for n in (1, 5, 40, 9, 600, 12, 300)]
    model = LanguageModel(path, **options)
    assert can_share_passes(model.graph, model.pairs)
    sequences, rows = Sequences(model, 7), {}
    strands = []
    for prompt in prompts:
        strands.append(sequences.open(TINY.context))
        strands[-1].waiting, rows[strands[-1]] = list(prompt), []
    for step in range(9):
        advance(sequences, strands[: 5 if step < 3 else 7], rows)
    for strand, prompt in zip(strands, prompts, strict=True):
        assert len(rows[strand]) >= 3
        assert strand.tokens[: len(prompt)] == prompt
        assert strand.cache.length == len(strand.tokens) == len(prompt) + len(rows[strand]) - 1
        same(rows[strand], alone(path, prompt, len(rows[strand]) - 1, **options))
    model.close()


@pytest.mark.parametrize("load", ["ram", "stream"])
def test_each_gets_what_it_gets_alone_in_a_window(load: str, tmp_path: Path) -> None:
    path = written(tmp_path, "F32", replace(TINY, window=7))
    options = {"load": load, "precision": "exact", "threads": 2}
    model = LanguageModel(path, **options)
    sequences, rows = Sequences(model, 4), {}
    prompts = [random_ids(n) for n in (3, 60, 9, 200)]
    strands = [sequences.open(TINY.context) for _ in prompts]
    for strand, prompt in zip(strands, prompts, strict=True):
        strand.waiting, rows[strand] = list(prompt), []
    for _ in range(8):
        advance(sequences, strands, rows)
    assert model.passes < 2 * 8
    for strand, prompt in zip(strands, prompts, strict=True):
        same(rows[strand], alone(path, prompt, len(rows[strand]) - 1, **options))
    model.close()


def test_passes_are_shared(tmp_path: Path) -> None:
    model = LanguageModel(written(tmp_path), load="ram")
    sequences, rows = Sequences(model, 4), {}
    strands = [sequences.open(TINY.context) for _ in range(4)]
    for strand, count in zip(strands, (20, 30, 40, 3), strict=True):
        strand.waiting, rows[strand] = random_ids(count), []
    advance(sequences, strands, rows)
    assert model.passes == 2  # a pass for the prompts, one for what is short as tokens
    for _ in range(5):
        advance(sequences, strands, rows)
    assert model.passes == 7
    assert all(len(r) == 6 for r in rows.values())
    model.close()


def test_more_than_a_few_share_a_pass_all_the_same(tmp_path: Path) -> None:
    path = written(tmp_path)
    model = LanguageModel(path, load="ram")
    sequences, rows = Sequences(model, 12), {}
    strands = [sequences.open(TINY.context) for _ in range(12)]
    for strand in strands:
        strand.waiting, rows[strand] = random_ids(10), []
    for _ in range(4):
        advance(sequences, strands, rows)
    assert model.passes == 4
    wanted = alone(path, random_ids(10), 3, load="ram")
    for mine in rows.values():
        for got, row in zip(mine, wanted, strict=True):
            np.testing.assert_allclose(got, row, rtol=0, atol=1e-3)
    model.close()


def test_a_stopped_pass_leaves_all_as_they_were(tmp_path: Path) -> None:
    model = LanguageModel(written(tmp_path), load="stream")
    sequences, prompt = Sequences(model, 2), random_ids(20)
    strands = [sequences.open(TINY.context) for _ in range(2)]
    for strand in strands:
        strand.waiting = list(prompt)
    with pytest.raises(Interrupted):
        list(sequences.step(strands, Countdown(7)))
    for strand in strands:
        assert (strand.tokens, strand.waiting, strand.cache.length) == ([], prompt, 0)
    rows: dict[Strand, list[Array]] = {strand: [] for strand in strands}
    advance(sequences, strands, rows)
    wanted = alone(written(tmp_path), prompt, 0, load="stream")
    for strand in strands:
        same(rows[strand], wanted)
    model.close()


def test_a_strand_goes_back(tmp_path: Path) -> None:
    model = LanguageModel(written(tmp_path), load="ram")
    sequences = Sequences(model, 1)
    strand, rows = sequences.open(TINY.context), []
    for _ in range(2):
        strand.waiting = random_ids(12)
        rows += [logits.copy() for _, logits in sequences.step([strand])]
        strand.rewind(0)
    same(rows[:1], rows[1:])
    model.close()


def test_a_closed_strand_gives_its_memory_back(tmp_path: Path) -> None:
    model = LanguageModel(written(tmp_path), load="ram")
    sequences = Sequences(model, 2)
    strand, other = sequences.open(TINY.context), sequences.open(TINY.context)
    strand.waiting, other.waiting = random_ids(30), random_ids(9)
    for _ in range(3):  # the last of which are recorded, with the caches' addresses
        assert len(list(sequences.step([strand, other]))) == 2
        strand.waiting, other.waiting = [5], [6]
    assert model.session._replay is not None
    memory = [weakref.ref(slot.array) for slot in strand.cache.slots.values()]
    assert len(memory) == 4 and all(m() is not None for m in memory)
    sequences.close(strand)
    gc.collect()
    assert all(m() is None for m in memory)
    assert other.cache.nbytes > 0
    model.close()


def test_next_tokens_are_replayed_while_the_same_strands_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, panels_pay: None
) -> None:
    """Recorded when strands come or go; else nothing is run singly."""
    path, walked = written(tmp_path), []
    walk, record = Session._walk, Replay._record
    monkeypatch.setattr(Session, "_walk", lambda *a: walked.append("walk") or walk(*a))
    monkeypatch.setattr(
        Replay, "_record", lambda *a: walked.append("record") or record(*a)
    )  # a step of the plan
    model = LanguageModel(path, load="ram", threads=2)
    steps = len(model.session.plan.steps)
    sequences, rows = Sequences(model), {}
    strands = [sequences.open(TINY.context) for _ in range(3)]
    for strand, count in zip(strands, (204, 20, 30), strict=True):
        strand.waiting, rows[strand] = random_ids(count), []
    advance(sequences, strands, rows)
    assert walked == ["walk"]
    for step in range(20):
        walked.clear()
        if step == 12:
            sequences.close(strands.pop(1))
        advance(sequences, strands, rows)
        assert walked == ["record"] * steps * (step in (0, 12)), step
    for strand, count in zip(strands, (204, 30), strict=True):
        same(rows[strand], alone(path, random_ids(count), 20, load="ram", threads=2))
    model.close()


def test_of_large_models_several_tokens_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "BATCH_BYTES", 1)
    model = LanguageModel(written(tmp_path), load="mmap")
    sequences = Sequences(model)
    strands = [sequences.open(TINY.context), sequences.open(TINY.context)]
    for _ in range(3):
        for strand in strands:
            strand.waiting = [5]
        list(sequences.step(strands))
    assert model.session._replay is None
    for _ in range(2):
        model.feed([5])
    assert model.session._replay is not None
    model.close()


def test_packing_is_first_fit() -> None:
    parts: list[Any] = [("a", 6), ("b", 1), ("c", 3), ("d", 1), ("e", 9), ("f", 2)]
    assert [[name for name, _ in p] for p in packed(parts, 8)] == [
        ["a", "b", "d"],
        ["c", "f"],
        ["e"],
    ]


# -- which graphs can -------------------------------------------------------------------------


def shares(path: Path) -> bool:
    graph = passes.optimize(load_graph(path), decode_constant)
    graph = passes.rewrite_logit_rows(passes.rewrite_windows(graph, decode_constant))
    return can_share_passes(graph, passes.find_cache(graph))


@pytest.mark.parametrize(
    "tiny", [Tiny(), Tiny(architecture="qwen3"), Tiny(tied=True), Tiny(window=16)]
)
def test_ggufs_can(tiny: Tiny, tmp_path: Path) -> None:
    assert shares(written(tmp_path, "F32", tiny))


@pytest.mark.parametrize(
    "name",
    ["llama_gqa_op14/model.onnx", "mistral_sw8_op14/model.onnx", "llama_gqa_dyn23/model.onnx",
     "onnxstream_llama_small"],
)  # fmt: skip
def test_exports_with_masks_cannot(name: str) -> None:
    assert not shares(FOLDER / name)
