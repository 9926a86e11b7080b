"""Batches of prompts over a tiny model: each reply is the one that it would be alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_models import ENDS, TINY, open_tiny, prompts, write_tiny

from onnxstream_nb import formats, sequences, session, spill
from onnxstream_nb.batch import Batch, BatchItem, BatchRequest
from onnxstream_nb.errors import UsageError
from onnxstream_nb.formats import onnx_write
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.model import Model
from onnxstream_nb.session import decode_constant

FOLDER = Path(__file__).parent / "fixtures" / "models"

pytestmark = pytest.mark.usefixtures("panels_pay")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("batch") / "tiny.gguf")


Open = Callable[..., Model]


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Opens the model, and closes it in the end."""
    models = []

    def open_model(file: Path = path, **options: Any) -> Model:
        models.append(open_tiny(file, **options))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


def ended(batch: Batch) -> list[BatchItem]:
    """All items in the order of the requests, once each has ended."""
    items = [item for item in batch if item.done]
    assert len({item.index for item in items}) == len(items)
    return sorted(items, key=lambda item: item.index)


def same_as_alone(model: Model, item: BatchItem, prompt: str, **options: Any) -> None:
    model.llm.rewind(0)
    reply = model.generate(prompt, **options)
    tokens = list(reply)
    assert item.error is None and item.generation is not None
    assert item.tokens == tokens  # text, id and logprob of each
    assert item.stop_reason == reply.stats.stop_reason
    mine, other = item.generation.stats, reply.stats
    assert mine.prompt_tokens == other.prompt_tokens
    assert mine.completion_tokens == other.completion_tokens == len(tokens)


# -- the same replies --------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, ENDS], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, None])
@pytest.mark.parametrize(
    ("threads", "kv_cache"), [(1, "f16"), (2, "q8")], ids=["1 thread, f16", "2 threads, q8"]
)
def test_each_reply_is_the_one_it_is_alone(
    threads: int, kv_cache: str, batch_size: int | None, sampling: Any, opened: Open
) -> None:
    """Prompts of a few tokens and of two chunks; they come in and leave as there are places."""
    given = prompts(1, 30, 700, 3, 90, 12, 250, 2, 40, 5, 61)
    model = opened(threads=threads, kv_cache=kv_cache)
    requests = [BatchRequest(p, sampling={"seed": i}) for i, p in enumerate(given)]
    batch = model.generate_batch(requests, batch_size=batch_size, max_tokens=40, **sampling)
    assert batch.side_by_side
    items = ended(batch)
    assert len(items) == len(given) and batch.stopped
    for item, prompt in zip(items, given, strict=True):
        same_as_alone(model, item, prompt, max_tokens=40, **sampling | {"seed": item.index})
    assert len({len(item.tokens) for item in items}) > 3 * (sampling is ENDS)


def test_requests_may_differ_in_everything(opened: Open) -> None:
    model = opened()
    requests = [
        BatchRequest("one", system="be brief", max_tokens=3),
        BatchRequest("two", sampling={"temperature": 2.0, "seed": 9}),
        BatchRequest([{"role": "user", "content": "three"}], max_tokens=20),
        BatchRequest("four", sampling={"seed": 1}),
    ]
    items = ended(model.generate_batch(requests, max_tokens=9, seed=2, system="say"))
    same_as_alone(model, items[0], "one", system="be brief", max_tokens=3, seed=2)
    same_as_alone(model, items[1], "two", system="say", max_tokens=9, temperature=2.0, seed=9)
    same_as_alone(model, items[2], "three", max_tokens=20, seed=2)
    same_as_alone(model, items[3], "four", system="say", max_tokens=9, seed=1)


def test_raw_prompts(opened: Open) -> None:
    model = opened()
    items = ended(model.generate_batch(["ab", "c"], raw=True, max_tokens=4, temperature=0))
    assert items[0].generation is not None and items[0].generation.prompt_ids == [97, 98]
    same_as_alone(model, items[0], "ab", raw=True, max_tokens=4, temperature=0)


def test_stop_strings(opened: Open) -> None:
    model = opened()
    sampling = {"temperature": 1.0, "seed": 3, "stop": ("e", "xx"), "max_tokens": 60}
    items = ended(model.generate_batch(prompts(20, 9, 33, 14), **sampling))
    assert {item.stop_reason for item in items} == {"stop"}
    assert all("e" not in item.text and "xx" not in item.text for item in items)
    for item, prompt in zip(items, prompts(20, 9, 33, 14), strict=True):
        same_as_alone(model, item, prompt, **sampling)


def test_the_context_ends_replies(opened: Open) -> None:
    model = opened(context=64)
    items = ended(model.generate_batch(prompts(5, 30, 20), temperature=0))
    assert [item.stop_reason for item in items] == ["context"] * 3
    for item, prompt in zip(items, prompts(5, 30, 20), strict=True):
        same_as_alone(model, item, prompt, temperature=0)


