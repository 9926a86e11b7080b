"""Language models beyond Llama, written from their definitions in NumPy, in float64.

Dims: T tokens, H query heads, KV key/value heads, D head size. Weights are in Hugging Face's
layout and under its names; the configuration is that of config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Config = Mapping[str, Any]


def logits(config: Config, weights: Mapping[str, Array], ids: Sequence[int]) -> Array:
    """Logits (T, vocabulary) of all tokens at once."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    return _Model(config, w, config["architectures"][0]).logits(np.array(ids))


def gelu(x: Array) -> Array:
    """The approximation by tanh, which Gemma and Phi use."""
    result: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return result


def silu(x: Array) -> Array:
    result: Array = x / (1 + np.exp(-x))
    return result


def capped(x: Array, cap: float | None) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def rotated(x: Array, angles: Array, factor: float) -> Array:
    """x (H, T, D), of which the first 2 R elements turn by angles (T, R)."""
    half = angles.shape[1]
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.concatenate([*turned, x[..., 2 * half :]], axis=-1)


@dataclass
class _Model:
    c: Config
    w: Mapping[str, Array]
    name: str

    @property
    def gemma(self) -> bool:
        return self.name.startswith("Gemma")

    @property
    def late_norms(self) -> bool:
        return self.name in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")

    @property
    def head_dim(self) -> int:
        return int(self.c.get("head_dim", self.c["hidden_size"] // self.c["num_attention_heads"]))

    def logits(self, ids: Array) -> Array:
        x = self.w["model.embed_tokens.weight"][ids]
        x = x * math.sqrt(self.c["hidden_size"]) if self.gemma else x
        for layer in range(self.c["num_hidden_layers"]):
            x = self.layer(layer, x)
        last = "model.final_layernorm" if self.name == "PhiForCausalLM" else "model.norm"
        tied = self.c["tie_word_embeddings"]
        head = self.w["model.embed_tokens.weight" if tied else "lm_head.weight"]
        y = self.norm(last, x) @ head.T + self.w.get("lm_head.bias", 0.0)
        return capped(y, self.c.get("final_logit_softcapping"))

    def layer(self, layer: int, x: Array) -> Array:
        base = f"model.layers.{layer}"
        normed = self.norm(f"{base}.input_layernorm", x)
        y = self.attention(layer, normed)
        if self.name == "PhiForCausalLM":
            return x + y + self.mlp(base, normed)
        if not self.late_norms:
            x = x + y
            return x + self.mlp(base, self.norm(f"{base}.post_attention_layernorm", x))
        x = x + self.norm(f"{base}.post_attention_layernorm", y)
        y = self.mlp(base, self.norm(f"{base}.pre_feedforward_layernorm", x))
        return x + self.norm(f"{base}.post_feedforward_layernorm", y)

    def norm(self, name: str, x: Array) -> Array:
        scale = self.w[f"{name}.weight"] + (1 if self.gemma else 0)
        if "layer_norm_eps" in self.c:
            x = x - x.mean(axis=-1, keepdims=True)
        epsilon = self.c.get("layer_norm_eps") or self.c["rms_norm_eps"]
        y: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale
        return y + self.w.get(f"{name}.bias", 0.0)

    def linear(self, name: str, x: Array) -> Array:
        y: Array = x @ self.w[f"{name}.weight"].T
        return y + self.w.get(f"{name}.bias", 0.0)

    def mlp(self, base: str, x: Array) -> Array:
        if self.name == "PhiForCausalLM":
            return self.linear(f"{base}.mlp.fc2", gelu(self.linear(f"{base}.mlp.fc1", x)))
        if self.name == "Phi3ForCausalLM":
            gate, up = np.split(self.linear(f"{base}.mlp.gate_up_proj", x), 2, axis=-1)
        else:
            gate, up = (self.linear(f"{base}.mlp.{n}_proj", x) for n in ("gate", "up"))
        return self.linear(f"{base}.mlp.down_proj", (gelu if self.gemma else silu)(gate) * up)

    def projected(self, base: str, x: Array) -> list[Array]:
        """Queries, keys and values, each (its heads, T, D)."""
        heads, kv = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        if self.name == "Phi3ForCausalLM":
            ends = [heads * self.head_dim, (heads + kv) * self.head_dim]
            parts = np.split(self.linear(f"{base}.qkv_proj", x), ends, axis=-1)
        else:
            parts = [self.linear(f"{base}.{n}_proj", x) for n in "qkv"]
        return [p.reshape(len(x), -1, self.head_dim).swapaxes(0, 1) for p in parts]

    def slides(self, layer: int) -> bool:
        if self.name == "Phi3ForCausalLM":
            return True
        period = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": self.c.get("sliding_window_pattern")}
        return self.name in period and (layer + 1) % (period[self.name] or 6) != 0

    def angles(self, layer: int, tokens: int) -> tuple[Array, float]:
        """Angles (T, R), and the factor of their cos and sin."""
        theta = self.c.get("rope_theta", 10000.0)
        scaling = self.c.get("rope_scaling") or {}
        if self.name == "Gemma3ForCausalLM" and self.slides(layer):
            theta, scaling = self.c["rope_local_base_freq"], {}
        size = int(self.head_dim * self.c.get("partial_rotary_factor", 1.0))
        frequencies = theta ** (-np.arange(0, size, 2) / size) / scaling.get("factor", 1.0)
        factor = 1.0
        if "short_factor" in scaling:
            frequencies = frequencies / np.array(scaling["short_factor"])
            original = self.c["original_max_position_embeddings"]
            ratio = self.c["max_position_embeddings"] / original
            factor = math.sqrt(1 + math.log(ratio) / math.log(original))
        return np.arange(tokens)[:, None] * frequencies, factor

    def attention(self, layer: int, x: Array) -> Array:
        base, tokens = f"model.layers.{layer}.self_attn", len(x)
        query, key, value = self.projected(base, x)
        if self.name == "Gemma3ForCausalLM":
            query, key = self.norm(f"{base}.q_norm", query), self.norm(f"{base}.k_norm", key)
        turn = self.angles(layer, tokens)
        query, key = rotated(query, *turn), rotated(key, *turn)
        groups = len(query) // len(key)
        key, value = (np.repeat(a, groups, axis=0) for a in (key, value))
        size = self.c.get("query_pre_attn_scalar", self.head_dim)
        scores = query @ key.swapaxes(1, 2) / math.sqrt(size)
        scores = capped(scores, self.c.get("attn_logit_softcapping"))
        back = np.arange(tokens)[:, None] - np.arange(tokens)
        window = self.c.get("sliding_window") if self.slides(layer) else None
        hidden = (back < 0) | (back >= (window or tokens))
        share = np.exp(np.where(hidden, -np.inf, scores - scores.max(axis=-1, keepdims=True)))
        mixed = share / share.sum(axis=-1, keepdims=True) @ value
        last = "dense" if self.name == "PhiForCausalLM" else "o_proj"
        return self.linear(f"{base}.{last}", mixed.swapaxes(0, 1).reshape(tokens, -1))
