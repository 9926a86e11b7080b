"""Reads the metadata of a language model in a GGUF file strictly, as a `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedError
from .architectures import GGUF_ARCHITECTURES, Architecture
from .decoder_config import DecoderConfig, Layer, check_layers
from .gguf_fields import Fields
from .gguf_header import Header
from .gguf_rope import read_rotary

_BIASES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
    "output": ("blk.0.attn_output.bias",),
    "mlp": ("blk.0.ffn_gate.bias",),
}
"""Part of a model -> the tensors of which one says that it has biases."""


def read_config(source: Header, architecture: str) -> DecoderConfig:
    """The hyper-parameters of a file whose architecture is one of GGUF_ARCHITECTURES.

    Raises UnsupportedError for a field that is not known, ModelError for a malformed one.
    """
    kind, tensors = GGUF_ARCHITECTURES[architecture], source.tensors
    fields, epsilon = Fields(source, architecture), _epsilon(kind)
    fields.check_known(kind.gguf_fields | {epsilon})
    layers = check_layers(source.path, fields.integer("block_count"))
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim, context = _head_dim(fields, hidden // heads), fields.integer("context_length")
    embedding = tensors.get("token_embd.weight")
    return DecoderConfig(
        path=source.path,
        architecture=architecture,
        kind=kind,
        name=str(source.metadata.get("general.name", "")),
        vocab_size=embedding.shape[0] if embedding else 1,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=context,
        epsilon=fields.number(epsilon),
        layers=_layers(source, fields, kind, layers, head_dim, context),
        activation=kind.activation,
        interleaved=kind.gguf_interleaved,
        biases=kind.biases | {p for p, names in _BIASES.items() if tensors.keys() & set(names)},
        fused=_fused(source, kind),
        tied="output.weight" not in tensors,
        eos_token_ids=_eos_token_ids(source.metadata),
    )


def _epsilon(kind: Architecture) -> str:
    return f"attention.layer_norm_{'' if kind.layer_norm else 'rms_'}epsilon"


def _head_dim(fields: Fields, default: int) -> int:
    head_dim = fields.integer("attention.key_length", default)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            f"{fields.path}: {fields.prefix}attention.value_length differs from "
            "attention.key_length, which is not supported"
        )
    return head_dim


def _fused(source: Header, kind: Architecture) -> frozenset[str]:
    """Converters keep queries, keys and values together or apart, whatever the architecture."""
    together = {"self_attn.qkv_proj"} if "blk.0.attn_qkv.weight" in source.tensors else set()
    return (kind.fused - {"self_attn.qkv_proj"}) | together


def _layers(
    source: Header, fields: Fields, kind: Architecture, count: int, head_dim: int, context: int
) -> tuple[Layer, ...]:
    """The layers in order; a window that holds the whole context is none."""
    rotary = read_rotary(source, fields, head_dim, context)
    window = fields.get("attention.sliding_window") or None
    if window is not None:
        window = fields.integer("attention.sliding_window")
        window = window if window < context else None
    return (Layer(rotary, window),) * count


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    return tuple(dict.fromkeys(metadata[k] for k in keys if isinstance(metadata.get(k), int)))
