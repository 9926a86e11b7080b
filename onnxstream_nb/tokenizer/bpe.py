"""Vocabularies run by the `tokenizers` library: a tokenizer.json, or a GGUF's byte-level BPE."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError, UnsupportedError
from .config import TokenizerConfig, read_config
from .vocabulary import BYTE_PIECE, SPACE, Conventions, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Library


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, byte-level or of SentencePiece's kind."""

    def __init__(self, library: Library, conventions: Conventions, where: str) -> None:
        super().__init__(library.get_vocab_size(), conventions)
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._lock = threading.Lock()
        self._added = {
            token: entry.content.encode()
            for token, entry in library.get_added_tokens_decoder().items()
        }
        decoder = decoder_types(library)
        self._byte_level = "ByteLevel" in decoder
        if not self._byte_level and not decoder & {"ByteFallback", "Metaspace"}:
            raise UnsupportedError(
                f"{where}: decoder {', '.join(sorted(decoder)) or 'none'} is not supported; "
                "byte-level and SentencePiece-like vocabularies are"
            )
        self.strips_leading_space = bool(decoder & {"Strip", "Metaspace"})

    def vocabulary_json(self) -> str:
        """The vocabulary as a tokenizer.json; a text's BOS is written by it, too."""
        from tokenizers import Tokenizer as Library
        from tokenizers.processors import TemplateProcessing

        library = Library.from_str(self._library.to_str())
        if self.add_bos and self.bos_id is not None and library.post_processor is None:
            bos = self.token_text(self.bos_id)
            library.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, self.bos_id)]
            )
        return library.to_str(pretty=True)

    def encode_parts(self, text: str, special: bool, stand_ins: Mapping[int, str]) -> list[int]:
        """See `Tokenizer.encode_parts`. The library sees the whole text; only a stretch between
        special tokens that holds a stand-in is encoded again, with the stand-ins put back."""
        encoding = self._run(self._library, text, special)
        ids: list[int] = []
        for start, end, run in self._stretches(text, encoding):
            stretch = text[start:end]
            original = stretch.translate(stand_ins)
            if stretch != original:
                run = self._run(self._library if start == 0 else self._inner, original, False).ids
            ids.extend(run)
        return ids

    def _run(self, library: Library, text: str, special: bool) -> Encoding:
        with self._lock:  # the switch and the call belong together
            library.encode_special_tokens = not special
            return library.encode(text, add_special_tokens=False)

    def _stretches(self, text: str, encoding: Encoding) -> Iterator[tuple[int, int, list[int]]]:
        """(start, end, ids) of each special token and of each stretch of text between them."""
        position, run = 0, list[int]()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # a vocabulary's unknown-token id is special too, but its text is something else
            if token in self.special_ids and self.special.get(text[start:end].strip()) == token:
                yield position, start, run
                yield end, end, [token]
                position, run = end, []
            else:
                run.append(token)
        yield position, len(text), run

    @cached_property
    def _inner(self) -> Library:
        """The library's tokenizer for text that does not stand first: it writes no space before."""
        from tokenizers import Tokenizer as Library

        text = self._library.to_str()
        changed = text.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        return self._library if changed == text else Library.from_str(changed)

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if token in self._added:
            return self._added[token]
        text = self._library.id_to_token(token) if 0 <= token < 2**31 else None
        if text is None:
            return b""
        if not self._byte_level:
            byte = BYTE_PIECE.fullmatch(text)
            return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()
        values = [byte_of_character().get(character) for character in text]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else text.encode()


@cache
def byte_of_character() -> Mapping[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are their Latin-1 character, the others, in
    order, the characters from U+0100. (openai/gpt-2, encoder.py, bytes_to_unicode.)"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def decoder_types(library: Library) -> set[str]:
    """The type names in a tokenizer's decoder, those inside a Sequence included."""
    if library.decoder is None:
        return set()
    state = json.loads(library.decoder.__getstate__())
    return {state["type"], *(part["type"] for part in state.get("decoders", ()))}


def load_json(path: Path) -> Tokenizer:
    """A `tokenizer.json` with the JSON files beside it."""
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{path} is not a usable tokenizer.json ({error}): fetch the file again"
        ) from error
    config = read_config(path.parent)
    return LibraryTokenizer(library, _conventions(library, config), str(path))


def _conventions(library: Library, config: TokenizerConfig) -> Conventions:
    added = library.get_added_tokens_decoder()
    special = {entry.content: token for token, entry in added.items() if entry.special}
    special |= {text: a.id for text, a in config.added.items() if a.special and a.id in added}
    # what the library itself writes before a text, where the config does not say
    first = library.encode("").ids[:1]
    bos = first[0] if first else None
    if config.bos is not None:
        bos = library.token_to_id(config.bos)
    eos = library.token_to_id(config.eos) if config.eos is not None else None
    return Conventions(
        special=special,
        bos_id=bos,
        eos_id=eos,
        other_ends=config.end_ids,
        add_bos=first == [bos] if config.add_bos is None else config.add_bos,
        chat_template=config.chat_template,
    )
