"""A Llama-family model written from its definition in NumPy, and a `Graph` run by onnx's reference.

Weights are dictionaries of arrays in Hugging Face's layout and under its names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from onnxstream_nb.graph import Graph, WeightRef

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tiny:
    """A small model's geometry; biases and norms of Qwen2 and Qwen3 follow the architecture."""

    architecture: str = "llama"
    vocab: int = 64
    hidden: int = 32
    intermediate: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    context: int = 128
    theta: float = 10000.0
    epsilon: float = 1e-5
    tied: bool = False
    window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.architecture == "qwen2"

    @property
    def frequencies(self) -> Array:
        """Unscaled rotary frequencies, (head_dim / 2,)."""
        return self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)


def logits(
    tiny: Tiny,
    weights: Mapping[str, Array],
    ids: Sequence[int],
    *,
    frequencies: Array | None = None,
    attention_factor: float = 1.0,
) -> Array:
    """Logits (T, vocab) of a Llama written from its definition, token by token, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    frequencies = tiny.frequencies if frequencies is None else frequencies
    keys: list[list[Array]] = [[] for _ in range(tiny.layers)]
    values: list[list[Array]] = [[] for _ in range(tiny.layers)]
    rows = []
    for position, token in enumerate(ids):
        x = w["model.embed_tokens.weight"][token]
        angles = position * np.concatenate([frequencies, frequencies])
        cos, sin = attention_factor * np.cos(angles), attention_factor * np.sin(angles)
        for layer in range(tiny.layers):
            part = _Layer(tiny, w, f"model.layers.{layer}")
            x = x + part.attention(x, cos, sin, keys[layer], values[layer])
            x = x + part.feed_forward(x)
        x = _norm(x, w["model.norm.weight"], tiny.epsilon)
        rows.append(w["model.embed_tokens.weight" if tiny.tied else "lm_head.weight"] @ x)
    return np.stack(rows)


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    result: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight
    return result


@dataclass
class _Layer:
    tiny: Tiny
    weights: Mapping[str, Array]
    base: str

    def linear(self, name: str, x: Array) -> Array:
        y: Array = self.weights[f"{self.base}.{name}.weight"] @ x
        return y + self.weights.get(f"{self.base}.{name}.bias", 0.0)

    def heads(self, kind: str, x: Array, cos: Array, sin: Array) -> Array:
        y = self.linear(f"self_attn.{kind}_proj", x).reshape(-1, self.tiny.head_dim)
        if self.tiny.architecture == "qwen3":
            weight = self.weights[f"{self.base}.self_attn.{kind}_norm.weight"]
            y = _norm(y, weight, self.tiny.epsilon)
        half = self.tiny.head_dim // 2
        rotated: Array = y * cos + np.concatenate([-y[:, half:], y[:, :half]], axis=1) * sin
        return rotated

    def attention(
        self, x: Array, cos: Array, sin: Array, keys: list[Array], values: list[Array]
    ) -> Array:
        x = _norm(x, self.weights[f"{self.base}.input_layernorm.weight"], self.tiny.epsilon)
        query = self.heads("q", x, cos, sin)
        keys.append(self.heads("k", x, cos, sin))
        values.append(self.linear("self_attn.v_proj", x).reshape(-1, self.tiny.head_dim))
        first = max(0, len(keys) - self.tiny.window) if self.tiny.window else 0
        mixed = []
        for head in range(self.tiny.heads):
            group = head // (self.tiny.heads // self.tiny.kv_heads)
            scores = np.array([query[head] @ key[group] for key in keys[first:]])
            scores /= math.sqrt(self.tiny.head_dim)
            share = np.exp(scores - scores.max())
            share /= share.sum()
            mixed.append(sum(s * v[group] for s, v in zip(share, values[first:], strict=True)))
        return self.linear("self_attn.o_proj", np.concatenate(mixed))

    def feed_forward(self, x: Array) -> Array:
        name = f"{self.base}.post_attention_layernorm.weight"
        x = _norm(x, self.weights[name], self.tiny.epsilon)
        gate = self.linear("mlp.gate_proj", x)
        return self.linear(
            "mlp.down_proj", gate / (1 + np.exp(-gate)) * self.linear("mlp.up_proj", x)
        )


def dense(ref: WeightRef) -> Array:
    """The logical array of a weight, read and decoded by numpy and the `gguf` package."""
    if isinstance(ref.source, bytes):
        data = ref.source[ref.offset : ref.offset + ref.nbytes]
    else:
        with ref.source.open("rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.nbytes)
    if ref.encoding == "raw":
        values = np.frombuffer(data, ref.dtype)
    else:
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(ref.encoding)
        quantised = np.frombuffer(data, np.uint8)
        values = gguf.quants.dequantize(quantised, Type[kind or ref.encoding.upper()])
    values = values.reshape(ref.stored_shape)
    return values.swapaxes(-1, -2) if ref.transposed else values


def onnx_runner(graph: Graph) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Feeds -> outputs by name, in onnx's reference evaluator, after the full model check."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    from onnxstream_nb.formats.onnx_write import to_model_proto

    model = to_model_proto(graph, dense)
    onnx.checker.check_model(model, full_check=True)
    evaluator = ReferenceEvaluator(model)
    names = [value.name for value in graph.outputs]
    return lambda feeds: dict(zip(names, evaluator.run(names, dict(feeds)), strict=True))


def run_in_steps(graph: Graph, ids: Sequence[int], steps: Sequence[int]) -> Array:
    """Logits (T, vocab) of `ids` fed in chunks of the sizes `steps`, each with the past so far."""
    run = onnx_runner(graph)
    caches = {v.name: v.shape for v in graph.inputs if v.name.startswith("past_key_values")}
    past: dict[str, Array] = {}
    for name, shape in caches.items():
        assert shape is not None and isinstance(shape[1], int) and isinstance(shape[3], int)
        past[name] = np.zeros((1, shape[1], 0, shape[3]), np.float32)
    rows, start = [], 0
    for step in steps:
        chunk = np.array([ids[start : start + step]], np.int64)
        positions = np.arange(start, start + step, dtype=np.int64)[None]
        outputs = run({"input_ids": chunk, "position_ids": positions, **past})
        rows.append(outputs["logits"][0])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        start += step
    assert start == len(ids)
    return np.concatenate(rows)


def close(got: Array, wanted: Array) -> None:
    """Equal within 1e-5 of the greatest magnitude: float32 arithmetic against float64."""
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
