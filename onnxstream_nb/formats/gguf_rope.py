"""Rotary frequencies by the metadata of a GGUF file."""

from __future__ import annotations

import struct
from typing import Any

from ..errors import ModelError
from .gguf_fields import Fields
from .gguf_header import Header, TensorInfo
from .rope import Rotary, rotary


def read_rotary(source: Header, fields: Fields, head_dim: int, context: int) -> Rotary:
    """Frequencies by the metadata, divided by the factors of `rope_freqs.weight` if it exists."""
    dim = fields.integer("rope.dimension_count", head_dim)
    if dim % 2 or dim > head_dim:
        raise ModelError(
            f"{source.path}: {fields.prefix}rope.dimension_count = {dim} must be even and at "
            f"most the head size {head_dim}"
        )
    where = f"{source.path}: {fields.prefix}rope"
    result = rotary(_rope_parameters(fields), dim, context, where)
    attention_factor = result.attention_factor * fields.number("rope.scaling.attn_factor", 1.0)
    factors = (1.0,) * (dim // 2)
    if "rope_freqs.weight" in source.tensors:
        factors = _rope_factors(source.tensors["rope_freqs.weight"], dim // 2)
    scaled = (f / factor for f, factor in zip(result.frequencies, factors, strict=True))
    return Rotary(tuple(scaled), attention_factor)


def _rope_parameters(fields: Fields) -> dict[str, Any]:
    """The metadata in Hugging Face's terms; without a type a factor means linear scaling."""
    parameters: dict[str, Any] = {"rope_theta": fields.get("rope.freq_base") or 10000.0}
    kind = fields.get("rope.scaling.type") or "linear"
    factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
    if kind == "none":
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


def _rope_factors(info: TensorInfo, count: int) -> tuple[float, ...]:
    """The factor tensor of Llama 3.1 and later, read from the file."""
    if info.encoding != "float32" or info.shape != (count,):
        raise ModelError(
            f"{info.path}: tensor '{info.name}' must hold {count} F32 values, "
            f"not {list(info.shape)} of {info.type}"
        )
    with info.path.open("rb") as file:
        file.seek(info.offset)
        factors = struct.unpack(f"<{count}f", file.read(info.nbytes))
    if not all(0 < factor < 1e12 for factor in factors):
        raise ModelError(f"{info.path}: tensor '{info.name}' holds values that are not positive")
    return factors
