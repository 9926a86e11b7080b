"""The verb vocab: a vocabulary between SentencePiece's forms and OnnxStream's vocab.txt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def vocab(options: Mapping[str, Any]) -> int:
    """Write the vocabulary of MODEL as --out says, and print how many tokens it has."""
    from ..convert.onnxstream.vocabulary import convert_vocabulary
    from ..errors import UsageError

    source, out = (Path(options[name]).expanduser() for name in ("model", "out"))
    if not source.exists():
        raise UsageError(f"{source} does not exist: name a vocabulary, a GGUF or a model's folder")
    tokens = convert_vocabulary(source, out, overwrite=options["overwrite"])
    print(f"{out}: {tokens} tokens")
    return 0
