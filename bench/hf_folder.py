"""A Hugging Face folder of a geometry: shards of safetensors, filled with random float16s."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from weights import shapes, tile

SHARD = 1_000_000_000  # bytes, about
NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "output": "lm_head",
}  # fmt: skip
"""GGUF's names of modules -> Hugging Face's."""


def write_folder(folder: Path, geometry: Mapping[str, Any]) -> None:
    """Write config.json, the shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(name): shape for name, shape in shapes(geometry).items()}
    parts = list(shards(tensors))
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, part, i)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(geometry)))


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    *layer, module, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{NAMES[module]}.{kind}"


def config(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama of this geometry."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": geometry["vocab"], "hidden_size": geometry["hidden"],
        "intermediate_size": geometry["ffn"], "num_hidden_layers": geometry["layers"],
        "num_attention_heads": geometry["heads"], "num_key_value_heads": geometry["kv_heads"],
        "head_dim": geometry["head_dim"], "max_position_embeddings": geometry["context"],
        "rms_norm_eps": geometry["norm_epsilon"], "rope_theta": geometry["rope_theta"],
        "tie_word_embeddings": geometry["tied_embeddings"], "torch_dtype": "float16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shards(tensors: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, each part of about SHARD bytes."""
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if part and 2 * sum(map(math.prod, (*part.values(), shape))) > SHARD:
            yield part
            part = {}
        part[name] = shape
    yield part


def write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """One safetensors file: norms are ones, every matrix is random."""
    header, end = {}, 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        offsets = [end, end + nbytes]
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": offsets}
        end += nbytes
    text = json.dumps(header).encode()
    block = tile("f16").reshape(-1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(tensors.values()):
            if len(shape) == 1:
                file.write(np.ones(shape, np.float16).tobytes())
            else:
                turned = np.roll(block, -2 * 7919 * (i + 101 * seed))
                file.write(np.resize(turned, 2 * math.prod(shape)).data)
