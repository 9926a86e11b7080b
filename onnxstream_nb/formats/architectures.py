"""The language-model architectures that are imported without PyTorch: an entry of data for each.

An entry says in what an architecture differs from Llama: the fields that it reads, the names of its
tensors, and the parts of its layers. Everything else reads entries and knows no architecture;
docs/architectures.md shows how one is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture adds to Llama. Modules are named as Llama's are in Hugging Face.

    Of config.json: `fields` are read beside those of every architecture, `defaults` stand in for
    absent ones (of any kind), and `neutral` change nothing while they have the value given here.
    `gguf` is the name in GGUF files, "" where that is another entry's; `gguf_fields` are read
    there, and `gguf_interleaved` says that rotated pairs are neighbours in its rows.
    `gguf_query_sizes` are the fields query_pre_attn_scalar that GGUF leaves out, by layers.

    Of the tensors: `names` are modules that have other names, `fused` those that hold the rows of
    several (`self_attn.qkv_proj`, `mlp.gate_up_proj`), `biases` those parts that always have one
    (qkv, output, mlp, head). Norm weights that are `shifted` are stored less one; in GGUF whole.

    Of a layer: `activations` are what the configuration may name, the first of them unless it
    does; the mlp may not be `gated`; `layer_norm` stands for RMSNorm; norms of queries and keys
    (`qk_norm`) and of what attention and mlp give (`output_norms`); `parallel` attention and mlp
    read the same norm. A `scaled_embedding` is multiplied by the root of its size.
    """

    gguf: str = ""
    fields: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    gguf_fields: frozenset[str] = frozenset()
    gguf_interleaved: bool = False
    gguf_query_sizes: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    shifted: bool = False
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    gated: bool = True
    layer_norm: bool = False
    qk_norm: bool = False
    output_norms: bool = False
    parallel: bool = False
    scaled_embedding: bool = False

    @property
    def activation(self) -> Activation:
        """That of a file which names none."""
        return next(iter(self.activations.values()))

    @property
    def has_local_rope(self) -> bool:
        """Whether layers with a window rotate by frequencies of their own."""
        return "rope_local_base_freq" in self.defaults


_WINDOW = frozenset({"sliding_window"})
_WINDOWS = _WINDOW | {"use_sliding_window", "max_window_layers", "layer_types"}
_QWEN_DEFAULTS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        gguf="llama",
        fields=frozenset({"attention_bias", "mlp_bias"}),
        gguf_interleaved=True,
    ),
    "MistralForCausalLM": Architecture(
        fields=_WINDOW,
        defaults={"sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Architecture(
        gguf="qwen2",
        fields=_WINDOWS,
        defaults=_QWEN_DEFAULTS,
        biases=frozenset({"qkv"}),
    ),
    "Qwen3ForCausalLM": Architecture(
        gguf="qwen3",
        fields=_WINDOWS | {"attention_bias"},
        defaults=_QWEN_DEFAULTS,
        qk_norm=True,
    ),
}
"""Hugging Face's class name -> its entry."""

GGUF_ARCHITECTURES: Mapping[str, Architecture] = {
    a.gguf: a for a in ARCHITECTURES.values() if a.gguf
}
