"""Replies with guesses: whatever ends or interrupts them, they are those of token by token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fake_llm import IM_END, FakeLLM, FakeTokenizer, fake_model, shout
from onnx_models import refusal

from onnxstream_nb.errors import UsageError
from onnxstream_nb.generation import Generation
from onnxstream_nb.model import Model

VERSE = "Row, row, row your boat, gently down the stream. "


def with_guesses(
    answer: Callable[[str], str] = shout, draft: bool = False, **options: Any
) -> Model:
    """The fake model as if its weights were streamed; its draft model says the same but digits."""
    model = fake_model(answer, **options)
    model.llm.streams = True  # type: ignore[misc]
    if draft:
        helper: Any = FakeLLM(lambda message: answer(message).replace("7", "x"), **options)
        model.draft = helper
    return model


def sing(message: str) -> str:
    return VERSE * 6


def replies(
    answer: Callable[[str], str] = shout, **options: Any
) -> Iterator[Callable[..., tuple[Generation, list[Any], Model]]]:
    """How to get a reply: token by token, with the text's guesses, a draft model's, or both."""
    for speculate, draft in ((0, False), (7, False), (0, True), (7, True)):

        def reply(
            message: str, speculate: int = speculate, draft: bool = draft, **more: Any
        ) -> Any:
            model = with_guesses(answer, draft, **options)
            run = model.generate(message, speculate=speculate, **more)
            return run, list(run), model

        yield reply


def same_replies(
    answer: Callable[[str], str], message: str, context: int = 4096, **more: Any
) -> Any:
    """The tokens of all kinds of replies, which are the same; the passes of each kind."""
    wanted, passes = None, []
    for reply in replies(answer, context=context):
        run, tokens, model = reply(message, **more)
        found = [tokens, run.stats.stop_reason, run.stats.completion_tokens, model.llm.tokens]
        wanted = wanted or found
        assert found == wanted
        assert model.llm.tokens == (run.prompt_ids + run.ids)[:-1]
        llm: Any = model.llm
        sayable = min(more.get("max_tokens", context), context - len(run.prompt_ids) + 1)
        assert llm.longest < len(run.prompt_ids) + sayable
        ended_in_a_run = run.stats.passes - (len(tokens) - 1 - run.stats.accepted)
        assert ended_in_a_run in (0, 1)
        assert run.stats.drafted >= run.stats.accepted
        passes.append(run.stats.passes)
    assert wanted is not None
    return *wanted[:2], passes


def test_a_reply_that_repeats_itself() -> None:
    tokens, reason, passes = same_replies(sing, "sing")
    assert "".join(token.text for token in tokens) == VERSE * 6 and reason == "eos"
    plain, by_text, by_draft, by_both = passes
    assert plain == len(VERSE) * 6
    assert by_text < 0.4 * plain and by_draft < 0.15 * plain and by_both < 0.15 * plain


@pytest.mark.parametrize("most", [1, 2, 3, 59, 60, 61, 62, 63, 64, 65, 66, 67])
def test_a_limit_within_a_run(most: int) -> None:
    tokens, reason, _ = same_replies(sing, "sing", max_tokens=most)
    assert (len(tokens), reason) == (most, "length")


@pytest.mark.parametrize("context", [94, 95, 96, 97, 98, 99, 100, 101, 180])
def test_a_context_that_ends_within_a_run(context: int) -> None:
    tokens, reason, _ = same_replies(sing, "sing", context=context)
    assert reason == "context"
    assert len(tokens) == context + 1 - len("?user\nsing?\n?assistant\n")


@pytest.mark.parametrize("stop", ["gently", "boat, gently d", "m. R", "ream. Row, row, row your b"])
@pytest.mark.parametrize("verses", [1, 2])
def test_a_stop_string_across_runs(stop: str, verses: int) -> None:
    answer = VERSE * 6 if verses == 1 else (VERSE + "Merrily, merrily: ") * 5
    for end in (stop, "never"):
        tokens, reason, _ = same_replies(lambda message: answer, "sing", stop=(end,))
        text = "".join(token.text for token in tokens)
        assert text == (answer.split(end)[0] if end in answer else answer)
        assert reason == ("stop" if end in answer else "eos")


def test_characters_of_several_tokens() -> None:
    tokens, _, passes = same_replies(lambda message: "é🙂漢" * 20, "x", max_tokens=170)
    assert "".join(token.text for token in tokens).startswith("é🙂漢" * 18)
    assert passes[1] < 50


@pytest.mark.parametrize("draft", [False, True])
def test_the_end_of_a_turn_within_a_run(draft: bool) -> None:
    """The second turn repeats the first, template and all: guesses run on over its end."""
    model = with_guesses(lambda message: "Deep blue.", draft)
    messages = [{"role": "user", "content": "colour?"}]
    first = "".join(token.text for token in model.chat(messages))
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "colour?"}]
    run = model.chat(messages)
    tokens = list(run)
    assert [token.id for token in tokens] == [*first.encode(), IM_END]
    stats = run.stats
    assert (stats.completion_tokens, stats.passes, stats.accepted) == (11, 2, 9)
    assert stats.drafted > stats.accepted
    assert model.llm.tokens == (run.prompt_ids + run.ids)[:-1]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "why?"}]
    third = model.chat(messages)
    list(third)
    assert third.stats.cached_tokens == len(run.prompt_ids) + len(first)
    assert third.stats.stop_reason == "eos"


@pytest.mark.parametrize("at", [1, 2, 30, 77, 100, 101, 102, 103, 104])
def test_an_interrupt_within_a_run(at: int) -> None:
    model = with_guesses(sing, draft=True)
    run = model.generate("sing")
    tokens = [next(run) for _ in range(at)]
    run.stop()
    assert list(run) == [] and run.stats.stop_reason == "interrupted"
    assert "".join(token.text for token in tokens) == (VERSE * 6)[:at]
    assert model.llm.tokens == (run.prompt_ids + run.ids)[:-1]
    again = model.generate("sing")
    assert "".join(token.text for token in again) == VERSE * 6
    assert again.stats.cached_tokens == len(run.prompt_ids) - 1


def test_an_interrupt_in_a_pass() -> None:
    model = with_guesses(sing, draft=True, delay=0.002)
    run = model.generate("sing")
    timer = threading.Timer(0.2, run.stop)
    timer.start()
    text = "".join(token.text for token in run)
    timer.join()
    assert run.stats.stop_reason == "interrupted" and (VERSE * 6).startswith(text)
    assert model.llm.tokens == (run.prompt_ids + run.ids)[:-1]
    for llm in (model.llm, model.draft):
        llm.delay = 0  # type: ignore[union-attr]
    assert "".join(token.text for token in model.generate("sing")) == VERSE * 6


def test_a_reply_left_behind_within_a_run() -> None:
    model = with_guesses(sing)
    left = model.generate("sing")
    while len(model.llm.tokens) < len(left.prompt_ids) + len(left.ids) + 3:
        next(left)
    assert "".join(token.text for token in model.generate("sing", max_tokens=9)) == VERSE[:9]
    assert left.stats.stop_reason == "interrupted"


def test_an_error_within_a_run() -> None:
    model = with_guesses(sing, draft=True)
    run = model.generate("sing")
    tokens = [next(run) for _ in range(20)]
    llm: Any = model.llm
    llm.fail = OSError("weights.bin vanished")
    with pytest.raises(OSError, match="vanished"):
        for _ in range(9):
            tokens.append(next(run))
    assert "".join(token.text for token in tokens) == VERSE[: len(tokens)]
    assert llm.tokens == (run.prompt_ids + run.ids)[:-1]
    llm.fail = None
    assert "".join(token.text for token in model.generate("sing")) == VERSE * 6


def test_room_made_within_a_reply() -> None:
    def conversation() -> list[dict[str, str]]:
        turns = [("user", f"question {i}") if i % 2 else ("assistant", f"answer {i}")
                 for i in range(1, 9)]  # fmt: skip
        return [{"role": role, "content": text} for role, text in [*turns, ("user", "sing")]]

    texts, passes = [], []
    for draft, speculate in ((False, 0), (False, 7), (True, 7)):
        model, messages = with_guesses(sing, draft, context=400), conversation()

        def make_room(messages: list[dict[str, str]] = messages) -> list[dict[str, str]] | None:
            if len(messages) == 1:
                return None
            del messages[:2]
            return messages

        run = model.chat(messages, make_room=make_room, speculate=speculate)
        texts.append("".join(token.text for token in run))
        passes.append(run.stats.passes)
        assert run.stats.stop_reason == "eos" and len(messages) < 9
        assert model.llm.tokens == (run.prompt_ids + run.ids)[:-1]
    assert texts == [VERSE * 6] * 3
    assert passes[0] > 2 * passes[1] and passes[0] > 2 * passes[2]


def test_recent_tokens_are_those_of_the_text() -> None:
    """Penalties look at what was said, and never at what was only guessed."""
    options = {"frequency_penalty": 4.0, "penalty_window": -1, "temperature": 0}
    same_replies(sing, "sing", max_tokens=120, **options)
    same_replies(sing, "sing", max_tokens=120, temperature=1.5, seed=3)


# -- settings


def test_guesses_are_made_where_weights_are_streamed() -> None:
    streamed, kept = with_guesses(sing), fake_model(sing)
    for model, drafts in ((streamed, True), (kept, False)):
        run = model.generate("sing")
        list(run)
        assert (run.stats.drafted > 0) == drafts
        for speculate in (0, 5):
            run = model.generate("sing", speculate=speculate)
            list(run)
            assert (run.stats.drafted > 0) == (speculate > 0)


def test_a_models_own_setting() -> None:
    llm: Any = FakeLLM(sing)
    model = Model("m", fake_model().path, FakeTokenizer(), llm, speculate=2)
    run = model.generate("sing")
    list(run)
    assert run.stats.drafted > 0
    assert max(len(call) for call in llm.calls[1:]) == 3
    with pytest.raises(UsageError, match="--speculate"):
        model.generate("x", speculate=8)
    message = refusal(
        lambda: Model("m", model.path, FakeTokenizer(), llm, speculate=-1), UsageError
    )
    assert "--speculate" in message


def test_closing_closes_the_draft_model() -> None:
    model = with_guesses(draft=True)
    model.close()
    draft: Any = model.draft
    assert draft.closed


def test_the_draft_model_reads_a_prompt_once() -> None:
    model = with_guesses(sing, draft=True)
    run = model.generate("sing", max_tokens=50)
    list(run)
    draft: Any = model.draft
    longest = max(len(call) for call in draft.calls)
    assert longest == len(run.prompt_ids) + 1
    assert sum(len(call) for call in draft.calls) <= longest + 50 + len(draft.calls)
    draft.calls.clear()
    list(model.generate("sing", max_tokens=50))
    assert max(len(call) for call in draft.calls) <= 3


def test_logprobs_are_those_of_the_model_itself() -> None:
    tokens, _, _ = same_replies(sing, "sing", max_tokens=40)
    assert all(-1e-6 < token.logprob <= 0 for token in tokens)
    assert np.isfinite([token.logprob for token in tokens]).all()
