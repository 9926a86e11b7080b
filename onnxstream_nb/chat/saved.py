"""Conversations on disk: one JSON file each, replaced atomically after every turn."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError

_NAME = re.compile(r"[\w-][\w. -]{0,99}")
_AUTOMATIC = "auto-"


@dataclass
class SavedChat:
    """A conversation as it is stored. `settings` holds what the user set with /set or flags."""

    name: str
    model: str
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)


def data_folder() -> Path:
    """Where chats and the input history lie: ONNXSTREAM_DATA, or the user's data folder."""
    if given := os.environ.get("ONNXSTREAM_DATA"):
        return Path(given).expanduser()
    from platformdirs import user_data_dir

    return Path(user_data_dir("onnxstream_nb", appauthor=False))


def automatic_name() -> str:
    """A name for a chat that the user has not named; unique to this process and moment."""
    return f"{_AUTOMATIC}{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}-{time.time_ns() % 10**6}"


def is_automatic(name: str) -> bool:
    """Whether `name` was made by `automatic_name`."""
    return name.startswith(_AUTOMATIC)


def path_of(name: str) -> Path:
    """The file of the chat `name`; UsageError for a name that cannot be a file's."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a chat: use letters, digits, '-', '_', '.' and spaces"
        )
    return data_folder() / "chats" / f"{name}.json"


def private_folder(folder: Path) -> Path:
    """Makes `folder`, readable by this user only, and returns it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def save_chat(chat: SavedChat) -> Path:
    """Writes the chat beside its old version, then replaces that; returns the file."""
    path = path_of(chat.name)
    private_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(asdict(chat), ensure_ascii=False, indent=1), "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_chat(name: str) -> SavedChat:
    """Reads the chat `name`; UsageError when there is none or its file is damaged."""
    path = path_of(name)
    try:
        return _parse(json.loads(path.read_text("utf-8")), name)
    except FileNotFoundError:
        known = ", ".join(n for n in chat_names() if not is_automatic(n)) or "none"
        raise UsageError(f"there is no saved chat {name!r}; saved are: {known}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot read the chat {path}: {error}; delete the file") from error


def chat_names() -> list[str]:
    """The names of all saved chats, the last used one first."""
    files = (data_folder() / "chats").glob("[!.]*.json")
    return [f.stem for f in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True)]


def delete_chat(name: str) -> None:
    """Removes the chat's file, if there is one."""
    path_of(name).unlink(missing_ok=True)


def _parse(data: dict[str, Any], name: str) -> SavedChat:
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in data["messages"]]
    system = data["system"]
    if system is not None and not isinstance(system, str):
        raise ValueError("its system prompt is no text")
    return SavedChat(name, str(data["model"]), system, dict(data["settings"]), messages)
