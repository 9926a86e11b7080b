"""Rotary frequencies by the metadata of a GGUF file."""

from __future__ import annotations

import struct
from typing import Any

from ..errors import ModelError
from .gguf_fields import Fields
from .gguf_header import Header, TensorInfo
from .rope import Rotary, divided, rotary

_SHORT, _FACTORS = "rope_factors_short.weight", "rope_freqs.weight"


def read_rotary(source: Header, fields: Fields, head_dim: int, context: int) -> Rotary:
    """Frequencies by the metadata, divided by the factors of a tensor if it exists.

    Of LongRoPE's two the short ones are taken, up to the context that they are for.
    """
    dim = fields.integer("rope.dimension_count", head_dim)
    if dim % 2 or dim > head_dim:
        raise ModelError(
            f"{source.path}: {fields.prefix}rope.dimension_count = {dim} must be even and at "
            f"most the head size {head_dim}"
        )
    stretched = _SHORT in source.tensors
    result = rotary(_rope_parameters(fields, stretched), dim, context, _where(fields))
    attention_factor = result.attention_factor * fields.number("rope.scaling.attn_factor", 1.0)
    limit = fields.integer("rope.scaling.original_context_length") if stretched else None
    frequencies = result.frequencies
    for name in (_SHORT, _FACTORS):
        if name in source.tensors:
            frequencies = _divided(frequencies, source.tensors[name])
    return Rotary(frequencies, attention_factor, limit)


def read_local_rotary(fields: Fields, default_theta: float, dim: int, context: int) -> Rotary:
    """That of layers with a window, where they have one of their own: it is never scaled."""
    theta = fields.number("rope.freq_base_swa", default_theta)
    return rotary({"rope_theta": theta}, dim, context, _where(fields))


def _where(fields: Fields) -> str:
    return f"{fields.path}: {fields.prefix}rope"


def _rope_parameters(fields: Fields, stretched: bool) -> dict[str, Any]:
    """The metadata in Hugging Face's terms; without a type a factor means linear scaling."""
    parameters: dict[str, Any] = {"rope_theta": fields.get("rope.freq_base") or 10000.0}
    kind = fields.get("rope.scaling.type") or "linear"
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    if kind == "longrope" and not stretched:
        raise ModelError(f"{fields.path}: tensor '{_SHORT}' of rope scaling type {kind} is missing")
    if kind in ("none", "longrope"):
        return parameters
    parameters |= {"rope_type": kind, "factor": factor}
    if kind != "yarn":
        return parameters
    original = fields.get("rope.scaling.original_context_length") or None
    parameters |= {
        "original_max_position_embeddings": original,
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow"),
    }
    return parameters


def _divided(frequencies: tuple[float, ...], info: TensorInfo) -> tuple[float, ...]:
    """The frequencies divided by the elements of a tensor, which are read from the file."""
    count = len(frequencies)
    if info.encoding != "float32" or info.shape != (count,):
        raise ModelError(
            f"{info.path}: tensor '{info.name}' must hold {count} F32 values, "
            f"not {list(info.shape)} of {info.type}"
        )
    with info.path.open("rb") as file:
        file.seek(info.offset)
        factors = struct.unpack(f"<{count}f", file.read(info.nbytes))
    return divided(frequencies, factors, f"{info.path}: tensor '{info.name}'")
