"""What every tokenizer shares: conventions, decoding, streaming without half characters.

The libraries do the splitting into tokens (`sentencepiece.py`, `bpe.py`); this
module turns ids back into bytes and bytes into text, so that streamed and whole decoding agree.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<end_of_turn>",
    "<|end|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Special tokens that end a reply wherever a vocabulary has them, declared as such or not."""


SPACE = "▁"
"""SentencePiece's mark for a space (U+2581)."""

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's way to write a token that is one byte."""


@dataclass(frozen=True, slots=True)
class Conventions:
    """What a model's files say about its tokens, beside the vocabulary itself.

    `special` are the control tokens by text: written only by templates, never by a user's text.
    `other_ends` are further ids, beside `eos_id`, that the files name as ends of a reply.
    """

    special: Mapping[str, int] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    other_ends: Iterable[int] = ()
    add_bos: bool = False
    chat_template: str | None = None


class Tokenizer(ABC):
    """Text to ids and back. `special` are the control tokens by text; `eos_ids` end a reply, and
    `eos_id` is the one that templates call `eos_token`."""

    strips_leading_space = False
    """SentencePiece writes a space before the text; decoding takes it away again."""

    def __init__(self, vocab_size: int, conventions: Conventions) -> None:
        self.vocab_size = vocab_size
        self.special = conventions.special
        self.special_ids = frozenset(self.special.values())
        self.bos_id = conventions.bos_id
        self.eos_id = conventions.eos_id
        ends = {self.special[text] for text in END_OF_TURN if text in self.special}
        ends |= set() if self.eos_id is None else {self.eos_id}
        self.eos_ids = frozenset(conventions.other_ends) | ends
        self.add_bos = conventions.add_bos and self.bos_id is not None
        self.chat_template = conventions.chat_template

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes one id stands for; an id outside the vocabulary stands for none."""

    @abstractmethod
    def encode_parts(self, text: str, special: bool, stand_ins: Mapping[int, str]) -> list[int]:
        """As `encode`, but characters in `stand_ins` (by code point) are put back as ordinary
        text after the special tokens have been found."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Text to ids, without BOS. With `special`, a special token's text becomes its id;
        without, it is ordinary text. A lone surrogate becomes U+FFFD."""
        return self.encode_parts(well_formed(text), special, {})

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Ids to text. Bytes that are not UTF-8 become U+FFFD."""
        stream = TextStream(self, skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def token_text(self, token: int | None) -> str:
        """The text of one token, special ones included; empty for None."""
        return "" if token is None else self.token_bytes(token).decode("utf-8", "replace")


class TextStream:
    """Decodes ids one at a time: what `push` and `flush` return, joined, is `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._at_start = tokenizer.strips_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes: possibly none, never half a character."""
        if token in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token)
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of `texts`, the longest first, as its one group; None for none."""
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})") if ordered else None


def first_difference(one: Tokenizer, other: Tokenizer, ids: Iterable[int]) -> int | None:
    """The first of `ids` that stands for other bytes in the other vocabulary; None if none does."""
    return next((i for i in ids if one.token_bytes(i) != other.token_bytes(i)), None)


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced, as the libraries need it."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
