"""Find and load a model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import ModelError
from .vocabulary import Tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt")
"""What is looked for in a model's folder, in this order; then a GGUF, which carries its own."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model file or folder, or a tokenizer file itself.

    A GGUF carries its own. For another model file its folder is searched, then the one above
    (exports often lie in a subfolder `onnx`). ModelError if there is none, or it is damaged."""
    file = find(Path(path))
    return _LOADERS[file.suffix](file)


def find(path: Path) -> Path:
    """The file that `load_tokenizer` reads; the same errors."""
    if not path.exists():
        raise ModelError(f"{path} does not exist: name a model's file or folder")
    if path.is_file() and (path.name in FILES or path.suffix in (".gguf", ".model")):
        return path
    folders = [path] if path.is_dir() else [path.parent, path.resolve().parent.parent]
    for folder in folders:
        named = (folder / name for name in FILES)
        found = next((file for file in named if file.is_file()), None)
        found = found or next(iter(sorted(folder.glob("*.gguf"))), None)
        if found is not None:
            return found
    places = " and ".join(map(str, folders))
    raise ModelError(
        f"no tokenizer in {places}: looked for {', '.join(FILES)} and *.gguf; "
        "put the model's tokenizer file there"
    )


def _load_json(path: Path) -> Tokenizer:
    from .bpe import load_json

    return load_json(path)


def _load_model(path: Path) -> Tokenizer:
    from .sentencepiece import load_model

    return load_model(path)


def _load_vocab_txt(path: Path) -> Tokenizer:
    from .onnxstream import load_vocab_txt

    return load_vocab_txt(path)


def _load_gguf(path: Path) -> Tokenizer:
    from .gguf import load_gguf

    return load_gguf(path)


_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    ".json": _load_json,
    ".model": _load_model,
    ".txt": _load_vocab_txt,
    ".gguf": _load_gguf,
}
