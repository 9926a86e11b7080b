"""Exported language models end to end: PyTorch's results, the cache, one fused layer each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_checks import exact_model

from onnxstream_nb import passes
from onnxstream_nb.kvcache import KVSlot
from onnxstream_nb.session import Session, decode_constant, load_graph

FOLDER = Path(__file__).parent / "fixtures" / "models"
EXPORTS = ("llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23")
STREAMED = "onnxstream_llama_small"
IDS = (1, 5, 9, 200, 33, 7)  # of STREAMED's reference logits
FLOAT16_CACHE = 2e-3
"""Of the largest logit: keys and values round to 11 bits, 5e-4 of each, and meet in two layers."""

Array = np.ndarray[Any, Any]


@cache
def fused(name: str) -> Any:
    """The rewritten graph, which all kinds of loading share."""
    path = FOLDER / name if name == STREAMED else FOLDER / name / "model.onnx"
    return passes.optimize(load_graph(path), decode_constant)


def cases(name: str) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """Feeds and PyTorch's results of each case."""
    found = []
    for path in sorted((FOLDER / name).glob("case*.npz")):
        with np.load(path) as data:
            given = {k.removeprefix("in__"): data[k] for k in data if k.startswith("in__")}
            wanted = {k.removeprefix("out__"): data[k] for k in data if k.startswith("out__")}
        found.append((given, wanted))
    return found


def near(got: Any, wanted: Array, tolerance: float) -> None:
    assert np.shape(got) == wanted.shape
    assert np.abs(np.asarray(got) - wanted).max() <= tolerance * np.abs(wanted).max()


def reference() -> Array:
    """PyTorch's logits (6, 1000) of IDS with an empty past."""
    return np.fromfile(FOLDER / STREAMED / "reference_logits.f32", np.float32).reshape(6, 1000)


def layers(graph: Any) -> int:
    return sum(v.name.startswith("pkv") for v in graph.inputs) // 2


def empty_past(graph: Any) -> dict[str, Array]:
    return {
        v.name: np.zeros([n if isinstance(n, int) else 0 for n in v.shape], v.dtype)
        for v in graph.inputs
        if v.name.startswith("pkv")
    }


def language_feeds(graph: Any, ids: Any, past: int) -> dict[str, Array]:
    """Feeds of a step without those of the cache."""
    known = {
        "input_ids": np.array([ids]),
        "position_ids": np.arange(past, past + len(ids))[None],
        "attention_mask": np.ones((1, past + len(ids))),
    }
    return {v.name: known[v.name].astype(v.dtype) for v in graph.inputs if v.name in known}


def whole(graph: Any, ids: Any) -> Array:
    """Logits (T, V) of all ids in one run with an empty past, without any cache in float16."""
    with Session(graph, optimize=False) as session:
        given = language_feeds(graph, ids, 0) | empty_past(graph)
        result: Array = session.run(given, ["logits"])["logits"][0]
    return result


# -- a session, arrays in and arrays out


def test_the_cases_are_there() -> None:
    assert all(len(cases(name)) == 4 for name in EXPORTS)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
@pytest.mark.parametrize("name", EXPORTS)
def test_cases(name: str, load: str, threads: int) -> None:
    with Session(fused(name), load=load, threads=threads, optimize=False) as session:
        for given, wanted in cases(name):
            got = session.run(given)
            assert got.keys() == wanted.keys()
            for output, values in wanted.items():
                near(got[output], values, 1e-4)


@pytest.mark.parametrize("name", EXPORTS)
def test_cases_from_the_file_and_without_rewriting(name: str) -> None:
    for optimize in (True, False):
        with Session(FOLDER / name / "model.onnx", optimize=optimize) as session:
            for given, wanted in cases(name):
                got = session.run(given)
                for output, values in wanted.items():
                    near(got[output], values, 1e-4)


@pytest.mark.parametrize("name", [*EXPORTS, STREAMED])
def test_one_attention_a_layer(name: str) -> None:
    path = FOLDER / name if name == STREAMED else FOLDER / name / "model.onnx"
    with Session(path) as session:
        steps = [step.node.op_type for step in session.plan.steps]
        lines = [line.split()[1] for line in session.describe().splitlines()]
    assert lines == steps
    assert layers(session.graph) == 2
    assert steps.count("Attention") == 2
    assert steps.count("RotaryEmbedding") == 4
    assert steps.count("RMSNormalization") == 5
    assert steps.count("MatMul") == 15
    assert not {"Softmax", "Pow", "Sqrt", "Neg", "Sigmoid"} & set(steps)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
def test_onnxstream_folder(load: str, threads: int) -> None:
    graph = fused(STREAMED)
    with Session(graph, load=load, threads=threads, optimize=False) as session:
        got = session.run(language_feeds(graph, IDS, 0) | empty_past(graph))
    near(got["logits"][0], reference(), 1e-5)


