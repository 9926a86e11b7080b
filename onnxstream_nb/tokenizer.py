"""Find and load a model's tokenizer; turn a conversation into ids; watch for stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import ModelError, UsageError
from .templates import CHATML, LLAMA_INST, render
from .vocabulary import TextStream, Tokenizer, any_of, well_formed

__all__ = [
    "StopStrings", "TextStream", "Tokenizer", "encode_chat", "load_tokenizer", "render_chat",
]  # fmt: skip

Messages = Sequence[Mapping[str, str]]

FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt")
"""What is looked for in a model's folder, in this order; then a GGUF, which carries its own."""

_PRIVATE_USE = range(0x10F000, 0x10FFFE)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model file or folder, or a tokenizer file itself.

    A GGUF carries its own. For another model file its folder is searched, then the one above
    (exports often lie in a subfolder `onnx`). ModelError if there is none, or it is damaged."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist: name a model's file or folder")
    itself = path.is_file() and (path.name in FILES or path.suffix in (".gguf", ".model"))
    file = path if itself else _find(path)
    return _LOADERS[file.suffix](file)


def _find(path: Path) -> Path:
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
    from .bpe_vocabulary import load_json

    return load_json(path)


def _load_model(path: Path) -> Tokenizer:
    from .sentencepiece_vocabulary import load_model

    return load_model(path)


def _load_vocab_txt(path: Path) -> Tokenizer:
    from .onnxstream_vocabulary import load_vocab_txt

    return load_vocab_txt(path)


def _load_gguf(path: Path) -> Tokenizer:
    from .gguf_vocabulary import load_gguf

    return load_gguf(path)


_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    ".json": _load_json,
    ".model": _load_model,
    ".txt": _load_vocab_txt,
    ".gguf": _load_gguf,
}


def render_chat(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = True
) -> str:
    """The conversation as the model will read it, its BOS included."""
    text, stand_ins = _render(tokenizer, messages, add_generation_prompt)
    bos = tokenizer.token_text(tokenizer.bos_id)
    wanted = _wants_bos(tokenizer) and not text.startswith(bos)
    return (bos if wanted else "") + text.translate(stand_ins)


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, *, add_generation_prompt: bool = True
) -> list[int]:
    """The conversation as ids. Special tokens come from the template alone: their text inside
    a message stays text. BOS is added where the model wants one and its template has none."""
    text, stand_ins = _render(tokenizer, messages, add_generation_prompt)
    ids = tokenizer.encode_parts(text, True, stand_ins)
    if _wants_bos(tokenizer) and ids[:1] != [tokenizer.bos_id] and tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
    return ids


def _wants_bos(tokenizer: Tokenizer) -> bool:
    """The built-in formats are complete; a model's own template may leave BOS to the tokenizer."""
    return tokenizer.add_bos and tokenizer.chat_template is not None


def _render(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool
) -> tuple[str, dict[int, str]]:
    """Rendered text in which stand-in characters take the place of special tokens' text inside
    the messages, and what each of them (by code point) stands for."""
    template = tokenizer.chat_template or _built_in(tokenizer)
    safe, stand_ins = _protect(_checked(messages), tokenizer.special)
    variables = {"messages": safe, "add_generation_prompt": add_generation_prompt, "tools": None}
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    texts = {name: tokenizer.token_text(token) for name, token in named.items()}
    return render(template, **variables, **texts), stand_ins


def _built_in(tokenizer: Tokenizer) -> str:
    """The formats of OnnxStream's two models, told apart by their special tokens."""
    for token, template in {"<|im_start|>": CHATML, "<s>": LLAMA_INST}.items():
        if token in tokenizer.special:
            return template
    raise ModelError("the model has no chat template: use --raw, which continues a plain text")


def _checked(messages: Messages) -> list[dict[str, str]]:
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f"message {number} needs a text as its {key!r}")
    return [{key: well_formed(text) for key, text in message.items()} for message in messages]


def _protect(
    messages: list[dict[str, str]], special: Mapping[str, int]
) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Swap special tokens' text in the messages (but not in their roles) for private characters."""
    pattern = any_of(special)
    texts = [text for message in messages for key, text in message.items() if key != "role"]
    found = {text for content in texts for text in (pattern.findall(content) if pattern else ())}
    if not found or pattern is None:
        return messages, {}
    used = set().union(*texts)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    stand_in = dict(zip(sorted(found), free, strict=False))
    safe = [
        {k: t if k == "role" else pattern.sub(lambda m: stand_in[m[0]], t) for k, t in m.items()}
        for m in messages
    ]
    return safe, {ord(character): text for text, character in stand_in.items()}


class StopStrings:
    """Cuts streamed text at the first stop string to be completed, however the text is chunked.

    Text that might be the beginning of a stop string is held back until that is settled."""

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise UsageError("stop should be a list of texts, none of them empty (--stop)")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met: nothing comes after it)."""
        if self.stopped:
            return "", True
        held = self._held + text
        found = [(held.find(s) + len(s), -len(s)) for s in self._stops if s in held]
        if found:
            self.stopped, self._held = True, ""
            end, length = min(found)
            return held[: end + length], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
