"""Tiny random models beyond Llama: their config.json, their weights, and the same in GGUF.

A GGUF's names come from the `gguf` package, its fields are those that llama.cpp's converter writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from decoder_oracle import Array, Config
from gguf import GGMLQuantizationType as Type

_SIZES: Config = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "eos_token_id": [1, 7],
}  # fmt: skip
_GEMMA: Config = {
    **_SIZES, "head_dim": 16, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip
_GEMMA2: Config = {
    **_GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 4,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
_PHI: Config = {
    **_SIZES, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip
_LONG = {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
}  # fmt: skip

CONFIGS: Mapping[str, Config] = {
    "gemma": {**_GEMMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
    "gemma2": {
        **_GEMMA2, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        **_GEMMA2, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "sliding_window_pattern": 3, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {
        **_PHI, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "sliding_window": 5, "original_max_position_embeddings": 128,
    },
    "phi3 long": {
        **_PHI, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_scaling": _LONG, "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
    },
    "phi": {
        **_PHI, "architectures": ["PhiForCausalLM"], "model_type": "phi", "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "num_key_value_heads": 4,
    },
    "stablelm": {
        **_PHI, "architectures": ["StableLmForCausalLM"], "model_type": "stablelm",
        "layer_norm_eps": 1e-5, "hidden_act": "silu", "partial_rotary_factor": 0.25,
        "use_qkv_bias": True, "use_parallel_residual": False, "qk_layernorm": False,
    },
}  # fmt: skip


def random_weights(config: Config, seed: int = 0) -> dict[str, Array]:
    """Weights of all tensors: matrices of deviation 1/sqrt(fan-in), vectors of 0.2."""
    rng, name = np.random.default_rng(seed), config["architectures"][0]
    weights: dict[str, Array] = {}

    def linear(module: str, rows: int, columns: int, bias: bool = False) -> None:
        matrix = rng.standard_normal((rows, columns)) / math.sqrt(columns)
        weights[f"{module}.weight"] = matrix.astype(np.float32)
        if bias:
            vector(f"{module}.bias", rows, 0.0)

    def vector(tensor: str, size: int, around: float) -> None:
        weights[tensor] = (around + 0.2 * rng.standard_normal(size)).astype(np.float32)

    def norm(module: str, size: int) -> None:
        vector(f"{module}.weight", size, 0.0 if name.startswith("Gemma") else 1.0)
        if "layer_norm_eps" in config:
            vector(f"{module}.bias", size, 0.0)

    size, phi = config["hidden_size"], name == "PhiForCausalLM"
    linear("model.embed_tokens", config["vocab_size"], size)
    for layer in range(config["num_hidden_layers"]):
        for module, rows, columns, bias in _linears(config):
            linear(f"model.layers.{layer}.{module}", rows, columns, bias)
        for module, width in _norms(config):
            norm(f"model.layers.{layer}.{module}", width)
    norm("model.final_layernorm" if phi else "model.norm", size)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], size, phi)
    return weights


def _linears(config: Config) -> list[tuple[str, int, int, bool]]:
    """Module, rows, columns, whether it has a bias."""
    size, inner, heads = (
        config[n] for n in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head_dim = config.get("head_dim", size // heads)
    query, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    if config["model_type"] == "phi3":
        return [
            ("self_attn.qkv_proj", query + 2 * kv, size, False),
            ("self_attn.o_proj", size, query, False),
            ("mlp.gate_up_proj", 2 * inner, size, False), ("mlp.down_proj", size, inner, False),
        ]  # fmt: skip
    phi = config["model_type"] == "phi"
    bias = phi or bool(config.get("use_qkv_bias"))
    attention = [
        *(
            (f"self_attn.{n}_proj", rows, size, bias)
            for n, rows in zip("qkv", (query, kv, kv), strict=True)
        ),
        ("self_attn.dense" if phi else "self_attn.o_proj", size, query, phi),
    ]
    if phi:
        return [*attention, ("mlp.fc1", inner, size, True), ("mlp.fc2", size, inner, True)]
    gated = [(f"mlp.{n}_proj", inner, size, False) for n in ("gate", "up")]
    return [*attention, *gated, ("mlp.down_proj", size, inner, False)]


def _norms(config: Config) -> list[tuple[str, int]]:
    names = {
        "phi": ["input_layernorm"],
        **dict.fromkeys(
            ("gemma2", "gemma3_text"),
            [
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ],
        ),
    }.get(config["model_type"], ["input_layernorm", "post_attention_layernorm"])  # fmt: skip
    found = [(name, config["hidden_size"]) for name in names]
    if config["model_type"] == "gemma3_text":
        found += [(f"self_attn.{n}_norm", config["head_dim"]) for n in "qk"]
    return found


def write_hf(folder: Path, config: Config, weights: Mapping[str, Array] | None = None) -> Any:
    """Write the folder and return its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    weights = random_weights(config) if weights is None else weights
    safetensors.numpy.save_file(dict(weights), folder / "model.safetensors")
    return weights