@pytest.mark.parametrize("steps", [(1,) * 6, (4, 1, 1), (1, 5), (3, 3)])
def test_onnxstream_folder_with_arrays_fed_back(steps: tuple[int, ...]) -> None:
    graph = fused(STREAMED)
    past, rows, start = empty_past(graph), [], 0
    with Session(graph, optimize=False) as session:
        for step in steps:
            given = language_feeds(graph, IDS[start : start + step], start)
            got = session.run(given | past)
            rows.append(got["logits"][0])
            past = {name: got[f"o{name}"] for name in past}
            start += step
            assert all(p.shape[2] == start for p in past.values())
    near(np.concatenate(rows), reference(), 1e-5)


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_with_arrays_fed_back(name: str) -> None:
    graph = fused(name)
    given, wanted = cases(name)[2]  # six ids, nothing before them
    past, rows = empty_past(graph), []
    with Session(graph, optimize=False) as session:
        for i, token in enumerate(given["input_ids"][0]):
            got = session.run(language_feeds(graph, [token], i) | past)
            rows.append(got["logits"][0])
            past = {p: got[f"o{p}"] for p in past}
    near(np.concatenate(rows), wanted["logits"][0], 1e-4)
    for name_, array in past.items():
        near(array, wanted[f"o{name_}"], 1e-4)


# -- a language model, with its cache in float16


def ids_of(name: str, count: int) -> list[int]:
    vocabulary = 1000 if name == STREAMED else 320
    return [int(i) for i in np.random.default_rng(count).integers(0, vocabulary, count)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
def test_onnxstream_folder_token_by_token(load: str, threads: int) -> None:
    model = exact_model(FOLDER / STREAMED, load=load, threads=threads)
    rows = [model.feed([token]) for token in IDS]
    near(np.stack(rows), reference(), FLOAT16_CACHE)
    assert model.tokens == list(IDS)
    model.rewind(0)
    near(model.feed(IDS), reference()[-1], FLOAT16_CACHE)
    model.close()


@pytest.mark.parametrize("name", [*EXPORTS, STREAMED])
@pytest.mark.parametrize(
    "chunks", [(1,) * 19, (19,), (7, 1, 1, 1, 1, 5, 3), (2, 17)], ids=lambda c: f"{len(c)} chunks"
)
def test_chunks_give_what_the_whole_gives(name: str, chunks: tuple[int, ...]) -> None:
    ids = ids_of(name, 19)
    wanted = whole(fused(name), ids)
    model = exact_model(fused(name))
    start = 0
    for size in chunks:
        logits = model.feed(ids[start : start + size])
        start += size
        assert logits.dtype == np.float32
        near(logits, wanted[start - 1], FLOAT16_CACHE)
    assert model.tokens == ids
    model.close()


@pytest.mark.parametrize("name", [*EXPORTS, STREAMED])
def test_rewinding_and_feeding_again(name: str) -> None:
    ids = ids_of(name, 23)
    model = exact_model(fused(name), load="ram")
    first = [model.feed([token]) for token in ids]
    for length in (22, 9, 1, 0):
        model.rewind(length)
        assert model.tokens == ids[:length]
        again = [model.feed([token]) for token in ids[length:]]
        np.testing.assert_array_equal(np.stack(again), np.stack(first[length:]))
    model.rewind(4)
    other = [ids[-1], ids[0], 3]
    different = model.feed(other)
    near(different, whole(fused(name), ids[:4] + other)[-1], FLOAT16_CACHE)
    model.close()


@pytest.mark.parametrize("name", [*EXPORTS, STREAMED])
def test_no_token_copies_the_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention appends in place, and what only asks for the past's length gets no copy of it."""
    model = exact_model(fused(name))
    model.feed(ids_of(name, 19))
    assert all(isinstance(slot, KVSlot) for slot in model._cache.slots.values())
    copied = []
    as_array = KVSlot.__array__
    monkeypatch.setattr(
        KVSlot, "__array__", lambda slot, *a, **k: copied.append(slot) or as_array(slot, *a, **k)
    )
    before = model.cache_bytes, [slot.address for slot in model._cache.slots.values()]
    for token in (1, 2, 3, 4):
        model.feed([token])
    assert not copied
    assert (model.cache_bytes, [slot.address for slot in model._cache.slots.values()]) == before
    model.close()


def test_the_window_of_mistral_is_a_window() -> None:
    """Eight positions: what came before them changes nothing in one layer, two reach 14 back."""
    name = "mistral_sw8_op14"
    ids = ids_of(name, 30)
    changed = [(i + 1) % 320 for i in ids[:10]] + ids[10:]
    rows, others = whole(fused(name), ids), whole(fused(name), changed)
    reach = 2 * (8 - 1)
    np.testing.assert_allclose(rows[10 + reach :], others[10 + reach :], rtol=0, atol=1e-6)
    assert np.abs(rows[10:17] - others[10:17]).max() > 1e-3
    model = exact_model(fused(name))
    for i, token in enumerate(ids):
        near(model.feed([token]), rows[i], FLOAT16_CACHE)
    model.close()
