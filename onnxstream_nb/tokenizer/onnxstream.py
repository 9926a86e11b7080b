"""OnnxStream's `vocab.txt`: one `score,token` line per id, read into a SentencePiece model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelError
from .sentencepiece import Piece, PieceType, from_pieces, piece_type
from .vocabulary import SPACE, Conventions, Tokenizer

ONNXSTREAM_ADDED = ("[PAD]", "<|im_start|>", "<|im_end|>")
"""What TinyLlama-1.1B-Chat-v0.3 adds to Llama's vocabulary; its vocab.txt leaves them out."""

_LINE = re.compile(rb"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?),(.+)", re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([\\'\"nrt])|)")
_ESCAPED = {b"\\": b"\\", b"'": b"'", b'"': b'"', b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_EMBEDDING = re.compile(r"embed_5F_tokens_2E_weight\.bin\(\w+(?:\[[^\]]*\])?:(\d+),")


def load_vocab_txt(path: Path) -> Tokenizer:
    """OnnxStream's `vocab.txt`: one `score,token` line per id, the token a Python byte literal's
    inside with spaces for `▁`. Control tokens are known by their text, or by standing behind
    the last scored piece; TinyLlama's three are supplied when model.txt has rows for them."""
    pieces = read_pieces(path)
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    conventions = Conventions(bos_id=ids.get("<s>"), eos_id=ids.get("</s>"), add_bos=True)
    return from_pieces(pieces, conventions, str(path))


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a `vocab.txt`, with those that TinyLlama's leaves out."""
    pieces = [_parse_line(path, n, line) for n, line in enumerate(_lines(path), 1)]
    if _embedding_rows(path.with_name("model.txt")) == len(pieces) + len(ONNXSTREAM_ADDED):
        pieces += [Piece(text, 0.0, PieceType.CONTROL) for text in ONNXSTREAM_ADDED]
    last = max((i for i, p in enumerate(pieces) if p.score < 0), default=len(pieces))
    pieces[last + 1 :] = [_trailing(piece) for piece in pieces[last + 1 :]]
    return pieces


def vocab_text(pieces: Sequence[Piece]) -> str:
    """The `vocab.txt` of pieces, as OnnxStream's recipe writes it: no newline at its end.

    TinyLlama's added tokens are left out where they stand last, since OnnxStream supplies them.
    """
    count = len(ONNXSTREAM_ADDED)
    if tuple(piece.text for piece in pieces[-count:]) == ONNXSTREAM_ADDED:
        pieces = pieces[:-count]
    return "\n".join(f"{int(p.score)},{_escaped(p.text)}" for p in pieces)


def _escaped(text: str) -> str:
    """As Python prints the inside of a bytes literal, with spaces for `▁`."""
    return str(text.replace(SPACE, " ").encode())[2:-1]


def _lines(path: Path) -> list[bytes]:
    return [line.removesuffix(b"\r") for line in path.read_bytes().rstrip(b"\r\n").split(b"\n")]


def _parse_line(path: Path, number: int, line: bytes) -> Piece:
    match = _LINE.fullmatch(line)
    try:
        if match is None:
            raise ValueError("no `score,token`")
        text = _ESCAPE.sub(_unescape, match[2]).decode().replace(" ", SPACE)
    except ValueError as error:
        raise ModelError(
            f"{path}, line {number}: {error} in {line[:60]!r}; each line should be a score, a "
            "comma and a token with Python byte escapes"
        ) from error
    return Piece(text, float(match[1]), piece_type(text))


def _unescape(match: re.Match[bytes]) -> bytes:
    if match[1]:
        return bytes([int(match[1], 16)])
    if not match[2]:
        raise ValueError("a backslash that escapes nothing")
    return _ESCAPED[match[2]]


def _trailing(piece: Piece) -> Piece:
    """Tokens added behind the scored pieces are written with score 0: control tokens all."""
    if piece.type is PieceType.NORMAL:
        return Piece(piece.text, piece.score, PieceType.CONTROL)
    return piece


def _embedding_rows(model_txt: Path) -> int | None:
    """The vocabulary size of an OnnxStream model: the rows of its embedding table."""
    if not model_txt.is_file():
        return None
    with model_txt.open(encoding="utf-8", errors="replace") as lines:
        return next((int(m[1]) for m in map(_EMBEDDING.search, lines) if m), None)