@pytest.mark.parametrize("load", ["stream", "mmap"])
def test_however_weights_are_held(load: str, opened: Open) -> None:
    model = opened(load=load, threads=2)
    items = ended(model.generate_batch(prompts(30, 4, 55), max_tokens=6, temperature=0))
    for item, prompt in zip(items, prompts(30, 4, 55), strict=True):
        same_as_alone(model, item, prompt, max_tokens=6, temperature=0)


# -- graphs that are exported ------------------------------------------------------------------


def test_an_export_with_positions(path: Path, opened: Open, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx_write.write(formats.load(path), file, read=decode_constant)
    model = opened(file)
    batch = model.generate_batch(prompts(30, 4), max_tokens=6, temperature=0)
    assert batch.side_by_side
    for item, prompt in zip(ended(batch), prompts(30, 4), strict=True):
        same_as_alone(model, item, prompt, max_tokens=6, temperature=0)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_graph_with_a_mask_goes_one_by_one(batch_size: int | None, opened: Open) -> None:
    model = opened(FOLDER / "onnxstream_llama_small", load="mmap")
    given = prompts(30, 4, 1)
    batch = model.generate_batch(given, max_tokens=6, temperature=0, batch_size=batch_size)
    assert not batch.side_by_side
    order = [item.index for item in batch]
    assert order == sorted(order) and len(order) == 18
    items = ended(model.generate_batch(given, max_tokens=6, temperature=0))
    for item, prompt in zip(items, given, strict=True):
        same_as_alone(model, item, prompt, max_tokens=6, temperature=0)


# -- coming and going --------------------------------------------------------------------------


def test_passes_are_shared_and_places_are_taken_again(opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(prompts(*range(20, 30)), batch_size=4, **ENDS, max_tokens=30)
    under_way: set[int] = set()
    most, tokens = 0, 0
    for item in batch:
        under_way.add(item.index)
        most, tokens = max(most, len(under_way)), tokens + 1
        if item.done:
            under_way.remove(item.index)
    assert most == 4 and not under_way
    assert model.llm.passes < tokens / 2


def test_requests_may_be_added_on_the_way(opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(["a"], max_tokens=5, temperature=0)
    next(batch)
    late = batch.add(BatchRequest("later"))
    assert late.index == 1 and not late.done
    assert [item.index for item in batch if item.done] == [0, 1]
    same_as_alone(model, late, "later", max_tokens=5, temperature=0)


def test_memory_comes_back_as_sequences_end(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[Any]] = []
    make = sequences.Sequences.open

    def open_strand(self: Any, positions: int) -> Any:
        strand = make(self, positions)
        caches.extend(weakref.ref(slot) for slot in strand.cache.slots.values())
        return strand

    monkeypatch.setattr(sequences.Sequences, "open", open_strand)
    model, alive = opened(), []
    batch = model.generate_batch(prompts(*range(20, 28)), batch_size=3, max_tokens=12, **ENDS)
    for item in batch:
        if item.done:
            gc.collect()
            alive.append(sum(cache() is not None for cache in caches))
    assert len(caches) == 8 * 2 * TINY.layers
    assert max(alive) <= 3 * 2 * TINY.layers and alive[-1] == 0


@pytest.mark.parametrize(("places", "expected"), [(0.5, 1), (2.5, 2), (9, 5)])
def test_no_more_come_in_than_their_caches_have_room_for(
    places: float, expected: int, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened()
    room = int(places * model.llm.cache_bytes_at(60 + 10 + 40))
    monkeypatch.setattr(LanguageModel, "cache_room", room)
    given = prompts(*[60] * 7)
    batch = model.generate_batch(given, batch_size=5, max_tokens=40, temperature=0)
    under_way: set[int] = set()
    most = 0
    for item in batch:
        (under_way.discard if item.done else under_way.add)(item.index)
        most = max(most, len(under_way))
    assert most == expected


def test_who_has_no_room_beside_others_gets_the_model_alone(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened()
    monkeypatch.setattr(LanguageModel, "cache_room", 3 * model.llm.cache_bytes_at(100))
    requests = [
        BatchRequest("one"), BatchRequest("two"), BatchRequest("three", max_tokens=1000),
        BatchRequest("four"),
    ]  # fmt: skip
    order, items = [-1], {}
    for item in model.generate_batch(requests, max_tokens=10, temperature=0):
        order += [item.index] * (item.index != order[-1])
        items[item.index] = item
    assert order[1:] == [*[0, 1] * 10, 2, 3]
    for i, request in enumerate(requests):
        assert isinstance(request.prompt, str)
        most = request.max_tokens or 10
        same_as_alone(model, items[i], request.prompt, max_tokens=most, temperature=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_context_on_disk(
    threads: int, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget holds the last slices only: whose cache is larger goes through the disk."""
    choose = session.choose_reserve
    monkeypatch.setattr(
        session, "choose_reserve", lambda choice, reserves: choose(choice, reserves[-1:])
    )
    monkeypatch.setattr(spill, "SLICE_BYTES", 40_000)
    file = write_tiny(tmp_path / "long.gguf", replace(TINY, context=30_000))
    model = opened(file, load="auto", ram="1GB", kv_spill=tmp_path, threads=threads)
    assert model.llm.spilled_bytes and model.llm.cache_room < model.llm.full_cache_bytes
    given, most = prompts(700, 20, 30, 1000), {"max_tokens": 12, "temperature": 0}
    items = ended(model.generate_batch(given, **most))
    reference = opened(file, threads=threads)
    for item, prompt in zip(items, given, strict=True):
        same_as_alone(reference, item, prompt, **most)


def test_room_for_caches_is_what_a_budget_sets_aside(opened: Open) -> None:
    one = opened(load="auto", ram="1GB").llm
    assert one.cache_room == one.session.reserve == one.cache_bytes_at(TINY.context)
    assert opened(load="auto", ram="1GB", sequences=3).llm.cache_room == 3 * one.cache_room
    assert opened().llm.cache_room > one.cache_room


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_request_that_fails_says_so_and_others_go_on(batch_size: int, opened: Open) -> None:
    model = opened(context=100)
    given = ["fine", "z" * 300, "good"]
    batch = model.generate_batch(given, batch_size=batch_size, max_tokens=4, temperature=0)
    batch.add(BatchRequest("odd", sampling={"top_p": 3.0}))
    items = ended(batch)
    assert [item.stop_reason for item in items] == ["length", "error", "length", "error"]
    assert "the context holds 100" in str(items[1].error) and items[1].text == ""
    assert "top_p" in str(items[3].error)
    same_as_alone(model, items[2], "good", max_tokens=4, temperature=0)


def test_a_reply_whose_logits_are_no_numbers_fails_alone(opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(["a", "b"], max_tokens=6, temperature=0)
    step, calls = batch._sequences.step, []

    def spoiled(strands: Any, stop: Any) -> Any:
        calls.append(len(strands))
        for i, (strand, logits) in enumerate(step(strands, stop)):
            yield strand, logits * float("nan") if (len(calls), i) == (3, 0) else logits

    batch._sequences.step = spoiled  # type: ignore[method-assign]
    first, second = ended(batch)
    assert first.stop_reason == "error" and "not finite" in str(first.error)
    assert len(first.tokens) == 2 and len(second.tokens) == 6
    assert calls == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stopping_all(batch_size: int, opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(["a", "b", "c"], batch_size=batch_size, temperature=0)
    seen = [next(batch) for _ in range(5)]
    thread = threading.Thread(target=batch.stop)
    thread.start()
    thread.join()
    rest = [item for item in batch if item.done]
    assert sorted(item.index for item in rest) == [0, 1, 2]
    assert all(item.stop_reason == "interrupted" for item in rest)
    assert batch.stopped and next(batch, None) is None
    assert len(seen) <= sum(len(item.tokens) for item in rest) < len(seen) + batch_size
    assert len(list(model.generate("again", max_tokens=2, temperature=0))) == 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stopping_one(batch_size: int, opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(
        ["a", "b", "c"], batch_size=batch_size, max_tokens=8, temperature=0
    )
    done = []
    for item in batch:
        if item.index == 0 and len(item.tokens) == 3:
            item.stop()
        if item.done:
            done.append(item)
    by_index = {item.index: item for item in done}
    assert [by_index[i].stop_reason for i in range(3)] == ["interrupted", "length", "length"]
    assert len(by_index[0].tokens) == 3
    same_as_alone(model, by_index[2], "c", max_tokens=8, temperature=0)


def test_a_run_that_breaks_off_ends_the_batch(opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(["a", "b"], max_tokens=6, temperature=0)
    next(batch)
    items = [next(batch)]
    model.llm.session.close()
    with pytest.raises(UsageError, match="closed"):
        list(batch)
    items += list(batch)
    assert batch.stopped and {item.stop_reason for item in items} == {"interrupted"}


def test_one_model_has_one_batch_or_reply_at_a_time(opened: Open) -> None:
    model = opened()
    batch = model.generate_batch(["a", "b"], max_tokens=6, temperature=0)
    next(batch)
    problems: list[BaseException] = []

    def intrude() -> None:
        try:
            next(model.generate("x"))
        except UsageError as error:
            problems.append(error)

    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert "already generating" in str(problems[0])
    assert len(list(model.generate("x", max_tokens=3, temperature=0))) == 3  # in its own thread
    assert [item.stop_reason for item in batch if item.done] == ["interrupted", "interrupted"]


def test_options_that_make_no_sense_are_refused_at_once(opened: Open) -> None:
    model = opened()
    with pytest.raises(UsageError, match="top_p"):
        model.generate_batch(["a"], top_p=2.0)
    with pytest.raises(UsageError, match="batch_size is 0"):
        model.generate_batch(["a"], batch_size=0)
    with pytest.raises(UsageError, match="unknown sampling option"):
        model.generate_batch(["a"], heat=2.0)
    assert ended(model.generate_batch([])) == []
