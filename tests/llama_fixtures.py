"""Tiny random Llama-family models as GGUF files and Hugging Face folders.

Weights are dictionaries of float32 arrays in Hugging Face's layout and under its names; writers
return what the file really holds (after rounding or quantisation), so that the oracle's `logits`
can be compared with a run of the file. Quantised files use the `gguf` package's own arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
from gguf import GGMLQuantizationType as Type
from llama_oracle import Array, Tiny

ENCODINGS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


K_QUANT = Tiny(hidden=256, intermediate=256, heads=4, kv_heads=2, head_dim=64, layers=1)
"""Wide enough for blocks of 256 in every matrix."""


def random_weights(tiny: Tiny, seed: int = 0) -> dict[str, Array]:
    """Weights of all tensors: matrices of deviation 1/sqrt(fan-in), norms near one."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    def vector(size: int, around: float) -> Array:
        return (around + 0.2 * rng.standard_normal(size)).astype(np.float32)

    t, weights = tiny, {}
    query, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    weights["model.embed_tokens.weight"] = matrix(t.vocab, t.hidden)
    for layer in range(t.layers):
        base = f"model.layers.{layer}"
        sizes = {
            "self_attn.q_proj": (query, t.hidden, t.qkv_bias),
            "self_attn.k_proj": (kv, t.hidden, t.qkv_bias),
            "self_attn.v_proj": (kv, t.hidden, t.qkv_bias),
            "self_attn.o_proj": (t.hidden, query, t.attention_bias),
            "mlp.gate_proj": (t.intermediate, t.hidden, t.mlp_bias),
            "mlp.up_proj": (t.intermediate, t.hidden, t.mlp_bias),
            "mlp.down_proj": (t.hidden, t.intermediate, t.mlp_bias),
        }
        for name, (rows, columns, bias) in sizes.items():
            weights[f"{base}.{name}.weight"] = matrix(rows, columns)
            if bias:
                weights[f"{base}.{name}.bias"] = vector(rows, 0.0)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{base}.{name}.weight"] = vector(t.hidden, 1.0)
        if t.architecture == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{base}.self_attn.{name}.weight"] = vector(t.head_dim, 1.0)
    weights["model.norm.weight"] = vector(t.hidden, 1.0)
    if not t.tied:
        weights["lm_head.weight"] = matrix(t.vocab, t.hidden)
    return weights


# -- GGUF


@cache
def _name_map() -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 8)


def gguf_name(name: str) -> str:
    """What llama.cpp's converter calls the tensor `name`."""
    found: str | None = _name_map().get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def permute(weight: Array, heads: int) -> Array:
    """Rows of a query or key projection as llama.cpp's converter orders them for `llama`."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: Array, heads: int) -> Array:
    """The inverse of `permute`."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def encode(weight: Array, encoding: str, rng: np.random.Generator) -> Array:
    """(N, K) floats as stored: bytes (N, ...) or float16/32. K-quants are random blocks."""
    if encoding == "F32":
        return weight
    if encoding == "F16":
        return weight.astype(np.float16)
    if encoding.endswith("_K"):
        return random_blocks(encoding, weight.shape[0], weight.shape[1], rng)
    blocks: Array = gguf.quants.quantize(weight, Type[encoding])
    return blocks


