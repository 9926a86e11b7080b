"""Reads the metadata of a language model in a GGUF file strictly, as a `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError, UnsupportedError
from .architectures import GGUF_ARCHITECTURES, Architecture
from .decoder_config import DecoderConfig, Layer, check_layers
from .gguf_fields import Fields
from .gguf_header import Header
from .gguf_rope import read_local_rotary, read_rotary

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
    found = _layers(source, fields, kind, layers, head_dim, context)
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
        context_length=min(layer.rotary.limit or context for layer in found),
        epsilon=fields.number(epsilon),
        layers=found,
        activation=kind.activation,
        interleaved=kind.gguf_interleaved,
        biases=kind.biases | {p for p, names in _BIASES.items() if tensors.keys() & set(names)},
        fused=_fused(source, kind),
        query_size=kind.gguf_query_sizes.get(layers, head_dim),
        attention_softcap=_softcap(fields, kind, "attn_logit_softcapping"),
        logit_softcap=_softcap(fields, kind, "final_logit_softcapping"),
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


def _softcap(fields: Fields, kind: Architecture, name: str) -> float:
    """By the metadata or else the entry; 0 where there is none."""
    if name not in kind.gguf_fields or (fields.raw(name) is None and name not in kind.defaults):
        return 0.0
    return fields.number(name, kind.defaults.get(name))


def _layers(
    source: Header, fields: Fields, kind: Architecture, count: int, head_dim: int, context: int
) -> tuple[Layer, ...]:
    """The layers in order; a window that holds the whole context is none."""
    rotary = local = read_rotary(source, fields, head_dim, context)
    if kind.has_local_rope:
        theta = kind.defaults["rope_local_base_freq"]
        local = read_local_rotary(fields, theta, 2 * len(rotary.frequencies), context)
    window = _window(fields, kind)
    shown = window if window is not None and window < context else None
    slides = _slides(fields, kind, count) if window is not None else [False] * count
    return tuple(Layer(local, shown) if s else Layer(rotary) for s in slides)


def _window(fields: Fields, kind: Architecture) -> int | None:
    """That of layers which have one; 0 stands for none."""
    window = fields.get("attention.sliding_window")
    if window is None and "use_sliding_window" not in kind.defaults:
        window = kind.defaults.get("sliding_window")
    return fields.integer("attention.sliding_window", window) if window else None


def _slides(fields: Fields, kind: Architecture, count: int) -> list[bool]:
    """Which layers have a window: all, all but the last of every so many, or those listed."""
    pattern = fields.raw("attention.sliding_window_pattern")
    if pattern is None:
        pattern = kind.defaults.get("sliding_window_pattern", 0)
    if isinstance(pattern, list) and len(pattern) == count:
        return [bool(slides) for slides in pattern]
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 0:
        raise ModelError(
            f"{fields.path}: metadata {fields.prefix}attention.sliding_window_pattern = "
            f"{pattern!r} is neither a number of layers nor a list of {count}"
        )
    return [pattern == 0 or (i + 1) % pattern != 0 for i in range(count)]


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    return tuple(dict.fromkeys(metadata[k] for k in keys if isinstance(metadata.get(k), int)))
