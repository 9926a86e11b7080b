"""A tokenizer as the files of a Hugging Face folder, for models that had it in other forms."""

from __future__ import annotations

import json
from typing import Any

from .bpe import LibraryTokenizer
from .sentencepiece import SentencePieceTokenizer
from .vocabulary import Tokenizer


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content: `load_tokenizer` makes the same tokenizer of these files."""
    found: dict[str, bytes] = {}
    config: dict[str, Any] = {"add_bos_token": tokenizer.add_bos}
    if isinstance(tokenizer, LibraryTokenizer):
        found["tokenizer.json"] = tokenizer.vocabulary_json().encode()
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif isinstance(tokenizer, SentencePieceTokenizer):
        found["tokenizer.model"] = tokenizer.vocabulary_model()
        config["tokenizer_class"] = "LlamaTokenizer"
        config["added_tokens_decoder"] = {
            str(token): {"content": text, "special": text in tokenizer.special}
            for text, token in tokenizer.added.items()
        }
    else:
        raise TypeError(f"{type(tokenizer).__name__} has no files")
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None:
            config[name] = tokenizer.token_text(token)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    config["clean_up_tokenization_spaces"] = False
    found["tokenizer_config.json"] = _json(config)
    if tokenizer.eos_ids:
        found["generation_config.json"] = _json({"eos_token_id": sorted(tokenizer.eos_ids)})
    return found


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
