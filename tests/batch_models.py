"""A tiny model for batches: random weights, one id a byte, and ends that can be made likely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_llm import IM_END, VOCAB, FakeTokenizer
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.model import Model

TINY = Tiny(vocab=VOCAB, hidden=64, head_dim=16, intermediate=96, context=1500)
ENDS = {"temperature": 1.0, "logit_bias": {IM_END: 3.0}, "seed": 5}
"""Sampling after which replies end by themselves, sooner or later."""


class Tokenizer(FakeTokenizer):
    """One id a byte; the bytes that are no text by themselves stand for letters."""

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(token) if token in range(32, 127) else b"x"


def write_tiny(path: Path, tiny: Tiny = TINY) -> Path:
    write_gguf(path, tiny, "Q8_0")
    return path


def open_tiny(path: Path, **options: Any) -> Model:
    """The model of a file, without looking for a tokenizer beside it."""
    llm = LanguageModel(path, **{"load": "ram", "threads": 1, **options})
    return Model("tiny", path, Tokenizer(), llm)


def prompts(*lengths: int) -> list[str]:
    return ["".join(chr(97 + (7 * n + i * i) % 26) for i in range(n)) for n in lengths]
