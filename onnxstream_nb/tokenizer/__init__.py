"""Tokenizers: text to ids and back, conversations to ids, stop strings."""

from __future__ import annotations

from .load import load_tokenizer
from .messages import encode_chat, render_chat
from .stop_strings import StopStrings
from .vocabulary import TextStream, Tokenizer, first_difference

__all__ = [
    "StopStrings", "TextStream", "Tokenizer", "encode_chat", "first_difference", "load_tokenizer",
    "render_chat",
]  # fmt: skip
