"""Reads Llama-family models from GGUF files as a `Graph`; tensors stay in the file.

Architectures: llama (Llama, Mistral, SmolLM, ...), qwen2, qwen3. A model split over several files
is read from its first one.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedError
from ..graph import Graph, WeightRef
from . import llama
from .gguf_header import Header, TensorInfo, header
from .rope import Rotary, rotary

__all__ = ["Header", "TensorInfo", "header", "read"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Hugging Face's module names -> GGUF's."""

_KNOWN_FIELDS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "attention.causal", "rope.dimension_count", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count", "tensor_data_layout",
})  # fmt: skip
"""Fields of an architecture that are read here, or known not to change the results."""

_UNUSED_TENSORS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


class _Fields:
    """The metadata below `<architecture>.`, checked for type as it is read."""

    def __init__(self, source: Header, architecture: str) -> None:
        self.path, self.prefix = source.path, architecture + "."
        self._metadata = source.metadata

    def get(self, name: str) -> Any:
        """The value or None; a list of equal items (one per layer) counts as that item."""
        value = self._metadata.get(self.prefix + name)
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

    def check_known(self) -> None:
        """Refuse fields that may change the results and are not understood."""
        for key, value in self._metadata.items():
            name = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and name not in _KNOWN_FIELDS and value:
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


def read(path: str | Path) -> Graph:
    """The model in a GGUF file as the compact graph of `formats.llama`.

    Raises ModelError when the file is damaged or a tensor is missing or of the wrong shape, and
    UnsupportedError for an architecture, tensor type or field that is not known.
    """
    source = _gather_shards(header(path))
    architecture = source.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF architecture {architecture!r} is not supported "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    fields = _Fields(source, architecture)
    fields.check_known()

    def weight(name: str) -> WeightRef:
        stored = _stored_name(name)
        if stored not in source.tensors:
            raise ModelError(
                f"{source.path}: tensor '{stored}' is missing; the file is not a complete "
                f"{architecture} model"
            )
        return _reference(source.tensors[stored])

    graph = llama.build(_config(source, architecture, fields), weight)
    for name in source.tensors:
        if name not in graph.initializers and not _UNUSED_TENSORS.fullmatch(name):
            raise UnsupportedError(
                f"{source.path}: tensor '{name}' is not part of a known {architecture} model; "
                "it may change the results"
            )
    return graph


def _stored_name(name: str) -> str:
    """GGUF's name of the tensor that Hugging Face calls `name`."""
    module, _, kind = name.rpartition(".")
    layered = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layered:
        return f"blk.{layered[1]}.{_NAMES[layered[2]]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


def _reference(info: TensorInfo) -> WeightRef:
    return WeightRef(
        info.name, info.shape, "float32", info.path, info.offset, info.nbytes, info.encoding
    )


def _config(source: Header, architecture: str, fields: _Fields) -> llama.LlamaConfig:
    tensors = source.tensors
    layers = llama.check_layers(source.path, fields.integer("block_count"))
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(
            f"{source.path}: {fields.prefix}attention.value_length differs from "
            "attention.key_length, which is not supported"
        )
    context = fields.integer("context_length")
    window = fields.get("attention.sliding_window") or None
    if window is not None:
        window = fields.integer("attention.sliding_window")
        window = window if window < context else None
    embedding = tensors.get("token_embd.weight")
    return llama.LlamaConfig(
        path=source.path,
        architecture=architecture,
        name=str(source.metadata.get("general.name", "")),
        vocab_size=embedding.shape[0] if embedding else 1,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=context,
        epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        rotary=_rotary(source, fields, head_dim, context),
        windows=(window,) * layers,
        interleaved=architecture == "llama",
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=architecture == "qwen3",
        tied="output.weight" not in tensors,
        eos_token_ids=_eos_token_ids(source.metadata),
    )


def _eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
    return tuple(dict.fromkeys(metadata[k] for k in keys if isinstance(metadata.get(k), int)))


def _rotary(source: Header, fields: _Fields, head_dim: int, context: int) -> Rotary:
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


def _rope_parameters(fields: _Fields) -> dict[str, Any]:
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


def _gather_shards(first: Header) -> Header:
    """`first` with the tensors of all files of a split model added."""
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.path.name)
    if not match or int(match[2]) != count:
        raise ModelError(
            f"{first.path}: the model is split over {count} files; open the first one, which must "
            f"keep its name ending in -00001-of-{count:05d}.gguf"
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        path = first.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise ModelError(f"{path}: this part of a split model is missing; download it too")
        shard = header(path)
        if not shard.tensors.keys().isdisjoint(tensors):
            raise ModelError(f"{path}: holds tensors that another part of the model holds too")
        tensors |= shard.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelError(f"{first.path}: all parts hold {len(tensors)} tensors, not {expected}")
    return Header(first.path, first.version, first.metadata, tensors)
