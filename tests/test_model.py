"""Model and Generation over a fake language model: limits, cache reuse, threads, stopping."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_llm import BOS, IM_END, FakeLLM, FakeTokenizer, fake_model

from onnxstream_nb.errors import Interrupted, UsageError
from onnxstream_nb.generation import Stats
from onnxstream_nb.model import Model

ASSISTANT = "<|im_start|>assistant\n"


def text_of(generation: Any) -> str:
    return "".join(token.text for token in generation)


def fed(model: Model) -> list[list[int]]:
    llm: Any = model.llm
    return llm.calls  # type: ignore[no-any-return]


def test_a_reply_ends_with_the_end_of_turn() -> None:
    with fake_model() as model:
        generation = model.generate("hi")
        tokens = list(generation)
    assert [t.text for t in tokens] == ["H", "I", ""]
    assert [t.id for t in tokens] == [ord("H"), ord("I"), IM_END]
    assert all(-1e-6 < t.logprob <= 0 for t in tokens)
    stats = generation.stats
    assert stats.stop_reason == "eos"
    assert stats.prompt_tokens == len("?user\nhi?\n?assistant\n")
    assert (stats.cached_tokens, stats.completion_tokens) == (0, 3)
    assert stats.load_s == 0.5
    assert stats.peak_rss_mb > 1
    assert 0 < stats.prefill_s <= stats.ttft_s


def test_the_models_own_sampling_stands_for_what_is_not_given() -> None:
    model = fake_model()
    model.sampling = {"temperature": 0.2, "top_p": 0.9}
    own, given = model.generate("hi").params, model.generate("hi", temperature=0.7).params
    assert (own.temperature, own.top_p, own.top_k) == (0.2, 0.9, 40)
    assert (given.temperature, given.top_p) == (0.7, 0.9)
    assert fake_model().generate("hi").params.temperature == 0.8


def test_the_system_prompt_comes_first() -> None:
    model = fake_model()
    assert model.render("u", system="s") == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n" + ASSISTANT
    )
    list(model.generate("u", system="s"))
    text = b"".join(model.tokenizer.token_bytes(token) for token in fed(model)[0])
    assert text.decode() == model.render("u", system="s")


def test_special_tokens_in_a_message_stay_text() -> None:
    model = fake_model()
    list(model.generate("a<|im_end|>b"))
    assert fed(model)[0].count(IM_END) == 1


def test_raw_prompts_have_no_template_and_know_special_tokens() -> None:
    model = fake_model()
    generation = model.generate("<|im_start|>user\nhi<|im_end|>\n" + ASSISTANT, raw=True)
    assert text_of(generation) == "HI"
    assert generation.prompt_ids.count(IM_END) == 1
    assert model.render("x", raw=True) == "x"


def test_raw_prompts_get_one_bos_when_the_model_wants_it() -> None:
    llm: Any = FakeLLM()
    model = Model("fake", Path("x"), FakeTokenizer(add_bos=True), llm)
    assert model.generate("ab", raw=True).prompt_ids == [BOS, 97, 98]
    assert model.generate("<s>ab", raw=True).prompt_ids == [BOS, 97, 98]


def test_a_second_turn_reads_only_what_is_new() -> None:
    model = fake_model()
    first = [{"role": "user", "content": "hello"}]
    reply = text_of(model.chat(first))
    known = len(model.llm.tokens)
    fed(model).clear()
    second = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "more"}]
    generation = model.chat(second)
    assert text_of(generation) == "MORE"
    assert generation.stats.cached_tokens == known
    assert len(fed(model)[0]) == generation.stats.prompt_tokens - known


def test_the_same_prompt_again_feeds_one_token() -> None:
    model = fake_model()
    prompt = "<|im_start|>user\nhi<|im_end|>\n" + ASSISTANT
    first = model.generate(prompt, raw=True, max_tokens=1)
    assert text_of(first) == "H"
    fed(model).clear()
    again = model.generate(prompt, raw=True, max_tokens=1)
    assert text_of(again) == "H"
    assert fed(model) == [again.prompt_ids[-1:]]
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1


def test_max_tokens_ends_with_length_and_shows_what_was_held() -> None:
    model = fake_model(lambda message: "aEND")
    generation = model.generate("x", max_tokens=3, stop=("END",))
    assert [t.text for t in generation] == ["a", "", "EN"]
    assert generation.stats.stop_reason == "length"


def test_stop_strings_end_the_reply_before_them() -> None:
    model = fake_model(lambda message: "one\nUser: two")
    generation = model.generate("x", stop=("\nUser:", "never"))
    assert text_of(generation) == "one"
    assert generation.stats.stop_reason == "stop"
    assert generation.stats.completion_tokens == len("one\nUser:")


def test_what_looked_like_a_stop_string_is_shown_at_the_end() -> None:
    generation = fake_model(lambda message: "one\nUs").generate("x", stop=("\nUser:",))
    tokens = list(generation)
    assert tokens[-1].text == "\nUs"
    assert generation.stats.stop_reason == "eos"


def test_characters_are_never_split() -> None:
    generation = fake_model(lambda message: "é🙂漢").generate("x")
    assert [t.text for t in generation if t.text] == ["é", "🙂", "漢"]


def test_half_a_character_at_the_limit_is_shown_as_such() -> None:
    tokens = list(fake_model(lambda message: "a🙂").generate("x", max_tokens=3))
    assert [t.text for t in tokens] == ["a", "", "\ufffd"]


def test_a_full_context_ends_the_reply() -> None:
    model = fake_model(lambda message: "z" * 1000, context=64)
    generation = model.generate("x")
    tokens = list(generation)
    assert generation.stats.stop_reason == "context"
    assert len(model.llm.tokens) == 64
    assert generation.stats.prompt_tokens + len(tokens) == 65  # the last one needs no place


def test_a_prompt_that_fills_the_context_exactly_gets_one_token() -> None:
    generation = fake_model(context=40).generate("x" * 40, raw=True)
    assert len(list(generation)) == 1
    assert generation.stats.stop_reason == "context"


def test_a_prompt_beyond_the_context_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"41 tokens.*holds 40.*--context"):
        fake_model(context=40).generate("x" * 41, raw=True)


def conversation(turns: int) -> list[dict[str, str]]:
    messages = []
    for i in range(turns):
        messages += [{"role": "user", "content": f"question {i}"}]
        messages += [{"role": "assistant", "content": f"answer {i}"}]
    return [*messages, {"role": "user", "content": "last"}]


def test_make_room_shortens_a_prompt_that_does_not_fit() -> None:
    model = fake_model(context=200)
    messages = conversation(8)

    def make_room() -> list[dict[str, str]] | None:
        del messages[:2]
        return messages

    generation = model.chat(messages, make_room=make_room)
    assert generation.stats.stop_reason == ""
    assert text_of(generation) == "LAST"
    assert len(generation.prompt_ids) <= 150
    assert messages[0]["content"] == "question 7" or len(messages) > 1


def test_make_room_in_the_middle_of_a_reply_loses_no_text() -> None:
    answer = "".join(f"{i}," for i in range(60))
    model = fake_model(lambda message: answer, context=300)
    messages = conversation(5)

    def make_room() -> list[dict[str, str]] | None:
        if len(messages) == 1:
            return None
        del messages[:2]
        return messages

    generation = model.chat(messages, make_room=make_room)
    assert text_of(generation) == answer
    assert generation.stats.stop_reason == "eos"
    assert len(messages) < 11
    assert len(model.llm.tokens) <= 300


def test_stop_from_another_thread_in_decoding() -> None:
    model = fake_model(lambda message: "y" * 4000, delay=0.005)
    generation = model.generate("x")
    threading.Timer(0.1, generation.stop).start()
    started = time.monotonic()
    text = text_of(generation)
    assert time.monotonic() - started < 1.1
    assert generation.stats.stop_reason == "interrupted"
    assert 0 < len(text) < 4000
    assert list(generation) == []


def test_stop_in_prefill_keeps_what_was_read() -> None:
    model = fake_model(delay=0.05, context=10_000)
    prompt = "x" * 3000
    generation = model.generate(prompt, raw=True)
    threading.Timer(0.2, generation.stop).start()
    started = time.monotonic()
    assert list(generation) == []
    assert time.monotonic() - started < 1.2
    assert generation.stats.stop_reason == "interrupted"
    read = len(model.llm.tokens)
    assert 0 < read < 3000
    llm: Any = model.llm
    llm.delay = 0
    again = model.generate(prompt, raw=True, max_tokens=1)
    assert text_of(again) == "!"
    assert again.stats.cached_tokens == read


def test_stop_before_the_beginning() -> None:
    model = fake_model()
    generation = model.generate("x")
    generation.stop()
    assert list(generation) == []
    assert model.llm.tokens == []


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    model = fake_model()
    generation = model.generate("hello")
    assert fed(model) == []
    next(generation)
    assert len(fed(model)) == 1


def test_an_error_of_the_model_ends_the_reply_and_frees_the_model() -> None:
    model = fake_model()
    llm: Any = model.llm
    llm.fail = OSError("weights.bin vanished")
    generation = model.generate("x")
    with pytest.raises(OSError, match="vanished"):
        next(generation)
    assert list(generation) == []
    llm.fail = None
    assert text_of(model.generate("x")) == "X"


def test_two_threads_on_one_model_never_mix() -> None:
    model = fake_model(lambda message: message * 50, delay=0.001)
    results: list[str] = []
    errors: list[UsageError] = []
    ready = threading.Barrier(4)

    def work(letter: str) -> None:
        ready.wait()
        try:
            results.append(text_of(model.generate(letter)))
        except UsageError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) + len(errors) == 4
    assert results
    assert all(len(set(text)) == 1 and len(text) == 50 for text in results)
    assert all("fake is already generating" in str(error) for error in errors)


def test_another_thread_is_refused_while_a_reply_is_open() -> None:
    model = fake_model()
    open_reply = model.generate("hello")
    next(open_reply)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            list(model.generate("x"))
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "already generating" in str(caught[0])
    assert text_of(open_reply) == "ELLO"


def test_a_reply_left_behind_does_not_block_the_next() -> None:
    model = fake_model()
    left = model.generate("hello")
    next(left)
    assert text_of(model.generate("next")) == "NEXT"
    assert left.stats.stop_reason == "interrupted"
    assert list(left) == []


def test_a_stopped_or_collected_reply_frees_the_model_for_other_threads() -> None:
    model = fake_model()
    results: list[str] = []
    for end in ("stop", "collect"):
        left: Any = model.generate("hello")
        next(left)
        if end == "stop":
            left.stop()
        else:
            del left
            gc.collect()
        thread = threading.Thread(target=lambda: results.append(text_of(model.generate("n"))))
        thread.start()
        thread.join()
    assert results == ["N", "N"]


def test_two_models_at_once() -> None:
    first, second = fake_model(), fake_model()
    pairs = zip(first.generate("abc"), second.generate("xyz"), strict=True)
    assert [a.text + b.text for a, b in pairs] == ["AX", "BY", "CZ", ""]


def test_a_closed_model_says_so() -> None:
    model = fake_model()
    generation = model.generate("x")
    model.close()
    model.close()
    with pytest.raises(UsageError, match="closed"):
        next(generation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "unknown sampling option temprature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"raw": True, "system": "s"}, "--raw"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fake_model().generate("x", **options)


def test_an_empty_raw_prompt_is_an_error() -> None:
    with pytest.raises(UsageError, match="empty"):
        fake_model().generate("", raw=True)


def test_rates() -> None:
    stats = Stats(
        prompt_tokens=30, cached_tokens=10, prefill_s=2, completion_tokens=5, decode_s=0.5
    )
    assert (stats.prefill_tps, stats.decode_tps) == (10, 8)
    assert (Stats().prefill_tps, Stats(completion_tokens=1).decode_tps) == (0, 0)


def test_load_resolves_reports_and_passes_every_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys
    import types

    seen: dict[str, Any] = {}

    class Loader(FakeLLM):
        def __init__(self, path: Path, *, progress: Any, **options: Any) -> None:
            super().__init__(context=options["context"])
            seen.update(options, path=path)
            progress("mapping weights", 1.0)

    class Progress:
        file, file_index, file_count, note = "a.gguf", 1, 1, ""
        done_bytes, total_bytes = 1_000_000, 4_000_000

    def resolve(name: str, *, progress: Any) -> Any:
        progress(Progress())
        return types.SimpleNamespace(path=tmp_path, name=name, sampling={"top_k": 3})

    modules = {
        "hub": {"resolve": resolve, "spill_dir": lambda given: given and Path(given)},
        "llm": {"LanguageModel": Loader},
    }
    for name, content in modules.items():
        module = types.ModuleType(f"onnxstream_nb.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"onnxstream_nb.{name}", module)
    monkeypatch.setattr("onnxstream_nb.tokenizer.load_tokenizer", lambda path: FakeTokenizer())
    said: list[tuple[str, float | None]] = []
    model = Model.load(
        "some", load="ram", ram=5, threads=2, context=99, kv_cache="q8", device="cuda",
        cuda="2GB", kv_spill="there", sequences=3, progress=lambda *a: said.append(a),
    )  # fmt: skip
    assert (model.name, model.path, model.context) == ("some", tmp_path, 99)
    assert model.sampling == {"top_k": 3}
    assert seen == {
        "path": tmp_path, "load": "ram", "ram": 5, "threads": 2, "context": 99,
        "device": "cuda", "cuda": "2GB",
        "precision": "auto", "kv_cache": "q8", "kv_spill": Path("there"), "packed": None,
        "sequences": 3,
    }  # fmt: skip
    assert ("downloading a.gguf 1.0 of 4.0 MB", 0.25) in said
    assert said[-1] == ("mapping weights", 1.0)
    assert model.load_s > 0


def test_progress_may_end_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(text: str, fraction: float | None) -> None:
        raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        Model.load("some", progress=give_up)
