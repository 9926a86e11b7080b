"""Tokenizers go along with a conversion: the same ids, texts, ends and templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from conversions import check_manifest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny
from sentencepiece import SentencePieceProcessor
from tokenizer_fixtures import LLAMA, export_vocabulary, gguf_metadata, samples, small_bpe

from onnxstream_nb.convert.convert import convert
from onnxstream_nb.tokenizer import Tokenizer, load_tokenizer
from onnxstream_nb.tokenizer.gguf import from_metadata
from onnxstream_nb.tokenizer.save import files

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


def same(one: Tokenizer, other: Tokenizer) -> None:
    """Equal in all that a conversation needs."""
    for name in ("bos_id", "eos_id", "eos_ids", "add_bos", "special", "chat_template"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.strips_leading_space == other.strips_leading_space
    for text in samples(60):
        for special in (False, True):
            ids = one.encode(text, special=special)
            assert ids == other.encode(text, special=special), text
        assert one.decode(ids) == other.decode(ids)
    assert [one.token_bytes(i) for i in range(one.vocab_size)] == [
        other.token_bytes(i) for i in range(one.vocab_size)
    ]


def written(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, content in files(tokenizer).items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """The keys a GGUF would have for Llama's vocabulary."""
    library = SentencePieceProcessor(model_file=str(LLAMA))
    size = library.vocab_size()
    kinds = [
        2 if library.is_unknown(i) else 3 if library.is_control(i) else 6 if library.is_byte(i)
        else 1
        for i in range(size)
    ]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [library.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [library.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {**metadata, **changes}


@pytest.mark.parametrize("changes", [
    {},
    {"tokenizer.ggml.add_bos_token": True},
    {"tokenizer.ggml.eot_token_id": 402, "tokenizer.chat_template": TEMPLATE},
    {"tokenizer.ggml.pre": "llama-bpe"},
    {"tokenizer.ggml.pre": "smollm"},
    {"tokenizer.ggml.pre": "qwen2"},
])  # fmt: skip
def test_byte_level_vocabularies(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    tokenizer = from_metadata({**gguf_metadata(small_bpe()), **changes}, "a GGUF")
    again = written(tokenizer, tmp_path / "files")
    same(tokenizer, again)
    config = json.loads((tmp_path / "files" / "tokenizer_config.json").read_text("utf-8"))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "files" / "tokenizer.json"))
    first = [tokenizer.bos_id] if tokenizer.add_bos else []
    assert library.encode("hello").ids == [*first, *tokenizer.encode("hello")]
    assert config["add_bos_token"] == tokenizer.add_bos
    assert (config["bos_token"], config["eos_token"]) == ("<|begin|>", "<|im_end|>")


@pytest.mark.parametrize("changes", [
    {},
    {"tokenizer.ggml.add_space_prefix": False},
    {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": TEMPLATE},
])  # fmt: skip
def test_sentencepiece_vocabularies(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    tokenizer = from_metadata(llama_metadata(**changes), "a GGUF")
    same(tokenizer, written(tokenizer, tmp_path / "files"))


def test_a_gguf_is_converted_with_its_tokenizer(tmp_path: Path) -> None:
    metadata = gguf_metadata(small_bpe())
    tiny = Tiny(vocab=small_bpe().get_vocab_size())

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
        writer.add_token_types(metadata["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
        writer.add_token_merges(metadata["tokenizer.ggml.merges"])  # type: ignore[arg-type]
        writer.add_bos_token_id(metadata["tokenizer.ggml.bos_token_id"])  # type: ignore[arg-type]
        writer.add_eos_token_id(metadata["tokenizer.ggml.eos_token_id"])  # type: ignore[arg-type]
        writer.add_chat_template(TEMPLATE)

    write_gguf(tmp_path / "m.gguf", tiny, "F16", extra=add)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json"} <= check_manifest(tmp_path / "out").keys()
    same(load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(tmp_path / "out"))


def test_files_beside_a_model_are_copied(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Tiny(), "F16")
    shutil.copy(LLAMA, tmp_path / "hf" / "tokenizer.model")
    texts = {
        "tokenizer_config.json": '{"bos_token": "<s>", "eos_token": "</s>"}',
        "generation_config.json": '{"eos_token_id": [2, 5]}',
        "chat_template.jinja": TEMPLATE,
        "special_tokens_map.json": "{}",
    }
    for name, text in texts.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"not this")
    convert(tmp_path / "hf", tmp_path / "out")
    files = check_manifest(tmp_path / "out").keys()
    assert files == {*texts, "tokenizer.model", "config.json", "model.onnx", "model-00001.data"}
    for name in (*texts, "tokenizer.model", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    same(load_tokenizer(tmp_path / "hf"), load_tokenizer(tmp_path / "out"))
    # and from an .onnx in a folder below the tokenizer, as exports have it
    (tmp_path / "out" / "onnx").mkdir()
    for name in ("model.onnx", "model-00001.data"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / "onnx" / name)
    convert(tmp_path / "out" / "onnx" / "model.onnx", tmp_path / "again")
    assert check_manifest(tmp_path / "again").keys() == files


def test_vocab_txt_becomes_a_sentencepiece_model(tmp_path: Path) -> None:
    """Also the three tokens that TinyLlama's leaves out."""
    source = Path(__file__).parent / "fixtures" / "models" / "onnxstream_llama_small"
    shutil.copytree(source, tmp_path / "in")
    processor = SentencePieceProcessor(model_file=str(LLAMA))
    lines = export_vocabulary(processor).split("\n")[:997]
    (tmp_path / "in" / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    convert(tmp_path / "in", tmp_path / "out")
    assert "tokenizer.model" in check_manifest(tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 1000 and tokenizer.special["<|im_end|>"] == 999
    same(load_tokenizer(tmp_path / "in"), tokenizer)


def test_models_without_a_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Tiny())
    write_hf(tmp_path / "hf", Tiny())
    for source in ("m.gguf", "hf"):
        convert(tmp_path / source, tmp_path / f"{source}.out")
        assert not any("token" in name for name in check_manifest(tmp_path / f"{source}.out"))


def test_one_file_says_that_it_has_no_tokenizer(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Tiny())
    assert not convert(tmp_path / "hf", tmp_path / "none.onnx").note
    shutil.copy(LLAMA, tmp_path / "hf" / "tokenizer.model")
    assert "name a folder" in convert(tmp_path / "hf", tmp_path / "apart.onnx").note
    assert not convert(tmp_path / "hf", tmp_path / "hf" / "beside.onnx").note
