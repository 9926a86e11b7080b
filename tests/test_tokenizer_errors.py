"""What is wrong with a tokenizer's files, said with the file, the place and the remedy."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizer_fixtures import LLAMA, gguf_metadata, small_bpe

from onnxstream_nb.errors import ModelError, UnsupportedError, UsageError
from onnxstream_nb.tokenizer import StopStrings, encode_chat, load_tokenizer
from onnxstream_nb.tokenizer.gguf import from_metadata


def test_no_tokenizer_lists_what_was_looked_for(tmp_path):
    wanted = "looked for tokenizer.json, tokenizer.model, vocab.txt and .*gguf"
    with pytest.raises(ModelError, match=wanted):
        load_tokenizer(tmp_path)
    model = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="model.onnx does not exist"):
        load_tokenizer(model)
    model.touch()
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no comma", "no `score,token`"),
        ("x,token", "no `score,token`"),
        ("", "no `score,token`"),
        ("1,", "no `score,token`"),
        ("-3,bad\\q", "a backslash that escapes nothing"),
        ("-3,\\xd0", "can't decode"),
    ],
)
def test_malformed_vocab_line_is_located(line, message, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(f"0,<unk>\n{line}\n-2,a\n")
    with pytest.raises(ModelError, match=rf"vocab.txt, line 2: .*{message}"):
        load_tokenizer(path)


def test_vocab_without_unknown_token(tmp_path):
    (tmp_path / "vocab.txt").write_text("-1,a\n-2,b\n")
    with pytest.raises(ModelError, match="vocab.txt is not a usable SentencePiece vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", LLAMA.read_bytes()[:5000]])
def test_damaged_sentencepiece_model(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer.model is .*fetch the file again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer_json(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="not a usable tokenizer.json"):
        load_tokenizer(tmp_path)


def test_unsupported_decoder_is_named(tmp_path):
    state = json.loads(small_bpe().to_str())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnsupportedError, match="decoder WordPiece is not supported"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "should hold a JSON object, not a list"),
        ("added_tokens.json", '{"<x>": "many"}', "id of token '<x>' should be a whole number"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"5": {}}}',
            "added_tokens_decoder entry 5 has no content",
        ),
    ],
)
def test_damaged_json_beside_a_model(name, content, message, tmp_path):
    shutil.copy(LLAMA, tmp_path / "tokenizer.model")
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "holds no tokenizer"),
        ("model", "bert", "tokenizer.ggml.model 'bert' is not supported"),
        ("pre", "jina-v2-de", "pre-tokenizer 'jina-v2-de'"),
        ("tokens", None, "tokens should be a list of strings"),
        ("tokens", [1, 2], "tokens should be a list of strings"),
        ("merges", None, "has no tokenizer.ggml.merges"),
        ("merges", ["no-space"], "merges do not fit its tokens"),
        ("merges", ["q qqq"], "merges do not fit its tokens"),
        ("token_type", [1], "token_type should hold"),
    ],
)
def test_gguf_keys_that_do_not_fit(key, value, message):
    metadata = {**gguf_metadata(small_bpe()), f"tokenizer.ggml.{key}": value}
    with pytest.raises((ModelError, UnsupportedError), match=f"x.gguf.*{message}"):
        from_metadata(metadata, "x.gguf")


def test_gguf_scores_and_types_that_do_not_fit():
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"]}
    with pytest.raises(ModelError, match="scores should hold 2 numbers"):
        from_metadata(metadata, "x.gguf")
    metadata["tokenizer.ggml.token_type"] = [2, 9]
    with pytest.raises(ModelError, match="token_type: 9 is not a valid"):
        from_metadata(metadata, "x.gguf")


def test_a_model_without_chat_template_or_known_tokens():
    metadata = gguf_metadata(small_bpe())
    kinds = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [1] * len(kinds)
    with pytest.raises(ModelError, match="no chat template: use --raw"):
        encode_chat(from_metadata(metadata, "x.gguf"), [{"role": "user", "content": "x"}])


def test_messages_and_stops_that_make_no_sense():
    tokenizer = load_tokenizer(LLAMA)
    with pytest.raises(UsageError, match="message 2 needs a text as its 'content'"):
        encode_chat(tokenizer, [{"role": "user", "content": "x"}, {"role": "user"}])
    for stops in ("END", [""]):
        with pytest.raises(UsageError, match="--stop"):
            StopStrings(stops)