# -- GGUF

_ARCHITECTURES = {"gemma3_text": "gemma3", "phi": "phi2"}
_FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "sliding_window": "attention.sliding_window",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon", "rope_theta": "rope.freq_base",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "use_parallel_residual": "use_parallel_residual",
}  # fmt: skip
Extra = Callable[[gguf.GGUFWriter], None]


def gguf_fields(config: Config) -> dict[str, Any]:
    """The metadata below the architecture's name."""
    fields = {theirs: config[ours] for ours, theirs in _FIELDS.items() if ours in config}
    if "partial_rotary_factor" in config:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        fields["rope.dimension_count"] = int(head_dim * config["partial_rotary_factor"])
    scaling = config.get("rope_scaling") or {}
    if "factor" in scaling:
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    if "short_factor" in scaling:
        original = config["original_max_position_embeddings"]
        ratio = math.log(config["max_position_embeddings"] / original) / math.log(original)
        fields["rope.scaling.attn_factor"] = math.sqrt(1 + ratio)
    return fields


def write_gguf(
    path: Path,
    config: Config,
    encoding: str = "F32",
    *,
    fused: bool = False,
    fields: Mapping[str, Any] | None = None,
    skip: frozenset[str] = frozenset(),
    extra: Extra | None = None,
) -> dict[str, Array]:
    """Write the model, its matrices in `encoding`, and return what the file holds, as config.json's
    model knows it. With `fused`, queries, keys and values are one tensor.

    `fields` are added or, where they are None, left out; so are tensors named in `skip`.
    """
    kind = _ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, kind)
    for name, value in {**gguf_fields(config), **(fields or {})}.items():
        add = {
            bool: writer.add_bool, float: writer.add_float32, str: writer.add_string,
            list: writer.add_array, int: writer.add_uint32,
        }  # fmt: skip
        if value is not None:
            add[type(value)](f"{kind}.{name}", value)
    held, tensors = _held(config, encoding)
    for name, (data, raw) in _named(kind, _joined(tensors) if fused else tensors).items():
        if name not in skip:
            writer.add_tensor(name, data, raw_dtype=raw)
    for length in ("short", "long"):
        if f"{length}_factor" in (config.get("rope_scaling") or {}):
            factors = np.array(config["rope_scaling"][f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


Stored = dict[str, tuple[Array, Type | None]]


def _held(config: Config, encoding: str) -> tuple[dict[str, Array], Stored]:
    """The weights after encoding, and the bytes by Hugging Face's names; Gemma's norms plus one."""
    held: dict[str, Array] = {}
    stored: Stored = {}
    for name, value in random_weights(config).items():
        if value.ndim == 2 and encoding != "F32":
            data = gguf.quants.quantize(value, Type[encoding])
            held[name] = gguf.quants.dequantize(data, Type[encoding])
            stored[name] = data, Type[encoding]
            continue
        held[name] = value
        shifted = config["model_type"].startswith("gemma") and name.endswith("norm.weight")
        stored[name] = value + 1 if shifted else value, None
    return held, stored


def _joined(tensors: Stored) -> Stored:
    """The tensors of queries, keys and values as one."""
    joined: Stored = {}
    for name, (data, raw) in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{n}_proj")][0] for n in "qkv"]
            joined[name.replace("q_proj", "qkv_proj")] = np.concatenate(parts), raw
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = data, raw
    return joined


def _named(kind: str, tensors: Stored) -> Stored:
    """The tensors by GGUF's names; those of joined ones are known of some architectures only."""
    names = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    tables = [gguf.get_tensor_name_map(arch, 64) for arch in (names[kind], gguf.MODEL_ARCH.PHI3)]
    result: Stored = {}
    for name, stored in tensors.items():
        found = [t.get_name(name, try_suffixes=(".weight", ".bias")) for t in tables]
        result[next(n for n in found if n is not None)] = stored
    return result
