"""The tokenizer inside a GGUF: byte-level BPE ("gpt2") or SentencePiece pieces ("llama").

The keys are described in ggml's docs/gguf.md; the pre-tokenizers are named as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedError
from .bpe import LibraryTokenizer
from .sentencepiece import Piece, PieceType, from_pieces, piece_type
from .vocabulary import Conventions, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging: `pattern`, or GPT-2's where it is None."""

    pattern: str | None = None
    single_digits: bool = False
    normalize: bool = False
    """Unicode NFC first."""
    whole_words: bool = False
    """A word that is a token is taken whole, merges or not; these models also want a BOS."""


_LLAMA_3 = PreTokenizer(_WORDS + r"|\p{N}{1,3}" + _TAIL, whole_words=True)
_QWEN_2 = PreTokenizer(_WORDS + r"|\p{N}" + _TAIL, normalize=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "phi-2": PreTokenizer(),
    "dbrx": PreTokenizer(_LLAMA_3.pattern),
    "gpt-4o": PreTokenizer(_O200K),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "tekken": PreTokenizer(_TEKKEN, whole_words=True),
}
"""tokenizer.ggml.pre -> how that model's tokenizer cuts text."""

_TURNS = frozenset({"<start_of_turn>", "<end_of_turn>"})
"""Gemma's, which some files call user defined: no text of a message is to become them."""


def load_gguf(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF's header."""
    from ..formats.gguf import header

    return from_metadata(header(path).metadata, str(path))


def carries_tokenizer(path: Path) -> bool:
    """Whether there is a tokenizer in a GGUF's header, supported or not."""
    from ..formats.gguf import header

    return "tokenizer.ggml.model" in header(path).metadata


def from_metadata(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build a tokenizer from a GGUF's `tokenizer.*` keys. `where` names the file in errors."""
    model = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model is None:
        raise ModelError(f"{where} holds no tokenizer (tokenizer.ggml.model): use a file that does")
    if model not in builders:
        raise UnsupportedError(
            f"{where}: tokenizer.ggml.model {model!r} is not supported ({', '.join(builders)} are)"
        )
    return builders[model](metadata, where)


def _byte_level(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    texts = _texts(metadata, where)
    types = _types(metadata, texts, where)
    pre = _pre_tokenizer(metadata, where)
    special = {t: i for i, t in enumerate(texts) if types[i] is PieceType.CONTROL}
    library = byte_level_library(texts, metadata.get("tokenizer.ggml.merges"), pre, where)
    _add_tokens(library, special, [t for t, k in zip(texts, types, strict=True)
                                   if k is PieceType.USER_DEFINED])  # fmt: skip
    return LibraryTokenizer(library, _conventions(metadata, special, pre.whole_words), where)


def byte_level_library(texts: list[str], merges: Any, pre: PreTokenizer, where: str) -> Library:
    """A byte-level BPE of the `tokenizers` library. `merges`: "left right" strings, by rank."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    if not isinstance(merges, list):
        raise ModelError(f"{where} has no tokenizer.ggml.merges, which a gpt2 tokenizer needs")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        vocabulary = {text: token for token, text in enumerate(texts)}
        library = Library(BPE(vocabulary, pairs, ignore_merges=pre.whole_words))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{where}: tokenizer.ggml.merges do not fit its tokens ({error})"
        ) from error
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.decoder = decoders.ByteLevel()
    if pre.normalize:
        library.normalizer = normalizers.NFC()
    return library


def _add_tokens(library: Library, special: Mapping[str, int], ordinary: list[str]) -> None:
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    library.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])


def _sentencepiece(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    texts = _texts(metadata, where)
    types = _types(metadata, texts, where)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise ModelError(f"{where}: tokenizer.ggml.scores should hold {len(texts)} numbers")
    types = [PieceType.CONTROL if t in _TURNS else k for t, k in zip(texts, types, strict=True)]
    pieces = [Piece(*row) for row in zip(texts, map(float, scores), types, strict=True)]
    return from_pieces(
        pieces,
        _conventions(metadata, {}, True),
        where,
        add_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces")),
    )


def _texts(metadata: Mapping[str, Any], where: str) -> list[str]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ModelError(f"{where}: tokenizer.ggml.tokens should be a list of strings")
    return texts


def _types(metadata: Mapping[str, Any], texts: list[str], where: str) -> list[PieceType]:
    numbers = metadata.get("tokenizer.ggml.token_type")
    if numbers is None:
        return [piece_type(text) for text in texts]
    if not isinstance(numbers, list) or len(numbers) != len(texts):
        raise ModelError(f"{where}: tokenizer.ggml.token_type should hold {len(texts)} numbers")
    try:
        kinds = {number: PieceType(number) for number in set(numbers)}
    except ValueError as error:
        raise ModelError(f"{where}: tokenizer.ggml.token_type: {error}") from error
    return [kinds[number] for number in numbers]


def _pre_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{where}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; "
            f"{', '.join(PRE_TOKENIZERS)} are"
        )
    return PRE_TOKENIZERS[name]


def _conventions(
    metadata: Mapping[str, Any], special: Mapping[str, int], add_bos: bool
) -> Conventions:
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
    template = metadata.get("tokenizer.chat_template")
    return Conventions(
        special=special,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        other_ends=[token for token in ends if token is not None],
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        chat_template=template if isinstance(template, str) else None,
    )
