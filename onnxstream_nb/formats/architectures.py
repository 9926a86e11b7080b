"""The language-model architectures that are imported without PyTorch: an entry of data for each.

An entry says in what an architecture differs from Llama: the fields that it reads, the names of its
tensors, and the parts of its layers. Everything else reads entries and knows no architecture;
docs/architectures.md shows how one is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture adds to Llama. Modules are named as Llama's are in Hugging Face.

    Of config.json: `fields` are read beside those of every architecture, `defaults` stand in for
    absent ones (of any kind), `neutral` change nothing while they have the value given here, and
    `copies` while they repeat another.
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
    copies: Mapping[str, str] = field(default_factory=dict)
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


_ATTENTION_BIAS = frozenset({"attention_bias"})
_WINDOW = frozenset({"sliding_window"})
_LAYER_TYPES = _WINDOW | {"layer_types"}
_QWEN_WINDOWS = _LAYER_TYPES | {"use_sliding_window", "max_window_layers"}
_PARTIAL = frozenset({"partial_rotary_factor"})
_SOFTCAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_GEMMA_FIELDS = _ATTENTION_BIAS | _LAYER_TYPES | _SOFTCAPS | {"query_pre_attn_scalar"}

_LLAMA = Architecture(
    gguf="llama",
    fields=_ATTENTION_BIAS | {"mlp_bias"},
    gguf_interleaved=True,
)
_MISTRAL = Architecture(fields=_WINDOW, defaults={"sliding_window": 4096})
_QWEN2 = Architecture(
    gguf="qwen2",
    fields=_QWEN_WINDOWS,
    defaults={"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    biases=frozenset({"qkv"}),
)
_QWEN3 = replace(
    _QWEN2,
    gguf="qwen3",
    fields=_QWEN_WINDOWS | _ATTENTION_BIAS,
    biases=frozenset(),
    qk_norm=True,
)
_GEMMA = Architecture(
    gguf="gemma",
    fields=_ATTENTION_BIAS,
    defaults={"tie_word_embeddings": True, "head_dim": 256},
    activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},  # an older name for it
    shifted=True,
    scaled_embedding=True,
)
_GEMMA2 = replace(
    _GEMMA,
    gguf="gemma2",
    fields=_GEMMA_FIELDS,
    defaults={
        **_GEMMA.defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    copies={"sliding_window_size": "sliding_window"},
    gguf_fields=_SOFTCAPS | {"attention.sliding_window_pattern"},
    gguf_query_sizes={46: 144},  # 27B
    names={
        "self_attn.output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp.output_norm": "post_feedforward_layernorm",
    },
    activations={"gelu_pytorch_tanh": "gelu_tanh"},
    output_norms=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    gguf="gemma3",
    fields=_GEMMA_FIELDS
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    defaults={
        **_GEMMA.defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    gguf_fields=_GEMMA2.gguf_fields | {"rope.freq_base_swa"},
    gguf_query_sizes={62: 168},  # 27B
    qk_norm=True,
)
_PHI3 = Architecture(
    gguf="phi3",
    fields=_ATTENTION_BIAS | _WINDOW | _PARTIAL | {"original_max_position_embeddings"},
    neutral={"full_attn_mod": 1, "interpolate_factor": 1},
    fused=frozenset({"self_attn.qkv_proj", "mlp.gate_up_proj"}),
)
_PHI = Architecture(
    gguf="phi2",
    fields=_PARTIAL,
    defaults={"partial_rotary_factor": 0.5},
    names={
        "model.norm": "model.final_layernorm",
        "self_attn.o_proj": "self_attn.dense",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    },
    biases=frozenset({"qkv", "output", "mlp", "head"}),
    activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    gated=False,
    layer_norm=True,
    parallel=True,
)
_STABLELM = Architecture(
    gguf="stablelm",
    fields=_PARTIAL | {"use_qkv_bias"},
    defaults={"partial_rotary_factor": 0.25},
    layer_norm=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Phi3ForCausalLM": _PHI3,
    "PhiForCausalLM": _PHI,
    "StableLmForCausalLM": _STABLELM,
}
"""Hugging Face's class name -> its entry."""

GGUF_ARCHITECTURES: Mapping[str, Architecture] = {
    a.gguf: a for a in ARCHITECTURES.values() if a.gguf
}
