"""Reads language models from GGUF files as a `Graph`; tensors stay in the file.

The architectures are those of architectures.py that have a name in GGUF (llama is Llama, Mistral,
SmolLM, ...). A model split over several files is read from its first one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import ModelError, UnsupportedError
from ..graph import Graph, WeightRef
from .architectures import GGUF_ARCHITECTURES
from .decoder import build
from .gguf_config import read_config
from .gguf_header import Header, TensorInfo, header
from .notation import renamed

__all__ = ["Header", "TensorInfo", "header", "read"]

_NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.output_norm": "post_attention_norm", "mlp.output_norm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Llama's module names in Hugging Face -> GGUF's, of all architectures."""

_UNUSED_TENSORS = re.compile(
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"
)


def read(path: str | Path) -> Graph:
    """The model in a GGUF file as the compact graph of `formats.decoder`.

    Raises ModelError when the file is damaged or a tensor is missing or of the wrong shape, and
    UnsupportedError for an architecture, tensor type or field that is not known.
    """
    source = _gather_shards(header(path))
    architecture = source.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF architecture {architecture!r} is not supported "
            f"(supported: {', '.join(GGUF_ARCHITECTURES)})"
        )
    used: set[str] = set()

    def lookup(name: str) -> WeightRef:
        stored = re.sub(r"^model\.layers\.", "blk.", renamed(name, _NAMES))
        if stored not in source.tensors:
            raise ModelError(
                f"{source.path}: tensor '{stored}' is missing; the file is not a complete "
                f"{architecture} model"
            )
        used.add(stored)
        return _reference(source.tensors[stored])

    graph = build(read_config(source, architecture), lookup)
    for name in source.tensors:
        if name not in used and not _UNUSED_TENSORS.fullmatch(name):
            raise UnsupportedError(
                f"{source.path}: tensor '{name}' is not part of a known {architecture} model; "
                "it may change the results"
            )
    return graph


def _reference(info: TensorInfo) -> WeightRef:
    return WeightRef(
        info.name, info.shape, "float32", info.path, info.offset, info.nbytes, info.encoding
    )


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
