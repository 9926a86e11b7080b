"""The parameters of one decoder-only language model, whichever file format tells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .architectures import Activation, Architecture
from .rope import Rotary

MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Layer:
    """How a layer rotates, and how many of the newest positions a token attends to in it, itself
    included, or None for all."""

    rotary: Rotary
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A model of the architecture `kind`.

    `interleaved` says that rotated pairs are neighbours (GGUF's row order for "llama") and not half
    a head apart. `biases`, `fused` and `shifted` are as in an Architecture, but of this file.
    Attention scores are divided by the root of `query_size` (None: the head size). A softcap of 0
    is none. `path` is for messages.
    """

    path: Path
    architecture: str
    kind: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    epsilon: float
    layers: tuple[Layer, ...]
    activation: Activation = "silu"
    interleaved: bool = False
    biases: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    shifted: bool = False
    query_size: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied: bool = False
    name: str = ""
    eos_token_ids: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise a ModelError when a size is out of range."""
        sizes = {
            "vocabulary size": self.vocab_size, "hidden size": self.hidden_size,
            "layers": len(self.layers), "intermediate size": self.intermediate_size,
            "attention heads": self.heads, "key/value heads": self.kv_heads,
            "head size": self.head_dim, "context length": self.context_length,
        }  # fmt: skip
        for what, size in sizes.items():
            if not 0 < size < 2**31:
                raise ModelError(f"{self.path}: {what} = {size} is out of range")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"{self.path}: {self.heads} attention heads are no multiple of {self.kv_heads} "
                "key/value heads"
            )

    def fused_rows(self) -> dict[str, tuple[str, int, int]]:
        """Module of a layer -> the module whose rows hold its own, their first, and all there."""
        query, kv, inner = (
            self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate_size
        )  # fmt: skip
        parts = {
            "self_attn.qkv_proj": {"q_proj": query, "k_proj": kv, "v_proj": kv},
            "mlp.gate_up_proj": {"gate_proj": inner, "up_proj": inner},
        }
        found = {}
        for whole in self.fused:
            block, first = whole.split(".")[0], 0
            for name, rows in parts[whole].items():
                found[f"{block}.{name}"] = (whole, first, sum(parts[whole].values()))
                first += rows
        return found

    def metadata(self) -> dict[str, Any]:
        """What the graph tells of the model."""
        return {
            "architecture": self.architecture,
            "name": self.name,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "eos_token_ids": list(self.eos_token_ids),
        }


def check_layers(path: Path, layers: int) -> int:
    """`layers`, if it is a sane number of layers; readers call it before they allocate by it."""
    if not 0 < layers <= MAX_LAYERS:
        raise ModelError(f"{path}: {layers} layers are out of range (1 to {MAX_LAYERS})")
    return layers