def random_blocks(encoding: str, rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Valid random blocks of a K-quant, uint8 (rows, bytes per row), of deviation about 0.05."""
    block, nbytes = gguf.GGML_QUANT_SIZES[Type[encoding]]
    data = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    shape = (rows, columns // block, 1)
    scale = rng.uniform(0.5, 1.0, shape)
    if encoding == "Q6_K":  # d * int8 scale * (q - 32), d at the end
        data[..., -2:] = (4e-5 * scale).astype("<f2").view(np.uint8)
    else:  # d * 6-bit scale * q - dmin * 6-bit minimum, q of 4 or 5 bits, d and dmin at the front
        top = 15 if encoding == "Q4_K" else 31
        d = 0.005 / top * scale
        data[..., :2] = d.astype("<f2").view(np.uint8)
        data[..., 2:4] = (d * top / 2).astype("<f2").view(np.uint8)
    return data.reshape(rows, -1)


def write_gguf(
    path: Path,
    tiny: Tiny,
    encoding: str = "F32",
    *,
    weights: Mapping[str, Array] | None = None,
    seed: int = 0,
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    skip: frozenset[str] = frozenset(),
) -> dict[str, Array]:
    """Write the model and return the weights that the file holds, in Hugging Face's layout.

    Matrices take `encoding`, vectors F32. `extra` may add metadata (a tokenizer) or tensors;
    metadata named in `skip` (without the architecture) and tensors named there are left out.
    """
    architecture = "llama" if tiny.architecture == "mistral" else tiny.architecture
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _gguf_fields(tiny).items():
        if key not in skip:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    rng = np.random.default_rng(seed + 1)
    held = {}
    for name, weight in (random_weights(tiny, seed) if weights is None else weights).items():
        heads = {"q_proj": tiny.heads, "k_proj": tiny.kv_heads}.get(name.split(".")[-2], 0)
        heads = heads if architecture == "llama" else 0
        stored = permute(weight, heads) if heads else weight
        kind = encoding if weight.ndim == 2 else "F32"
        data = encode(stored, kind, rng)
        if gguf_name(name) not in skip:
            raw = None if kind in ("F32", "F16") else Type[kind]
            writer.add_tensor(gguf_name(name), data, raw_dtype=raw)
        values = gguf.quants.dequantize(data, Type[kind])
        held[name] = unpermute(values, heads) if heads else values
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _gguf_fields(tiny: Tiny) -> dict[str, int | float]:
    fields: dict[str, int | float] = {
        "block_count": tiny.layers,
        "context_length": tiny.context,
        "embedding_length": tiny.hidden,
        "feed_forward_length": tiny.intermediate,
        "attention.head_count": tiny.heads,
        "attention.head_count_kv": tiny.kv_heads,
        "attention.key_length": tiny.head_dim,
        "attention.value_length": tiny.head_dim,
        "attention.layer_norm_rms_epsilon": float(tiny.epsilon),
        "rope.freq_base": float(tiny.theta),
        "rope.dimension_count": tiny.head_dim,
    }
    if tiny.window:
        fields["attention.sliding_window"] = tiny.window
    return fields


# -- Hugging Face


def hf_config(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    """config.json of the model; `changes` override, and None removes a field."""
    config: dict[str, Any] = {
        "architectures": [_CLASSES[tiny.architecture]],
        "model_type": tiny.architecture,
        "vocab_size": tiny.vocab,
        "hidden_size": tiny.hidden,
        "intermediate_size": tiny.intermediate,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": tiny.context,
        "rms_norm_eps": tiny.epsilon,
        "rope_theta": tiny.theta,
        "tie_word_embeddings": tiny.tied,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    if tiny.architecture == "mistral":
        config["sliding_window"] = tiny.window
    if tiny.attention_bias:
        config["attention_bias"] = True
    if tiny.mlp_bias:
        config["mlp_bias"] = True
    return {name: value for name, value in {**config, **changes}.items() if value is not None}


def write_hf(
    folder: Path,
    tiny: Tiny,
    dtype: str = "F32",
    *,
    weights: Mapping[str, Array] | None = None,
    seed: int = 0,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Array]:
    """Write a model folder and return the weights that it holds, as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hf_config(tiny) if config is None else dict(config))
    (folder / "config.json").write_text(text, encoding="utf-8")
    kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    weights = random_weights(tiny, seed) if weights is None else weights
    stored = {name: value.astype(kind) for name, value in weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(stored, folder / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(stored.items())[number::shards])
            safetensors.numpy.save_file(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return {name: value.astype(np.float32) for name, value in stored.items()}
