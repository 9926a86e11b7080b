"""The small JSON files beside a Hugging Face tokenizer: special tokens, ends, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True, slots=True)
class Added:
    """A token added to a vocabulary after its training. Only a special one is a control token."""

    id: int
    special: bool


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What the files of a folder say; None where they say nothing."""

    added: Mapping[str, Added]
    bos: str | None
    eos: str | None
    add_bos: bool | None
    chat_template: str | None
    end_ids: frozenset[int]


def read_config(folder: Path) -> TokenizerConfig:
    """Read tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json and chat_template.jinja (or .json), whichever `folder` has."""
    config = _read_object(folder / "tokenizer_config.json")
    named = {**_read_object(folder / "special_tokens_map.json"), **config}
    add_bos = config.get("add_bos_token")
    return TokenizerConfig(
        added=_added_tokens(folder, config),
        bos=_token_text(named.get("bos_token")),
        eos=_token_text(named.get("eos_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_chat_template(folder, config),
        end_ids=_end_ids(folder / "generation_config.json"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _token_text(value: object) -> str | None:
    """A token is written as its text or as an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Added]:
    path = folder / "added_tokens.json"
    added = {}
    for text, token in _read_object(path).items():
        added[text] = Added(_id(token, path, text), True)
    path = folder / "tokenizer_config.json"
    for token, entry in config.get("added_tokens_decoder", {}).items():
        content = _token_text(entry)
        if content is None:
            raise ModelError(f"{path}: added_tokens_decoder entry {token} has no content")
        special = isinstance(entry, str) or bool(entry.get("special"))
        added[content] = Added(_id(token, path, content), special)
    return added


def _id(value: object, path: Path, text: str) -> int:
    if isinstance(value, (int, str)) and str(value).isdecimal():
        return int(value)
    raise ModelError(f"{path}: the id of token {text!r} should be a whole number, not {value!r}")


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before the config's field; of several templates, `default`."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    fields = (_read_object(folder / "chat_template.json"), config)
    template = next((f["chat_template"] for f in fields if f.get("chat_template")), None)
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _end_ids(path: Path) -> frozenset[int]:
    value = _read_object(path).get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if isinstance(token, int))
