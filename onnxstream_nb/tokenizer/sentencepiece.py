"""SentencePiece vocabularies: `.model` files, and pieces read from vocab.txt or a GGUF.

All end in a `SentencePieceProcessor`: the library does the merging, whatever the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedError
from .config import Added, read_config
from .vocabulary import BYTE_PIECE, SPACE, Conventions, Tokenizer, any_of

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_BPE = 2  # TrainerSpec.ModelType
_CONTROL = re.compile(r"<unk>|</?s>|<pad>|\[PAD\]|<\|.*\|>")


class PieceType(IntEnum):
    """Kinds of pieces; the numbers are those of SentencePiece and of GGUF's token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One line of a vocabulary: its text (spaces as `▁`), score and kind."""

    text: str
    score: float
    type: PieceType


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model and the tokens added to it.

    Text is split at special tokens and each part encoded on its own, with SentencePiece's
    leading space: as Mistral's reference tokenizer and Hugging Face's Llama tokenizer do.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        conventions: Conventions,
        added: Mapping[str, int],
        strips_leading_space: bool = True,
    ) -> None:
        size = max([processor.vocab_size(), *(token + 1 for token in added.values())])
        super().__init__(size, conventions)
        self.strips_leading_space = strips_leading_space
        self._processor = processor
        self._added_text = {token: text for text, token in added.items()}
        self._whole = {**added, **self.special}
        ordinary = [text for text in added if text not in self.special]
        self._ordinary = any_of(ordinary)
        self._all = any_of([*ordinary, *self.special])

    @property
    def added(self) -> Mapping[str, int]:
        """The tokens that the SentencePiece model itself does not hold."""
        return {text: token for token, text in self._added_text.items()}

    def vocabulary_model(self) -> bytes:
        """The vocabulary as a SentencePiece `.model`."""
        model: bytes = self._processor.serialized_model_proto()
        return model

    def encode_parts(self, text: str, special: bool, stand_ins: Mapping[int, str]) -> list[int]:
        """See `Tokenizer.encode_parts`."""
        pattern = self._all if special else self._ordinary
        ids: list[int] = []
        for position, part in enumerate(pattern.split(text) if pattern else [text]):
            if position % 2:
                ids.append(self._whole[part])
            elif part:
                ids.extend(self._processor.encode(part.translate(stand_ins)))
        return ids

    def token_bytes(self, token: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        if token in self._added_text:
            return self._added_text[token].encode()
        if not 0 <= token < self._processor.vocab_size():
            return b""
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def load_model(path: Path) -> Tokenizer:
    """A SentencePiece `.model` with the JSON files beside it, where there are any.

    BOS is added unless tokenizer_config.json says otherwise, as Llama and Mistral expect."""
    processor = _processor(path.read_bytes(), str(path))
    config = read_config(path.parent)
    special = _own_control_tokens(processor)
    special.update({text: a.id for text, a in config.added.items() if a.special})
    bos = special.get(config.bos or "", processor.bos_id())
    eos = special.get(config.eos or "", processor.eos_id())
    conventions = Conventions(
        special=special,
        bos_id=bos if bos >= 0 else None,
        eos_id=eos if eos >= 0 else None,
        other_ends=config.end_ids,
        add_bos=config.add_bos is not False,
        chat_template=config.chat_template,
    )
    return SentencePieceTokenizer(
        processor, conventions, _beyond(processor, config.added), _writes_a_space(processor)
    )


def from_pieces(
    pieces: Sequence[Piece],
    conventions: Conventions,
    where: str,
    *,
    add_space_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> Tokenizer:
    """Build a SentencePiece BPE model of `pieces`; its control tokens become special.

    `where` names the file in errors."""
    model = model_bytes(
        pieces,
        add_space_prefix=add_space_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
    hidden = (PieceType.CONTROL, PieceType.UNKNOWN)
    special = {piece.text: i for i, piece in enumerate(pieces) if piece.type in hidden}
    return SentencePieceTokenizer(
        _processor(model, where),
        replace(conventions, special=special),
        {},
        strips_leading_space=add_space_prefix,
    )


def model_bytes(
    pieces: Sequence[Piece], *, add_space_prefix: bool, remove_extra_whitespaces: bool
) -> bytes:
    """A SentencePiece BPE `.model` of `pieces`, which changes no character before it merges."""
    normalizer = {
        "name": "identity",
        "add_dummy_prefix": add_space_prefix,
        "remove_extra_whitespaces": remove_extra_whitespaces,
    }
    rows = [{"piece": p.text, "score": p.score, "type": int(p.type)} for p in pieces]
    trainer = {"model_type": _BPE, "byte_fallback": any(p.type is PieceType.BYTE for p in pieces)}
    message = _model_proto()(pieces=rows, trainer_spec=trainer, normalizer_spec=normalizer)
    data: bytes = message.SerializeToString()
    return data


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a SentencePiece `.model`; UnsupportedError when it is no BPE."""
    data = path.read_bytes()
    _processor(data, str(path))  # tells what is wrong with it
    message = _model_proto().FromString(data)
    if message.trainer_spec.model_type != _BPE:
        raise UnsupportedError(
            f"{path}: its pieces are chosen by probability (a unigram model), and vocab.txt is for "
            "pieces that are merged; keep this file beside the model"
        )
    return [Piece(p.piece, p.score, PieceType(p.type or PieceType.NORMAL)) for p in message.pieces]


def piece_type(text: str) -> PieceType:
    """The kind of a piece whose file does not tell: by its text."""
    if BYTE_PIECE.fullmatch(text):
        return PieceType.BYTE
    if text == "<unk>":
        return PieceType.UNKNOWN
    return PieceType.CONTROL if _CONTROL.fullmatch(text) else PieceType.NORMAL


def _processor(model: bytes, where: str) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    if not model:  # the library would return an empty processor
        raise ModelError(f"{where} is empty: fetch the file again")
    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"{where} is not a usable SentencePiece vocabulary ({error}): fetch the file again"
        ) from error


def _own_control_tokens(processor: SentencePieceProcessor) -> dict[str, int]:
    ids = range(processor.vocab_size())
    hidden = (i for i in ids if processor.is_control(i) or processor.is_unknown(i))
    return {processor.id_to_piece(i): i for i in hidden}


def _writes_a_space(processor: SentencePieceProcessor) -> bool:
    """Whether a space is written before a text, as it is unless the model says otherwise."""
    model = _model_proto().FromString(processor.serialized_model_proto())
    normalizer = model.normalizer_spec
    return not normalizer.HasField("add_dummy_prefix") or bool(normalizer.add_dummy_prefix)


def _beyond(processor: SentencePieceProcessor, added: Mapping[str, Added]) -> dict[str, int]:
    """The added tokens that the SentencePiece model itself does not hold."""
    size = processor.vocab_size()
    return {
        text: token.id
        for text, token in added.items()
        if token.id >= size or processor.id_to_piece(token.id) != text
    }


def _model_proto() -> Any:
    """The message class of a SentencePiece model, as far as encoding needs it.

    The field numbers are sentencepiece_model.proto's. The package's own generated module is not
    used: it loads only with protobuf of at least the version that generated it."""
    from google.protobuf import (
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    kinds = descriptor_pb2.FieldDescriptorProto
    text, boolean, integer = kinds.TYPE_STRING, kinds.TYPE_BOOL, kinds.TYPE_INT32
    messages = {
        "Piece": [("piece", 1, text), ("score", 2, kinds.TYPE_FLOAT), ("type", 3, integer)],
        "Trainer": [("model_type", 3, integer), ("byte_fallback", 35, boolean)],
        "Normalizer": [("name", 1, text), ("add_dummy_prefix", 3, boolean),
                       ("remove_extra_whitespaces", 4, boolean)],
        "Model": [("pieces", 1, "Piece"), ("trainer_spec", 2, "Trainer"),
                  ("normalizer_spec", 3, "Normalizer")],
    }  # fmt: skip
    file = descriptor_pb2.FileDescriptorProto(name="model.proto", package="vocabulary")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            label = kinds.LABEL_REPEATED if field_name == "pieces" else kinds.LABEL_OPTIONAL
            entry = message.field.add(name=field_name, number=number, label=label)
            if isinstance(kind, str):
                entry.type, entry.type_name = kinds.TYPE_MESSAGE, f".vocabulary.{kind}"
            else:
                entry.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vocabulary.Model"))
