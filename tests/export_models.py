"""Tiny models of transformers for the tests of exporting: one of each architecture, two layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

COMMON: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OLDER: Mapping[str, Any] = {
    "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 8}
NO_KV_HEADS = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tinyllama": ("Llama", {}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 3}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                  "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "gpt2": ("GPT2", {}),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "gptneox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {}),
    "falcon": ("Falcon", NO_KV_HEADS),
    "stablelm": ("StableLm", {}),
    "olmo2": ("Olmo2", {}),
    "cohere": ("Cohere", {}),
}  # fmt: skip
"""Name -> the configuration's class without `Config`, and what differs from COMMON."""


def make(case: str) -> Any:
    """A random model, its vectors too: norms of ones would hide a mistake."""
    import torch
    import transformers

    kind, extra = CASES[case]
    base = OLDER if kind in ("GPT2", "GPTJ") else COMMON
    fields = {k: v for k, v in {**base, **extra}.items() if v is not None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def save(case: str, folder: Path, dtype: str = "float32") -> Any:
    """Write the model as a Hugging Face folder, with weights in `dtype`; the model in float32."""
    import torch
    import transformers

    make(case).to(getattr(torch, dtype)).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="float32", attn_implementation="eager"
    ).eval()


def parameters(model: Any) -> int:
    """Elements of its weights, those that are tied counted once."""
    return sum(p.numel() for p in model.parameters())


def torch_logits(model: Any, ids: Sequence[int]) -> Array:
    """(T, V) for all ids at once, without any cache."""
    import torch

    with torch.no_grad():
        result: Array = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return result


def run_in_steps(run: Any, inputs: Any, ids: Sequence[int], steps: Sequence[int]) -> Array:
    """(T, V) of an exported graph, the presents of each step fed back as the next one's past.

    `run(feeds, outputs)` is a session; `inputs` maps its inputs' names to their shapes.
    """
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in inputs.items()
        if name.startswith("pkv")
    }
    outputs = ["logits", *(f"o{name}" for name in past)]
    rows, start = [], 0
    for count in steps:
        feeds = {
            "input_ids": np.array([ids[start : start + count]], np.int64),
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.arange(start, start + count)[None],
            **past,
        }
        got = run({name: feeds[name] for name in inputs}, outputs)
        rows.append(np.asarray(got[0])[0])
        past = {name: np.asarray(value) for name, value in zip(past, got[1:], strict=True)}
        start += count
    return np.concatenate(rows)
