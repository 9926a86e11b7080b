"""SmolLM2 as a Hugging Face folder, out of the GGUF file that the Python package brings.

Run as a script: `python tests/smollm2_folder.py FILE.gguf FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HEADS, KV_HEADS, LAYERS = 9, 3, 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": 64,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float16",
}  # fmt: skip
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
WITHIN = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_folder(gguf_file: Path, folder: Path) -> None:
    """Weights in float16, config.json and the tokenizer."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

    tensors = {}
    for tensor in GGUFReader(gguf_file).tensors:
        name, values = tensor.name, dequantize(tensor.data, tensor.tensor_type)
        if name in OUTSIDE:
            tensors[OUTSIDE[name]] = values.astype(np.float16)
            continue
        _, layer, kind, _ = name.split(".")
        if kind in ("attn_q", "attn_k"):
            values = in_halves(values, HEADS if kind == "attn_q" else KV_HEADS)
        tensors[f"model.layers.{layer}.{WITHIN[kind]}.weight"] = values.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def in_halves(rows: Array, heads: int) -> Array:
    """Rows (heads * D, K) of pairs that are rotated together side by side, as GGUF has them, in
    the order of transformers: first all firsts of a head, then all seconds."""
    paired = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(rows.shape))


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), Path(sys.argv[2]))
