"""Turn a conversation into the text and the ids that a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ModelError, UsageError
from .templates import CHATML, LLAMA_INST, render
from .vocabulary import Tokenizer, any_of, well_formed

Messages = Sequence[Mapping[str, str]]

_PRIVATE_USE = range(0x10F000, 0x10FFFE)


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
    try:
        return render(template, **variables, **texts), stand_ins
    except ModelError:
        folded = _folded(safe)
        if folded is None:
            raise
        return render(template, **{**variables, "messages": folded}, **texts), stand_ins


def _folded(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The system message put before the user's first text, for models that know no such role
    (Gemma's template refuses it); None where there is none."""
    if [m["role"] for m in messages[:2]] != ["system", "user"]:
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


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
