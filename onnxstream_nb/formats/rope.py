"""Inverse frequencies of rotary embeddings, with the scalings that long-context models use.

Parameters are spelled as Hugging Face's config.json spells them (`rope_parameters`, formerly
`rope_scaling`); the GGUF reader translates its own keys. All arithmetic is in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Rotary:
    """`frequencies`: radians per position, one per rotated pair; cos and sin are multiplied by
    `attention_factor`. With a `limit`, they hold for contexts of so many tokens at most."""

    frequencies: tuple[float, ...]
    attention_factor: float = 1.0
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Checked access to the fields; `where` names file and field in messages."""

    values: Mapping[str, Any]
    where: str
    dim: int
    context_length: int

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: the field '{name}' is missing")
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < 1e12:
            raise ModelError(f"{self.where}: {name} = {value!r} is not a positive number")
        return float(value)

    @property
    def original(self) -> float:
        return self.number("original_max_position_embeddings", self.context_length)

    @property
    def theta(self) -> float:
        theta = self.number("rope_theta", 10000.0)
        if theta <= 1:
            raise ModelError(f"{self.where}: rope_theta = {theta} must be greater than 1")
        return theta

    def plain(self) -> list[float]:
        return [self.theta ** (-2 * i / self.dim) for i in range(self.dim // 2)]


def _default(p: _Parameters) -> Rotary:
    return Rotary(tuple(p.plain()))


def _linear(p: _Parameters) -> Rotary:
    factor = p.number("factor")
    return Rotary(tuple(f / factor for f in p.plain()))


def _llama3(p: _Parameters) -> Rotary:
    """Llama 3.1's scheme: long wavelengths are stretched, short ones kept, between them a ramp."""
    factor, original = p.number("factor"), p.original
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    if high <= low:
        raise ModelError(f"{p.where}: high_freq_factor must be greater than low_freq_factor")

    def scale(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return frequency * (keep + (1 - keep) / factor)

    return Rotary(tuple(scale(f) for f in p.plain()))


def _yarn(p: _Parameters) -> Rotary:
    """YaRN, https://arxiv.org/abs/2309.00071, as transformers and llama.cpp compute it."""
    factor, half = p.number("factor"), p.dim // 2

    def dimension(turns: float) -> float:
        ratio = math.log(p.original / (turns * 2 * math.pi))
        return p.dim * ratio / (2 * math.log(p.theta))

    low, high = dimension(p.number("beta_fast", 32.0)), dimension(p.number("beta_slow", 1.0))
    if p.values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    span = high - low if high != low else 0.001
    ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(half)]
    scaled = (f * (r / factor + 1 - r) for f, r in zip(p.plain(), ramp, strict=True))
    return Rotary(tuple(scaled), _yarn_attention_factor(p, factor))


def _yarn_attention_factor(p: _Parameters, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.values.get("mscale") and p.values.get("mscale_all_dim"):
        inferred = magnitude(p.number("mscale")) / magnitude(p.number("mscale_all_dim"))
    else:
        inferred = magnitude(1.0)
    return p.number("attention_factor", inferred)


def _longrope(p: _Parameters) -> Rotary:
    """LongRoPE, https://arxiv.org/abs/2402.13753, with its short factors.

    The long ones are for contexts beyond the one before stretching. They turn all keys, also those
    that are cached, so that a model would have to be told beforehand which context is meant.
    """
    original = p.original
    ratio = p.number("factor", p.context_length / original)
    stretched = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    factors = p.values.get("short_factor")
    if not isinstance(factors, list) or len(factors) != p.dim // 2:
        raise ModelError(f"{p.where}: short_factor is not a list of {p.dim // 2} numbers")
    scaled = divided(p.plain(), factors, f"{p.where}: short_factor")
    limit = min(p.context_length, int(original))
    return Rotary(scaled, p.number("attention_factor", stretched), limit)


def divided(frequencies: Sequence[float], factors: Sequence[Any], where: str) -> tuple[float, ...]:
    """Each frequency divided by its factor; `where` names the factors in errors."""
    numbers = all(isinstance(f, int | float) and not isinstance(f, bool) for f in factors)
    if not numbers or not all(0 < f < 1e12 for f in factors):
        raise ModelError(f"{where} holds values that are not positive")
    return tuple(f / factor for f, factor in zip(frequencies, factors, strict=True))


_COMMON = frozenset({"rope_theta", "rope_type", "type", "factor"})
_ORIGINAL = frozenset({"original_max_position_embeddings"})
_YARN = frozenset(
    {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
)
_LONGROPE = _COMMON | _ORIGINAL | {"attention_factor", "short_factor", "long_factor"}
_TYPES: Mapping[str, tuple[Callable[[_Parameters], Rotary], frozenset[str]]] = {
    "default": (_default, _COMMON),
    "linear": (_linear, _COMMON),
    "llama3": (_llama3, _COMMON | _ORIGINAL | {"low_freq_factor", "high_freq_factor"}),
    "longrope": (_longrope, _LONGROPE),
    "su": (_longrope, _LONGROPE),
    "yarn": (_yarn, _COMMON | _ORIGINAL | _YARN | {"finetuned"}),
}


def rotary(parameters: Mapping[str, Any], dim: int, context_length: int, where: str) -> Rotary:
    """The `dim / 2` inverse frequencies that `parameters` (rope_theta, rope_type, ...) ask for.

    `context_length` stands in for an absent original_max_position_embeddings; `where` names the
    file and field in errors. A scaling type or field that is not known is an UnsupportedError.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UnsupportedError(
            f"{where}: rope scaling type {kind!r} is not supported (supported: {', '.join(_TYPES)})"
        )
    compute, known = _TYPES[kind]
    neutral = {"partial_rotary_factor": 1.0}
    for name, value in parameters.items():
        if name not in known and value is not None and neutral.get(name) != value:
            raise UnsupportedError(
                f"{where}: field '{name}' = {value!r} of rope scaling type {kind!r} "
                "is not known and may change the results"
            )
    return compute(_Parameters(parameters, where, dim, context_length))
