"""config.json and GGUF metadata beyond Llama's: what is read of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_models import CONFIGS, random_weights, write_gguf, write_hf

from onnxstream_nb.errors import OnnxstreamError
from onnxstream_nb.formats import gguf, safetensors
from onnxstream_nb.formats.architectures import ARCHITECTURES, GGUF_ARCHITECTURES
from onnxstream_nb.formats.decoder_config import DecoderConfig
from onnxstream_nb.formats.hf_config import read_config

GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
PHI3_MINI = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
    "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
    "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI = {
    **PHI3_MINI, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
    "mlp_bias": False, "partial_rotary_factor": 0.75, "num_attention_heads": 24,
    "num_key_value_heads": 8, "tie_word_embeddings": True, "sliding_window": 262144,
    "max_position_embeddings": 131072, "vocab_size": 200064,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}  # fmt: skip
PHI2 = {
    "_name_or_path": "microsoft/phi-2", "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
    "hidden_act": "gelu_new", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
    "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False,
    "resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.37.0",
    "use_cache": True, "vocab_size": 51200,
}  # fmt: skip


def read_json(folder: Path, config: Mapping[str, Any]) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return read_config(folder)


def test_published_gemma_2(tmp_path: Path) -> None:
    config = read_json(tmp_path, GEMMA2_2B)
    assert [layer.window for layer in config.layers[:4]] == [4096, None, 4096, None]
    assert (config.tied, config.shifted, config.eos_token_ids) == (True, True, (1, 107))
    assert (config.attention_softcap, config.logit_softcap, config.query_size) == (50, 30, 256)
    assert len({layer.rotary for layer in config.layers}) == 1
    absent = {k: v for k, v in GEMMA2_2B.items() if "softcap" not in k and k != "head_dim"}
    assert read_json(tmp_path, absent) == config


def test_published_gemma_3(tmp_path: Path) -> None:
    config = read_json(tmp_path, GEMMA3_1B)
    assert [layer.window for layer in config.layers] == ([512] * 5 + [None]) * 4 + [512] * 2
    local, full = config.layers[0].rotary.frequencies, config.layers[5].rotary.frequencies
    assert (local[64], full[64]) == pytest.approx((1e-2, 1e-3))
    assert (config.attention_softcap, config.logit_softcap) == (0, 0)
    listed = {
        **GEMMA3_1B, "layer_types": ["sliding_attention", "full_attention"] * 13,
        "_sliding_window_pattern": 2, "rope_theta": None, "rope_local_base_freq": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    today = read_json(tmp_path, listed)
    assert [layer.window for layer in today.layers[:3]] == [512, None, 512]
    assert (today.layers[0].rotary, today.layers[1].rotary) == (
        config.layers[0].rotary,
        config.layers[5].rotary,
    )


def test_published_phi(tmp_path: Path) -> None:
    config = read_json(tmp_path, PHI3_MINI)
    assert {layer.window for layer in config.layers} == {2047}
    assert config.fused == {"self_attn.qkv_proj", "mlp.gate_up_proj"}
    config = read_json(tmp_path, PHI4_MINI)
    assert {layer.window for layer in config.layers} == {None}
    rotary = config.layers[0].rotary
    assert (len(rotary.frequencies), rotary.attention_factor) == (48, pytest.approx(1.190238071))
    assert config.context_length == 4096 == rotary.limit
    config = read_json(tmp_path, PHI2)
    assert len(config.layers[0].rotary.frequencies) == 16
    assert (config.activation, config.kind.parallel) == ("gelu_tanh", True)


GEMMA, GEMMA2, GEMMA3, PHI3, LONG, PHI, STABLELM = CONFIGS.values()
NESTED = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
CONFIG_FAULTS: dict[str, tuple[Mapping[str, Any], dict[str, Any], str]] = {
    "bidirectional": (GEMMA3, {"use_bidirectional_attention": True}, "'use_bidirectional_att"),
    "two windows": (GEMMA2, {"sliding_window_size": 9}, "'sliding_window_size' = 9 is not known"),
    "softcap of another": (GEMMA, {"attn_logit_softcapping": 5.0}, "'attn_logit_softcapping' ="),
    "softcap": (GEMMA2, {"final_logit_softcapping": -1}, "final_logit_softcapping = -1 is not"),
    "activation": (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supp"),
    "other activation": (GEMMA2, {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
    "query size": (GEMMA3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 is not a pos"),
    "pattern": (GEMMA3, {"sliding_window_pattern": "x"}, "sliding_window_pattern = 'x' is not a"),
    "flat rope": (
        GEMMA3,
        {"rope_parameters": {"rope_theta": 1e6}},
        r"field 'rope_theta' = 1000000.0 is not known; it should hold an object for each of",
    ),
    "two thetas": (
        GEMMA3,
        {"rope_parameters": {**NESTED, "sliding_attention": {"rope_theta": 5.0}}},
        r"rope_parameters.rope_theta = 5.0 contradicts 10000.0",
    ),
    "partial": (PHI, {"partial_rotary_factor": 0.2}, "rotary_factor = 0.2 of the head size"),
    "no part": (PHI, {"partial_rotary_factor": 1.5}, "rotary_factor = 1.5 of the head size"),
    "qk norm": (PHI, {"qk_layernorm": True}, "'qk_layernorm' = True is not known for Phi"),
    "epsilon": (PHI, {"layer_norm_eps": None}, "the field 'layer_norm_eps' is missing"),
    "other epsilon": (PHI, {"rms_norm_eps": 1e-5}, "'rms_norm_eps' = 1e-05 is not known for Phi"),
    "long": (LONG, {"rope_scaling": {"type": "su", "long_factor": [1.0] * 4}}, "short_factor is"),
    "factors": (
        LONG,
        {"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [0.0] * 4}},
        "short_factor holds values that are not positive",
    ),
    "original": (LONG, {"original_max_position_embeddings": None}, "'original_max_position_emb"),
    "modality": (PHI3, {"full_attn_mod": 2}, "'full_attn_mod' = 2 is not known for Phi3"),
    "fused shape": (PHI3, {"num_key_value_heads": 4}, r"qkv_proj\.weight' has shape \[128, 64\]"),
    "gate and up": (PHI3, {"intermediate_size": 97}, r"gate_up_proj\.weight' has.*\[194, 64\]"),
    "parallel": (STABLELM, {"use_parallel_residual": True}, "'use_parallel_residual' = True"),
    "biases": (STABLELM, {"use_qkv_bias": False}, r"_proj\.bias' is not part of a model"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_folder_that_is_refused(tmp_path: Path, case: str) -> None:
    config, changes, message = CONFIG_FAULTS[case]
    changed = {k: v for k, v in {**config, **changes}.items() if v is not None}
    write_hf(tmp_path, changed, random_weights(config))
    with pytest.raises(OnnxstreamError, match=message) as caught:
        safetensors.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tensor", "message"),
    [
        (GEMMA2, "model.layers.1.pre_feedforward_layernorm.weight", "is missing"),
        (GEMMA3, "model.layers.2.self_attn.q_norm.weight", "is missing"),
        (PHI3, "model.layers.0.self_attn.qkv_proj.weight", "is missing"),
        (PHI, "model.layers.0.mlp.fc1.bias", "is missing"),
        (PHI, "lm_head.bias", "is missing"),
    ],
)
def test_missing_tensor_is_named_as_the_file_names_it(
    tmp_path: Path, config: Mapping[str, Any], tensor: str, message: str
) -> None:
    weights = random_weights(config)
    del weights[tensor]
    write_hf(tmp_path, config, weights)
    with pytest.raises(OnnxstreamError, match=f"'{tensor}' {message}"):
        safetensors.read(tmp_path)
    shutil.rmtree(tmp_path)
    write_hf(tmp_path, config, {**random_weights(config), "model.more": np.ones(2, np.float32)})
    with pytest.raises(OnnxstreamError, match=r"'model\.more' is not part of a model"):
        safetensors.read(tmp_path)


GGUF_FAULTS: dict[str, tuple[Mapping[str, Any], dict[str, Any], str]] = {
    "softcap of another": (GEMMA, {"attn_logit_softcapping": 5.0}, r"gemma\.attn_logit_softcapp"),
    "epsilon of another": (PHI, {"attention.layer_norm_rms_epsilon": 1e-5}, "rms_epsilon = .* is"),
    "epsilon": (PHI, {"attention.layer_norm_epsilon": None}, "layer_norm_epsilon = None is not a"),
    "pattern": (GEMMA3, {"attention.sliding_window_pattern": [True]}, "nor a list of 3"),
    "original": (LONG, {"rope.scaling.original_context_length": None}, "original_context_length"),
    "local": (GEMMA3, {"rope.freq_base_swa": -1.0}, r"rope\.freq_base_swa = -1.0 is not a pos"),
    "parallel": (STABLELM, {"use_parallel_residual": True}, "use_parallel_residual = True is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF_FAULTS)
def test_gguf_that_is_refused(tmp_path: Path, case: str) -> None:
    config, fields, message = GGUF_FAULTS[case]
    write_gguf(tmp_path / "m.gguf", config, fields=fields)
    with pytest.raises(OnnxstreamError, match=message):
        gguf.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("pattern", [3, [True, True, False], None])
def test_gguf_windows_by_pattern(tmp_path: Path, pattern: Any) -> None:
    fields = {"attention.sliding_window_pattern": pattern}
    write_gguf(tmp_path / "m.gguf", GEMMA3, fields=fields)
    nodes = gguf.read(tmp_path / "m.gguf").nodes
    masked = [bool(node.inputs[3]) for node in nodes if node.op_type == "Attention"]
    assert masked == ([True, True, False] if pattern else [True] * 3)


def test_gguf_scales_queries_of_the_largest_gemma_by_its_width(tmp_path: Path) -> None:
    config = {**GEMMA2, "num_hidden_layers": 46}
    write_gguf(tmp_path / "m.gguf", config)
    nodes = gguf.read(tmp_path / "m.gguf").nodes
    assert {n.attributes["scale"] for n in nodes if n.op_type == "Attention"} == {1 / 12}


def test_fused_rows_stay_where_they_are(tmp_path: Path) -> None:
    write_hf(tmp_path, PHI3)
    refs = safetensors.read(tmp_path).initializers
    base = "model.layers.0.self_attn.qkv_proj"
    query, key, value = (refs[f"{base}.{n}_proj.weight"] for n in "qkv")
    assert (query.shape, key.shape, value.shape) == ((64, 64), (64, 32), (64, 32))
    assert (
        key.offset == query.offset + query.nbytes == value.offset - value.nbytes + key.nbytes - 8192
    )
    assert query.source == tmp_path / "model.safetensors"


def test_every_entry_has_a_name_of_its_own() -> None:
    assert len({id(kind) for kind in ARCHITECTURES.values()}) == len(ARCHITECTURES)
    names = [kind.gguf for kind in ARCHITECTURES.values() if kind.gguf]
    assert len(set(names)) == len(names) == len(GGUF_ARCHITECTURES)
