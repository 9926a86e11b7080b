"""The graphs of Hugging Face folders against transformers' own models, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_oracle import close, run_in_steps

from onnxstream_nb.formats.safetensors import read

IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
}  # fmt: skip
TRAINED = {"original_max_position_embeddings": 32}
CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
BY_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 3}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 16, **CAPS}),
    "gemma3": ("Gemma3", {"sliding_window": 4, "rope_parameters": BY_TYPE}),
    "gemma3, patterned": ("Gemma3", {"sliding_window": 2, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {"sliding_window": 3, "pad_token_id": 0}),
    "phi3, long": ("Phi3", {"rope_parameters": LONG, "pad_token_id": 0, **TRAINED}),
    "phi": ("Phi", {"head_dim": None, "num_key_value_heads": 4}),
    "stablelm": ("StableLm", {"head_dim": None, "use_qkv_bias": True}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}


@pytest.mark.filterwarnings("ignore")  # of torch and transformers, on import and use
@pytest.mark.parametrize("case", CASES)
def test_model_equals_transformers(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name, extra = CASES[case]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 128, "initializer_range": 0.2, "attn_implementation": "eager",
    }  # fmt: skip
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    given = {k: v for k, v in {**sizes, **extra}.items() if v is not None}
    config = getattr(transformers, config_class)(**given)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0].numpy()
    close(run_in_steps(read(tmp_path), IDS, [6, 1, 3]), wanted)
