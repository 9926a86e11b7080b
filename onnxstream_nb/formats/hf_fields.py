"""The fields of a Hugging Face JSON file, each checked for its type as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .safetensors_header import read_object


class Fields:
    """`explicit` are the file's fields but for those that are null, `values` also `defaults` of
    those that it does not mention."""

    def __init__(self, path: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self.path = path
        everything = read_object(path)
        self.explicit = {k: v for k, v in everything.items() if v is not None}
        absent = {k: v for k, v in (defaults or {}).items() if k not in everything}
        self.values = {**absent, **self.explicit}

    def error(self, name: str, wanted: str) -> ModelError:
        if name not in self.values:
            return ModelError(f"{self.path}: the field '{name}' is missing")
        return ModelError(f"{self.path}: {name} = {self.values[name]!r} is not {wanted}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.error(name, "a positive number")
        return float(value)

    def optional(self, name: str) -> float:
        """A positive number, or 0 where there is none."""
        return self.number(name) if name in self.values else 0.0

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return value
