"""Ids to text one by one, and stop strings: the result never depends on how the text is cut."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import LLAMA, gguf_bpe, sentencepiece, user

from onnxstream_nb.tokenizer import StopStrings, Tokenizer, encode_chat, load_tokenizer


@cache
def both_kinds() -> list[Tokenizer]:
    return [load_tokenizer(LLAMA), gguf_bpe()]


@given(st.integers(0, 1), st.lists(st.integers(0, 33000), max_size=30), st.data())
@settings(deadline=None, max_examples=200)
def test_streamed_text_is_decoded_text(which, ids, data):
    tokenizer = both_kinds()[which]
    low = [i % 400 for i in ids]  # many byte tokens: broken characters
    chosen = data.draw(st.sampled_from([ids, low]))
    stream = tokenizer.stream()
    text = "".join([*map(stream.push, chosen), stream.flush()])
    assert text == tokenizer.decode(chosen)
    raw = b"".join(tokenizer.token_bytes(i) for i in chosen if i not in tokenizer.special.values())
    skipped = raw.removeprefix(b" ") if which == 0 else raw
    assert text == skipped.decode("utf-8", "replace")
    pieces = [i for i in ids if 259 <= i < 32000]
    assert both_kinds()[0].decode(pieces) == sentencepiece(LLAMA).decode(pieces)


@given(st.integers(0, 1), st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_every_text_survives_and_no_character_is_split(which, text):
    tokenizer = both_kinds()[which]
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pushed) == text
    assert stream.flush() == ""


def test_half_a_character_is_flushed_as_a_replacement():
    tokenizer = gguf_bpe()
    stream = tokenizer.stream()
    broken = tokenizer.encode("🐘")[:-1]
    assert "".join(map(stream.push, broken)) == ""
    assert stream.flush() == "\ufffd" == tokenizer.decode(broken)


def test_surrogates_become_replacement_characters():
    tokenizer = load_tokenizer(LLAMA)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83c\udf89")) == "🎉"
    assert encode_chat(tokenizer, user("\udcff")) == encode_chat(tokenizer, user("\ufffd"))


@pytest.mark.parametrize("which", [0, 1])
def test_ids_outside_the_vocabulary_and_large_texts(which):
    tokenizer = both_kinds()[which]
    assert tokenizer.decode([-1, tokenizer.vocab_size, 2**40]) == ""
    assert tokenizer.encode("") == []
    text = "the fox isn't lazy 🎉\n" * 5000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Plain reference: the stop string that is completed first, the longest of several."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_stop_strings_do_not_depend_on_the_chunks(chunks, stops):
    watcher = StopStrings(stops)
    shown = ""
    stopped = False
    for count, chunk in enumerate(chunks, 1):
        text, stopped = watcher.push(chunk)
        shown += text
        so_far, done = first_stop("".join(chunks[:count]), stops)
        assert so_far.startswith(shown)
        assert stopped == done
    assert (shown + watcher.flush(), stopped) == first_stop("".join(chunks), stops)


def test_stop_strings_hold_back_no_more_than_they_must():
    watcher = StopStrings(["###", "<end>"])
    assert watcher.push("one #") == ("one ", False)
    assert watcher.push("two <en") == ("#two ", False)
    assert watcher.push("d>three") == ("", True)
    assert watcher.push("four") == ("", True)
    assert watcher.flush() == ""
