"""A GGUF of the llama architecture as transformers knows it: its configuration, its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


@cache
def reader(path: Path) -> Any:
    """The file, opened once."""
    import gguf

    return gguf.GGUFReader(path)


def config(path: Path) -> dict[str, Any]:
    """What LlamaConfig takes. Raises ValueError for another architecture."""
    fields = reader(path).fields
    architecture = fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(f"the architecture is {architecture}, not llama")

    def field(name: str) -> Any:
        return fields[f"llama.{name}"].contents()

    names = {tensor.name for tensor in reader(path).tensors}
    vocabulary = next(t.shape[1] for t in reader(path).tensors if t.name == "token_embd.weight")
    return {
        "vocab_size": int(vocabulary),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        "tie_word_embeddings": "output.weight" not in names,
    }


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Names and float32 weights (N, K), (D,), the rows of queries and keys in transformers'
    order: llama.cpp keeps the two halves that rotate together as neighbours."""
    import gguf

    settings = config(path)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for tensor in reader(path).tensors:
        name = translated(tensor.name)
        array = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        rotary = heads.get(name.split(".")[-2])
        if rotary:
            count = settings[rotary]
            pairs = array.reshape(count, len(array) // count // 2, 2, -1)
            array = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))
        yield name, array


def translated(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight."""
    *lead, what, kind = name.split(".")
    if not lead:
        return f"{NAMES[what]}.{kind}"
    return f"model.layers.{lead[1]}.{NAMES[what]}.{kind}"
