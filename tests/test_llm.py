"""The language-model layer: ids in, logits out, against a Llama written from its definition."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import ENCODINGS, K_QUANT, write_gguf, write_hf
from llama_oracle import Tiny, logits
from llm_checks import FLOAT16_CACHE, Countdown, exact_model, near
from onnx_models import refusal

from onnxstream_nb.errors import Interrupted, OnnxstreamError, UsageError
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import Session

ODD = Tiny(vocab=67, hidden=96, intermediate=160, heads=6, kv_heads=2, head_dim=16, layers=3)
IDS = [3, 1, 41, 59, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 32, 7, 50]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """A GGUF of odd sizes, and the oracle's logits (T, V) of IDS."""
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    return path, logits(ODD, write_gguf(path, ODD, "F16"), IDS)


@pytest.fixture
def model(odd: tuple[Path, Array]) -> Iterator[LanguageModel]:
    made = exact_model(odd[0])
    yield made
    made.close()


# -- against the oracle


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gguf_of_each_encoding(encoding: str, tmp_path: Path) -> None:
    tiny = K_QUANT if encoding.endswith("_K") else ODD
    held = write_gguf(tmp_path / "m.gguf", tiny, encoding)
    wanted = logits(tiny, held, IDS)
    for load, threads in (("mmap", 1), ("stream", 2)):
        model = exact_model(tmp_path / "m.gguf", load=load, threads=threads)
        assert model.vocab_size == tiny.vocab
        near(model.feed(IDS[:13]), wanted[12])
        for i in range(13, len(IDS)):
            near(model.feed(IDS[i : i + 1]), wanted[i])
        model.close()


@pytest.mark.parametrize(
    "tiny",
    [
        Tiny(tied=True), Tiny("mistral", window=5), Tiny("qwen2", tied=True),
        Tiny("qwen3", head_dim=16), Tiny(kv_heads=4, layers=1), Tiny(kv_heads=1, theta=5e5),
    ],
    ids=lambda t: f"{t.architecture} kv{t.kv_heads}",
)  # fmt: skip
def test_architectures(tiny: Tiny, tmp_path: Path) -> None:
    wanted = logits(tiny, write_gguf(tmp_path / "m.gguf", tiny), IDS)
    folder_wanted = logits(tiny, write_hf(tmp_path / "hf", tiny, "BF16", shards=2), IDS)
    for path, rows in ((tmp_path / "m.gguf", wanted), (tmp_path / "hf", folder_wanted)):
        model = exact_model(path)
        near(np.stack([model.feed([token]) for token in IDS]), rows)
        model.rewind(0)
        near(model.feed(IDS), rows[-1])
        model.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_hugging_face_folder(dtype: str, tmp_path: Path) -> None:
    wanted = logits(ODD, write_hf(tmp_path / "m", ODD, dtype), IDS)
    for load in ("stream", "mmap", "ram"):
        model = exact_model(tmp_path / "m", load=load)
        near(model.feed(IDS[:7]), wanted[6])
        near(model.feed(IDS[7:]), wanted[-1])
        model.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
def test_decoding_many_tokens(load: str, threads: int, tmp_path: Path) -> None:
    """Over the ends of many blocks of the cache."""
    tiny = Tiny(vocab=67, context=700, layers=1)
    held = write_gguf(tmp_path / "m.gguf", tiny)
    ids = [int(i) for i in np.random.default_rng(4).integers(0, 67, 300)]
    wanted = logits(tiny, held, ids)
    model = exact_model(tmp_path / "m.gguf", load=load, threads=threads)
    model.feed(ids[:230])
    for i in range(230, 300):
        near(model.feed(ids[i : i + 1]), wanted[i])
    model.close()


def test_logits_stay_as_they_were_given(model: LanguageModel) -> None:
    given = [model.feed([token]) for token in IDS]
    copies = [row.copy() for row in given]
    model.rewind(0)
    for token in reversed(IDS):
        model.feed([token])
    np.testing.assert_array_equal(np.stack(given), np.stack(copies))
    given[0][...] = 0  # the caller's own
    model.rewind(0)
    np.testing.assert_array_equal(model.feed(IDS[:1]), copies[0])


def test_two_models_interleaved(odd: tuple[Path, Array], tmp_path: Path) -> None:
    """They share a thread team and its working memory, and the second needs more of it."""
    wide = Tiny(vocab=71, hidden=512, intermediate=640, heads=2, kv_heads=1, head_dim=256, layers=1)
    held = write_gguf(tmp_path / "wide.gguf", wide)
    wanted, others = odd[1], logits(wide, held, IDS)
    first = exact_model(odd[0], threads=2)
    for i in range(6):
        near(first.feed(IDS[i : i + 1]), wanted[i])
    second = exact_model(tmp_path / "wide.gguf", threads=2)
    near(second.feed(IDS[:6]), others[5])
    for i in range(6, len(IDS)):
        near(first.feed(IDS[i : i + 1]), wanted[i])
        near(second.feed(IDS[i : i + 1]), others[i])
    first.close()
    second.close()


