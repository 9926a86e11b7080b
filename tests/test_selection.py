"""Which files of a repository make a model: a name list in, a selection or an error out."""

from __future__ import annotations

import pytest

from onnxstream_nb.errors import DownloadError, UnsupportedError, UsageError
from onnxstream_nb.hub.selection import select

REPO = "owner/model"
FIRST = "model-00001-of-00002.safetensors"


def chosen(names: str, suffix: str = "") -> tuple[str, str, list[str]]:
    found = select(REPO, dict.fromkeys(names.split(), 10), suffix)
    return found.kind, found.target, sorted(found.files)


HF = "config.json model.safetensors tokenizer.json"


@pytest.mark.parametrize(
    ("names", "suffix", "kind", "target", "files"),
    [
        ("a-Q8_0.gguf a-q4_k_m.gguf a-Q2_K.gguf", "", "gguf", "a-q4_k_m.gguf", "a-q4_k_m.gguf"),
        ("a.Q8_0.gguf a.Q2_K.gguf " + HF, "", "gguf", "a.Q8_0.gguf", "a.Q8_0.gguf"),
        ("a-Q2_K.gguf " + HF, "", "safetensors", "", HF),
        ("a-Q2_K.gguf", "", "gguf", "a-Q2_K.gguf", "a-Q2_K.gguf"),
        ("a-Q2_K.gguf a-Q8_0.gguf", "q2_k", "gguf", "a-Q2_K.gguf", "a-Q2_K.gguf"),
        ("a-Q4_0.gguf a-Q4_0_8_8.gguf", "Q4_0", "gguf", "a-Q4_0.gguf", "a-Q4_0.gguf"),
        ("a-bf16.gguf a-f16.gguf mmproj-f16.gguf", "F16", "gguf", "a-f16.gguf", "a-f16.gguf"),
        ("q/a-Q4_0.gguf a-Q8_0.gguf", "q", "gguf", "q/a-Q4_0.gguf", "q/a-Q4_0.gguf"),
        (HF + " README.md consolidated.safetensors pytorch_model.bin", "", "safetensors", "", HF),
        (HF + " a.gguf b.gguf", "model.safetensors", "safetensors", "", HF),
        (HF + " onnx/model.onnx", "", "safetensors", "", HF),
        ("w.bin model.txt vocab.txt README.md", "", "onnxstream", "", "model.txt vocab.txt w.bin"),
        ("a/model.txt a/w.bin b/model.txt b/w.bin", "b", "onnxstream", "b", "b/model.txt b/w.bin"),
        ("a/model.txt a/w b/model.txt", "a/model.txt", "onnxstream", "a", "a/model.txt a/w"),
        (
            "onnx/model.onnx onnx/model.onnx_data onnx/model_q4.onnx tokenizer.json x.md", "",
            "onnx", "onnx/model.onnx", "onnx/model.onnx onnx/model.onnx_data tokenizer.json",
        ),
        (
            "onnx/model.onnx onnx/model_q4.onnx tokenizer.json", "Q4",
            "onnx", "onnx/model_q4.onnx", "onnx/model_q4.onnx tokenizer.json",
        ),
        ("m.onnx w1 w2.weight README.md", "", "onnx", "m.onnx", "m.onnx w1 w2.weight"),
    ],
)  # fmt: skip
def test_selection(names: str, suffix: str, kind: str, target: str, files: str) -> None:
    assert chosen(names, suffix) == (kind, target, sorted(files.split()))


@pytest.mark.parametrize(
    ("names", "suffix", "message"),
    [
        ("a-Q8_0.gguf b-Q8_0.gguf", "", r"several models .*a-Q8_0.gguf \(10 B\), b-Q8_0.gguf"),
        ("a/model.txt b/model.txt", "", "several models .*: a, b; choose one"),
        ("a.onnx b.onnx", "", "several models .*a.onnx"),
        ("a-Q2_K.gguf b-Q3_K.gguf", "", "several models"),
        ("a-Q8_0.gguf", "Q4_K_M", "'Q4_K_M'; it has a-Q8_0.gguf"),
        ("a-Q8_0.gguf", "../../etc/passwd", "it has a-Q8_0.gguf"),
        ("pytorch_model.bin config.json", "", "no model .*; it has config.json .*, pytorch_model"),
        (HF, "tokenizer.jso", "no file, folder or quantisation"),
        ("config.json README.md", "README.md", "README.md is no model"),
        ("", "", "no model in a format that is read here; it has no files"),
    ],
)
def test_ambiguous_and_missing_say_what_there_is(names: str, suffix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(names, suffix)


def test_split_gguf_and_missing_shards_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="one part of a split GGUF"):
        chosen("a-Q4_K_M-00001-of-00002.gguf", "a-Q4_K_M-00001-of-00002.gguf")
    with pytest.raises(DownloadError, match="1 of 2 shards"):
        chosen(f"config.json {FIRST}")
