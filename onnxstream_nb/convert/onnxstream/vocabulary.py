"""OnnxStream's vocab.txt from a SentencePiece vocabulary, and a tokenizer.model from a vocab.txt.

What is written is read back and must give the ids of the original for many texts: a vocabulary
whose way of cutting text the file cannot hold is refused.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ModelError, UnsupportedError, UsageError
from ...tokenizer import Tokenizer, load_tokenizer
from ...tokenizer.onnxstream import read_pieces as pieces_of_text
from ...tokenizer.onnxstream import vocab_text
from ...tokenizer.sentencepiece import Piece, PieceType, model_bytes, piece_type
from ...tokenizer.sentencepiece import read_pieces as pieces_of_model

KEEP = "keep tokenizer.json beside model.txt: it is read before a vocab.txt"

_ORDER = ("tokenizer.model", "tokenizer.json", "vocab.txt")
_PROBES = 400
_TEXTS = (
    "", "  two spaces,  and more   ", "line\n\nbreaks\tand\ttabs ", "naïve café, Привет, 日本語 🎉",
    "def f(x):\n    return x ** 2  # 12345.678", "<s>[INST] it's </s>", "e\u0301 ﷺ \u200b ▁",
)  # fmt: skip


def convert_vocabulary(source: Path, out: Path, *, overwrite: bool = False) -> int:
    """Write the vocabulary of `source` as `out`, NAME.txt or NAME.model; returns its tokens.

    `source` is a tokenizer.model, tokenizer.json, vocab.txt or GGUF, or a folder with one. Raises
    UnsupportedError when `out` would not cut text into the ids that `source` gives.
    """
    writers = {".txt": vocab_txt, ".model": tokenizer_model}
    if out.suffix not in writers:
        raise UsageError(f"-o {out}: name a vocab.txt, or a tokenizer.model")
    if out.exists() and not overwrite:
        raise UsageError(f"-o {out} exists; name another output, or give --overwrite")
    file = vocabulary_file(source)
    if out.exists() and out.samefile(file):
        raise UsageError(f"-o {out}: that is the vocabulary that is read; name another output")
    data = writers[out.suffix](file)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return len(pieces_of(file))


def vocabulary_file(source: Path) -> Path:
    """The file that holds the vocabulary of `source`, the one with scores where there are two."""
    if source.is_file():
        return source
    named = (source / name for name in _ORDER)
    found = next((f for f in named if f.is_file()), None)
    found = found or next(iter(sorted(source.glob("*.gguf"))), None)
    if found is None:
        raise ModelError(f"{source}: no vocabulary; looked for {', '.join(_ORDER)} and *.gguf")
    return found


def vocab_txt(file: Path) -> bytes:
    """OnnxStream's vocab.txt of a vocabulary, see `convert_vocabulary`."""
    pieces = pieces_of(file)
    data = vocab_text(_with_whole_scores(pieces)).encode()
    _check(file, "vocab.txt", data)
    return data


def tokenizer_model(file: Path) -> bytes:
    """A SentencePiece model of a vocabulary, see `convert_vocabulary`."""
    pieces = pieces_of(file)
    data = model_bytes(pieces, add_space_prefix=True, remove_extra_whitespaces=False)
    _check(file, "tokenizer.model", data)
    return data


def pieces_of(file: Path) -> list[Piece]:
    """The pieces of a vocabulary, by id. UnsupportedError for one that is not SentencePiece's."""
    readers = {
        ".model": pieces_of_model, ".txt": pieces_of_text, ".json": _pieces_of_json,
        ".gguf": _pieces_of_gguf,
    }  # fmt: skip
    if file.suffix not in readers:
        raise UsageError(f"{file}: no vocabulary; name a {', '.join(_ORDER)} or a GGUF")
    pieces = readers[file.suffix](file)
    return [*pieces, *_added(file, len(pieces))] if file.suffix == ".model" else pieces


def _added(file: Path, size: int) -> Iterator[Piece]:
    """Tokens that the files beside a tokenizer.model add behind its own."""
    from ...tokenizer.config import read_config

    added = read_config(file.parent).added.items()
    beyond = sorted((a.id, text, a.special) for text, a in added if a.id >= size)
    for position, (token, text, special) in enumerate(beyond, size):
        if token != position:
            raise UnsupportedError(f"{file}: no token {position}, but added token {token}")
        yield Piece(text, 0.0, PieceType.CONTROL if special else PieceType.USER_DEFINED)