def test_two_models_in_two_threads(odd: tuple[Path, Array]) -> None:
    results: list[list[Array]] = [[], []]

    def work(rows: list[Array]) -> None:
        model = exact_model(odd[0], threads=2)
        for _ in range(3):
            rows += [model.feed([token]) for token in IDS]
            model.rewind(0)
        model.close()

    workers = [threading.Thread(target=work, args=(rows,)) for rows in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for rows in results:
        assert len(rows) == 3 * len(IDS)
        near(np.stack(rows), np.concatenate([odd[1]] * 3))


# -- chunks, rewinding, the context


@pytest.mark.parametrize("chunk", [1, 3, 7, 19, 20])
def test_a_prompt_in_chunks(chunk: int, odd: tuple[Path, Array], model: LanguageModel) -> None:
    one_pass = model.feed(IDS)
    model.chunk = chunk
    model.rewind(0)
    near(model.feed(IDS), one_pass, 1e-3)  # earlier chunks are read back in float16
    near(model.feed([5]), logits_after(odd, model), FLOAT16_CACHE)


def logits_after(odd: tuple[Path, Array], model: LanguageModel) -> Array:
    """A fresh model's logits after the same tokens."""
    fresh = exact_model(odd[0])
    try:
        result: Array = fresh.feed(model.tokens)
    finally:
        fresh.close()
    return result


def test_rewinding(odd: tuple[Path, Array], model: LanguageModel) -> None:
    rows = [model.feed([token]) for token in IDS]
    for length in (19, 20 - 7, 2, 0):
        model.rewind(length)
        assert model.tokens == IDS[:length]
        again = [model.feed([token]) for token in IDS[length:]]
        np.testing.assert_array_equal(np.stack(again), np.stack(rows[length:]))
    model.rewind(5)
    near(model.feed([60, 61]), logits_after(odd, model))
    for length in (-1, 8):
        assert str(length) in refusal(lambda n=length: model.rewind(n), UsageError)
    assert len(model.tokens) == 7


def test_context(odd: tuple[Path, Array]) -> None:
    path, rows = odd
    model = exact_model(path, context=20)
    assert model.context == 20
    message = refusal(lambda: model.feed([*IDS, 1]), UsageError)
    assert "21" in message and "20" in message and "--context" in message
    assert model.tokens == [] and model.cache_bytes == 0  # refused before anything was read
    near(model.feed(IDS), rows[-1])  # exactly full
    refusal(lambda: model.feed([1]), UsageError)
    assert model.tokens == IDS
    model.rewind(19)
    near(model.feed(IDS[19:]), rows[-1])
    model.close()


def test_contexts_that_are_none(odd: tuple[Path, Array]) -> None:
    for context in (0, -3, ODD.context + 1):
        message = refusal(lambda n=context: exact_model(odd[0], context=n), UsageError)
        assert "--context" in message and str(context) in message
    assert str(ODD.context) in message
    model = exact_model(odd[0])
    assert model.context == ODD.context
    model.close()


def test_nothing_to_feed(model: LanguageModel) -> None:
    refusal(lambda: model.feed([]), UsageError)
    assert model.tokens == []


def test_ids_may_be_any_sequence(odd: tuple[Path, Array], model: LanguageModel) -> None:
    near(model.feed(tuple(IDS[:3])), odd[1][2])
    near(model.feed(np.array(IDS[3:9])), odd[1][8])
    assert model.tokens == IDS[:9] and all(type(t) is int for t in model.tokens)


@pytest.mark.parametrize("wrong", [ODD.vocab, 10**9, -ODD.vocab - 1])
def test_ids_outside_the_vocabulary(
    wrong: int, odd: tuple[Path, Array], model: LanguageModel
) -> None:
    model.feed(IDS[:4])
    refusal(lambda: model.feed([wrong]), OnnxstreamError)
    refusal(lambda: model.feed([5, wrong, 6]), OnnxstreamError)
    assert model.tokens == IDS[:4]
    near(model.feed(IDS[4:]), odd[1][-1])


@pytest.mark.parametrize("past", [1, 2, 3, 5, 7])
def test_as_many_ids_as_there_are_and_one_more(past: int, odd: tuple[Path, Array]) -> None:
    """They are as long as a token's mask would be, and no token: tokens are replayed after them."""
    path, wanted = odd
    model = exact_model(path, load="mmap")
    for i in range(past):
        near(model.feed(IDS[i : i + 1]), wanted[i])
    replay, end = model.session._replay, 2 * past + 1
    near(model.logits(IDS[past:end]), wanted[past:end])
    model.rewind(past)
    near(model.feed(IDS[past:end]), wanted[end - 1])
    near(model.feed(IDS[end : end + 1]), wanted[end])
    assert model.session._replay is replay is not None
    model.close()


# -- stopping


@pytest.mark.parametrize("load", ["stream", "mmap"])
@pytest.mark.parametrize("after", [0, 1, 20, 47, 60, 100, 133])
def test_stopping_in_a_prompt(after: int, load: str, odd: tuple[Path, Array]) -> None:
    model = exact_model(odd[0], load=load)
    model.chunk = 6
    with pytest.raises(Interrupted):
        model.feed(IDS, Countdown(after))
    kept = len(model.tokens)
    assert kept % 6 == 0 and model.tokens == IDS[:kept]
    assert {slot.length for slot in model._cache.slots.values()} == {kept}
    resumed = model.feed(IDS[kept:])
    fresh = exact_model(odd[0], load=load)
    fresh.chunk = 6
    np.testing.assert_array_equal(resumed, fresh.feed(IDS))
    np.testing.assert_array_equal(model.feed([8]), fresh.feed([8]))
    model.close()
    fresh.close()


def test_stopping_while_decoding(odd: tuple[Path, Array], model: LanguageModel) -> None:
    for i, token in enumerate(IDS):
        stop = Countdown(i % 5)  # a replayed token asks less often than it has operators
        try:
            logits_of_token = model.feed([token], stop)
        except Interrupted:
            assert model.tokens == IDS[:i]
            assert {slot.length for slot in model._cache.slots.values()} == {i}
            logits_of_token = model.feed([token], threading.Event())
        near(logits_of_token, odd[1][i])


def test_an_event_that_is_set_already(model: LanguageModel) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        model.feed(IDS, stop)
    assert model.tokens == []


# -- what it says about itself


def test_bytes_per_token(tmp_path: Path) -> None:
    """All matrices, and not the embedding's table unless it is also the head."""
    tiny = Tiny(vocab=67)
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    for tied in (False, True):
        one = Tiny(vocab=67, tied=tied)
        write_gguf(tmp_path / f"{tied}.gguf", one, "Q8_0")
        model = exact_model(tmp_path / f"{tied}.gguf")
        matrices = 2 * per_layer + 67 * 32
        assert model.bytes_per_token == matrices // 32 * 34
        model.close()
    assert tiny.layers == 2


def test_cache_bytes(model: LanguageModel) -> None:
    assert model.cache_bytes == 0
    model.feed(IDS)
    least = ODD.layers * 2 * ODD.kv_heads * ODD.head_dim * 2 * len(IDS)
    assert least <= model.cache_bytes <= 2**20
    before = model.cache_bytes
    model.rewind(0)
    model.feed(IDS)
    assert model.cache_bytes == before


def test_budget_as_text(odd: tuple[Path, Array]) -> None:
    model = exact_model(odd[0], ram="64GB")
    near(model.feed(IDS), odd[1][-1])
    model.close()
    for text in ("much", "0", "-1GB"):
        assert "--ram" in refusal(lambda t=text: exact_model(odd[0], ram=t), UsageError)


def test_progress_is_told(odd: tuple[Path, Array]) -> None:
    told: list[tuple[str, float | None]] = []
    exact_model(odd[0], progress=lambda text, part: told.append((text, part))).close()
    assert told[0] == ("reading the model", None)
    assert all(part is None or 0 <= part <= 1 for _, part in told)


@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
def test_closing(load: str, odd: tuple[Path, Array]) -> None:
    threads = threading.active_count()
    model = exact_model(odd[0], load=load, threads=1)
    model.feed(IDS[:5])
    model.feed(IDS[5:6])
    model.close()
    assert threading.active_count() == threads
    assert model.cache_bytes == 0
    model.close()


def test_a_session_over_the_same_graph(odd: tuple[Path, Array]) -> None:
    """The compact graph with arrays fed back: no float16 between the steps."""
    with Session(odd[0]) as session:
        past = {
            v.name: np.zeros((1, ODD.kv_heads, 0, ODD.head_dim), np.float32)
            for v in session.inputs
            if v.name.startswith("past")
        }
        rows, start = [], 0
        for size in (1, 6, 1, 12):
            ids = np.array([IDS[start : start + size]])
            positions = np.arange(start, start + size)[None]
            got = session.run({"input_ids": ids, "position_ids": positions} | past)
            rows.append(got["logits"][0])
            past = {n: got[n.replace("past_key_values", "present")] for n in past}
            start += size
    near(np.concatenate(rows), odd[1], 2e-5)
