"""What goes with a model into its output: the tokenizer, and the small files beside it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, UnsupportedError
from ..graph import Graph
from ..tokenizer import load_tokenizer
from ..tokenizer.gguf import carries_tokenizer
from ..tokenizer.load import find
from ..tokenizer.save import files
from .folder import OutputFolder
from .onnxstream.vocabulary import vocab_txt, vocabulary_file

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "config.json",
)  # fmt: skip
"""Files that are copied as they are. None of them makes a folder another kind of model."""

_COPIED = (".json", ".model")  # tokenizers that other programs read, too; others are written as one


def tokenizer(source: Path, graph: Graph, folder: OutputFolder) -> None:
    """Put the tokenizer that belongs to a language model into its folder, so that texts have the
    same ids; nothing for another model, or one without a tokenizer.

    One inside a GGUF, or in OnnxStream's vocab.txt, is written as Hugging Face's files.
    """
    if not _reads_text(graph):
        return
    found = _found(source)
    if found is not None and found.suffix not in _COPIED:
        for name, content in files(load_tokenizer(found)).items():
            with folder.file(name) as file:
                file.write(content)
        return
    beside = source if source.is_dir() else source.parent
    for place in dict.fromkeys([found.parent if found else beside, beside]):
        for name in COMPANIONS:
            if name not in folder.files and (place / name).is_file():
                folder.copy(place / name)


def left_behind(source: Path, graph: Graph, out: Path) -> str:
    """A remark where a language model becomes one file, and its tokenizer is not beside that."""
    found = _found(source) if _reads_text(graph) else None
    if found is None or found.resolve().parent == out.resolve().parent:
        return ""
    return "one file holds no tokenizer: put the source's beside it, or name a folder as the output"


def text_vocabulary(source: Path, graph: Graph, folder: OutputFolder) -> str:
    """Put OnnxStream's vocab.txt into a language model's folder, where the vocabulary has that
    form; else a remark that says why not."""
    if not _reads_text(graph):
        return ""
    found = _found(source)
    if found is None:
        return "there is no vocab.txt, since the source has no tokenizer"
    try:
        data = vocab_txt(found if found.suffix == ".gguf" else vocabulary_file(found.parent))
    except UnsupportedError as error:
        return f"there is no vocab.txt, which OnnxStream itself needs: {error}"
    with folder.file("vocab.txt") as file:
        file.write(data)
    return ""


def _reads_text(graph: Graph) -> bool:
    return any(value.name == "input_ids" for value in graph.inputs)


def _found(source: Path) -> Path | None:
    try:
        found = find(source)
    except ModelError:  # such a model is run with ids
        return None
    return None if found.suffix == ".gguf" and not carries_tokenizer(found) else found