def _pieces_of_gguf(file: Path) -> list[Piece]:
    from ...formats.gguf import header

    metadata = header(file).metadata
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise _no_sentencepiece(file, f"a {model!r} vocabulary")
    load_tokenizer(file)  # tells what is wrong with it
    texts, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores"))
    kinds = metadata.get("tokenizer.ggml.token_type") or [piece_type(t) for t in texts]
    rows = zip(texts, scores, kinds, strict=True)
    return [Piece(text, float(score), PieceType(kind)) for text, score, kind in rows]


# -- tokenizer.json


def _pieces_of_json(file: Path) -> list[Piece]:
    """The pieces of a byte-pair vocabulary that came from SentencePiece, scored by merges.

    SentencePiece merges the neighbours whose union has the best score; this file lists pairs by
    rank. The two are the same when every pair of tokens that make a third is listed, in the order
    of what they make.
    """
    load_tokenizer(file)  # tells what is wrong with it
    state = json.loads(file.read_text(encoding="utf-8"))
    model = state["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = "byte-level BPE" if model.get("type") == "BPE" else model.get("type")
        raise _no_sentencepiece(file, f"a {kind} vocabulary")
    special = {a["content"]: bool(a["special"]) for a in state.get("added_tokens") or []}
    texts: dict[str, int] = {**model["vocab"]}
    texts |= {a["content"]: a["id"] for a in state.get("added_tokens") or []}
    if sorted(texts.values()) != list(range(len(texts))):
        raise _no_sentencepiece(file, "a vocabulary with gaps in its ids")
    kinds = {text: _kind(text, special) for text in texts}
    normal = [t for t in texts if kinds[t] is PieceType.NORMAL]
    scores = _scores(file, sorted(normal, key=texts.__getitem__), model["merges"])
    ordered = sorted(texts, key=texts.__getitem__)
    return [Piece(text, scores.get(text, 0.0), kinds[text]) for text in ordered]


def _kind(text: str, special: Mapping[str, bool]) -> PieceType:
    if text in special and text != "<unk>":
        return PieceType.CONTROL if special[text] else PieceType.USER_DEFINED
    kind = piece_type(text)
    return kind if kind in (PieceType.BYTE, PieceType.UNKNOWN) else PieceType.NORMAL


def _scores(file: Path, texts: Sequence[str], merges: list[Any]) -> dict[str, float]:
    """Minus the order in which pieces are merged; those that no merge makes come last."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    made = [left + right for left, right in pairs]
    order = list(dict.fromkeys(made))
    rank = {text: i for i, text in enumerate(order)}
    listed, known = set(pairs), set(texts)
    in_order = all(rank[a] <= rank[b] for a, b in zip(made, made[1:], strict=False))
    cuts = ((t[:i], t[i:]) for t in texts for i in range(1, len(t)))
    complete = all(c in listed for c in cuts if c[0] in known and c[1] in known)
    if not in_order or not complete:
        raise _no_sentencepiece(file, "a vocabulary whose merges are not those of its pieces")
    rest = [text for text in texts if text not in rank]
    return {text: -float(i) for i, text in enumerate([*order, *rest])}


def _no_sentencepiece(file: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{file}: {what}, and vocab.txt and tokenizer.model hold SentencePiece's only: the same "
        f"text would become other ids; {KEEP}"
    )


# -- what was written


def _with_whole_scores(pieces: list[Piece]) -> list[Piece]:
    """Merging needs the order of the scores only: fractions are replaced by their ranks."""
    if all(piece.score == int(piece.score) for piece in pieces):
        return pieces
    ranks = {s: -i for i, s in enumerate(sorted({p.score for p in pieces}, reverse=True))}
    return [replace(piece, score=float(ranks[piece.score])) for piece in pieces]


def _check(file: Path, name: str, data: bytes) -> None:
    """Raise UnsupportedError when what was written gives other ids."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        written, original = load_tokenizer(path), load_tokenizer(file)
    for text in _probes(original, written.vocab_size):
        if original.encode(text) != written.encode(text):
            raise UnsupportedError(
                f"{file}: {text[:40]!r} would become other ids by the {name}, which cannot hold "
                f"how this vocabulary cuts text; {KEEP}"
            )


def _probes(tokenizer: Tokenizer, size: int) -> Iterator[str]:
    """Texts of all kinds: some written here, others from tokens of the vocabulary at random."""
    yield from _TEXTS
    yield from (f"{' ' * n}a{' ' * n}" for n in range(1, 40))
    rng = random.Random(0)
    ordinary = [i for i in range(min(size, tokenizer.vocab_size)) if i not in tokenizer.special_ids]
    for _ in range(_PROBES):
        tokens = rng.choices(ordinary, k=rng.randint(1, 12))
        yield b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace")
