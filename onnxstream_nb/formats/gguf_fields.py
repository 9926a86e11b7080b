"""The metadata of a language model in a GGUF file, each value checked for its type."""

from __future__ import annotations

from typing import Any

from ..errors import ModelError, UnsupportedError
from .gguf_header import Header

_KNOWN_FIELDS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.sliding_window",
    "attention.causal", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count", "tensor_data_layout",
})  # fmt: skip
"""Fields of an architecture that are read here, or known not to change the results."""


class Fields:
    """The metadata below `<architecture>.`, checked for type as it is read."""

    def __init__(self, source: Header, architecture: str) -> None:
        self.path, self.prefix = source.path, architecture + "."
        self.metadata = source.metadata

    def raw(self, name: str) -> Any:
        return self.metadata.get(self.prefix + name)

    def get(self, name: str) -> Any:
        """The value or None; a list of equal items (one per layer) counts as that item."""
        value = self.raw(name)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise UnsupportedError(
                    f"{self.path}: {self.prefix}{name} differs between layers, "
                    "which is not supported"
                )
            value = value[0]
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ModelError(
                f"{self.path}: metadata {self.prefix}{name} = {value!r} is not a positive integer"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or not 0 < value < 1e12:
            raise ModelError(
                f"{self.path}: metadata {self.prefix}{name} = {value!r} is not a positive number"
            )
        return float(value)

    def check_known(self, further: frozenset[str]) -> None:
        """Refuse fields that may change the results and are not understood."""
        known = _KNOWN_FIELDS | further
        for key, value in self.metadata.items():
            name = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and name not in known and value:
                raise UnsupportedError(
                    f"{self.path}: metadata {key} = {value!r} is not known and may change "
                    "the results"
                )
        if self.get("expert_count"):
            raise UnsupportedError(
                f"{self.path}: {self.prefix}expert_count = {self.get('expert_count')}: mixture-of-"
                "experts models are not supported; choose a dense model"
            )
        if self.get("attention.causal") is False:
            raise UnsupportedError(
                f"{self.path}: {self.prefix}attention.causal is false: models that do not "
                "generate text are not supported"
            )
