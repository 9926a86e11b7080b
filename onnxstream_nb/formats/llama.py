"""The compact ONNX graph of Llama-family models, built from the standard's fused operators.

Shared by the readers of GGUF and safetensors. Dims: T tokens ("sequence"), P past tokens,
H query heads, KV key/value heads, D head size. Weights are asked for by the names that Hugging
Face gives them and are references into the original file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..graph import Graph, Node, Value, WeightRef
from .rope import Rotary

OPSET: Mapping[str, int] = {"": 23}
FLOAT = 1  # onnx.TensorProto.FLOAT, the target of Cast
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What distinguishes one Llama-family model from another.

    `windows` holds, per layer, how many of the newest positions a token attends to, itself
    included, or None for all. `interleaved` says that rotated pairs are neighbours (GGUF's row
    order for the architecture "llama") and not half a head apart. `path` is for messages.
    """

    path: Path
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    epsilon: float
    rotary: Rotary
    windows: tuple[int | None, ...]
    interleaved: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    name: str = ""
    eos_token_ids: tuple[int, ...] = ()


def build(config: LlamaConfig, weight: Callable[[str], WeightRef]) -> Graph:
    """The graph of `config`: ids, positions and past -> logits (1, T, vocab) and present.

    `weight(name)` gives the reference of a tensor as the file stores it (a linear layer as N rows
    of K) or raises; a tensor of another shape than `config` implies is a ModelError.
    """
    _check(config)
    return _Builder(config, weight).build()


def _check(c: LlamaConfig) -> None:
    sizes = {
        "vocabulary size": c.vocab_size, "hidden size": c.hidden_size, "layers": c.layers,
        "intermediate size": c.intermediate_size, "attention heads": c.heads,
        "key/value heads": c.kv_heads, "head size": c.head_dim,
        "context length": c.context_length,
    }  # fmt: skip
    for what, size in sizes.items():
        if not 0 < size < 2**31:
            raise ModelError(f"{c.path}: {what} = {size} is out of range")
    if c.heads % c.kv_heads:
        raise ModelError(
            f"{c.path}: {c.heads} attention heads are no multiple of {c.kv_heads} key/value heads"
        )


def check_layers(path: Path, layers: int) -> int:
    """`layers`, if it is a sane number of layers; readers call it before they allocate by it."""
    if not 0 < layers <= MAX_LAYERS:
        raise ModelError(f"{path}: {layers} layers are out of range (1 to {MAX_LAYERS})")
    return layers


class _Builder:
    """Collects nodes and initializers; each method adds one part and names the value it yields."""

    def __init__(self, config: LlamaConfig, weight: Callable[[str], WeightRef]) -> None:
        self.config, self._weight = config, weight
        self.nodes: list[Node] = []
        self.initializers: dict[str, WeightRef] = {}

    def build(self) -> Graph:
        c = self.config
        embedding = self.weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        hidden = self.node("Gather", "hidden", embedding, "input_ids", axis=0)
        angles = self.rotary()
        masks = self.masks()
        for layer, window in enumerate(c.windows):
            hidden = self.attention(layer, hidden, angles, masks[window])
            hidden = self.feed_forward(layer, hidden)
        hidden = self.norm("model.norm.weight", hidden, c.hidden_size)
        self.node("MatMul", "logits", hidden, self.head(embedding))
        return Graph(
            tuple(self.nodes), self.inputs(), self.outputs(), self.initializers, OPSET,
            name=c.name, metadata=self.metadata(),
        )  # fmt: skip

    # -- pieces of notation

    def node(self, op_type: str, output: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(Node(op_type, inputs, (output,), attributes, name=output))
        return output

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> str:
        """Add the tensor `name`, stored with `shape`, and return its initializer's name."""
        ref = self._weight(name)
        if ref.shape != shape:
            raise ModelError(
                f"{ref.source!s}: tensor '{ref.name}' has shape {list(ref.shape)}, but the "
                f"model's parameters imply {list(shape)}"
            )
        if transposed:
            ref = replace(ref, shape=shape[::-1], transposed=True)
        self.initializers[ref.name] = ref
        return ref.name

    def constant(
        self, name: str, values: tuple[int, ...] | tuple[float, ...], *, scalar: bool = False
    ) -> str:
        """Add a constant kept in memory: int64 when all values are ints, else float32."""
        integers = all(isinstance(v, int) for v in values)
        data = struct.pack(f"<{len(values)}{'q' if integers else 'f'}", *values)
        self.initializers[name] = WeightRef(
            name,
            () if scalar else (len(values),),
            "int64" if integers else "float32",
            data,
            nbytes=len(data),
        )
        return name

    def norm(self, name: str, x: str, size: int) -> str:
        weight = self.weight(name, (size,))
        output = f"{name.removesuffix('.weight')}.out"
        return self.node(
            "RMSNormalization", output, x, weight, axis=-1, epsilon=self.config.epsilon
        )

    def linear(self, name: str, x: str, k: int, n: int, bias: bool) -> str:
        """x (1, T, k) -> (1, T, n) by the layer `name`."""
        weight = self.weight(f"{name}.weight", (n, k), transposed=True)
        y = self.node("MatMul", f"{name}.out", x, weight)
        if bias:
            y = self.node("Add", f"{name}.biased", y, self.weight(f"{name}.bias", (n,)))
        return y

    # -- the parts of the model

    def rotary(self) -> tuple[str, str]:
        """cos and sin of all positions' angles, (1, T, rotated size / 2), shared by all layers."""
        frequencies = self.constant("rotary.inv_freq", self.config.rotary.frequencies)
        positions = self.node("Cast", "rotary.positions", "position_ids", to=FLOAT)
        axes = self.constant("rotary.axes", (-1,))
        column = self.node("Unsqueeze", "rotary.column", positions, axes)
        angles = self.node("Mul", "rotary.angles", column, frequencies)
        cos = self.node("Cos", "rotary.cos", angles)
        sin = self.node("Sin", "rotary.sin", angles)
        if self.config.rotary.attention_factor == 1.0:
            return cos, sin
        factor = self.constant(
            "rotary.attention_factor", (self.config.rotary.attention_factor,), scalar=True
        )
        return (
            self.node("Mul", "rotary.cos_scaled", cos, factor),
            self.node("Mul", "rotary.sin_scaled", sin, factor),
        )

    def masks(self) -> dict[int | None, str]:
        """Window -> its boolean mask (T, P + T), True where attended; "" where causal suffices."""
        windows = dict.fromkeys(w for w in self.config.windows if w is not None)
        masks: dict[int | None, str] = {None: ""}
        if not windows:
            return masks
        past = self.node("Shape", "mask.past_shape", "past_key_values.0.key", start=2, end=3)
        tokens = self.node("Shape", "mask.tokens_shape", "input_ids", start=1, end=2)
        past = self.node("Squeeze", "mask.past", past)
        total = self.node("Add", "mask.total", past, self.node("Squeeze", "mask.tokens", tokens))
        zero = self.constant("mask.zero", (0,), scalar=True)
        one = self.constant("mask.one", (1,), scalar=True)
        queries = self.node("Range", "mask.queries", past, total, one)
        keys = self.node("Range", "mask.keys", zero, total, one)
        column = self.node("Unsqueeze", "mask.column", queries, self.constant("mask.axes", (1,)))
        distance = self.node("Sub", "mask.distance", column, keys)
        causal = self.node("GreaterOrEqual", "mask.causal", distance, zero)
        for window in windows:
            size = self.constant(f"mask.window_{window}", (window,), scalar=True)
            near = self.node("Less", f"mask.near_{window}", distance, size)
            masks[window] = self.node("And", f"mask.sliding_{window}", causal, near)
        return masks

    def attention(self, layer: int, hidden: str, angles: tuple[str, str], mask: str) -> str:
        """The attention block of one layer, with its residual connection."""
        c, base = self.config, f"model.layers.{layer}"
        x = self.norm(f"{base}.input_layernorm.weight", hidden, c.hidden_size)
        query = self.rotated(f"{base}.self_attn.q", x, c.heads, angles)
        key = self.rotated(f"{base}.self_attn.k", x, c.kv_heads, angles)
        width = c.kv_heads * c.head_dim
        value = self.linear(f"{base}.self_attn.v_proj", x, c.hidden_size, width, c.qkv_bias)
        mixed = f"{base}.self_attn.out"
        past = tuple(f"past_key_values.{layer}.{kind}" for kind in ("key", "value"))
        present = tuple(f"present.{layer}.{kind}" for kind in ("key", "value"))
        attributes: dict[str, Any] = {
            "q_num_heads": c.heads,
            "kv_num_heads": c.kv_heads,
            "is_causal": 0 if mask else 1,
            "scale": 1 / math.sqrt(c.head_dim),
        }
        inputs = (query, key, value, mask, *past)
        self.nodes.append(Node("Attention", inputs, (mixed, *present), attributes, name=mixed))
        name, width = f"{base}.self_attn.o_proj", c.heads * c.head_dim
        y = self.linear(name, mixed, width, c.hidden_size, c.output_bias)
        return self.node("Add", f"{base}.attention_residual", hidden, y)

    def rotated(self, name: str, x: str, heads: int, angles: tuple[str, str]) -> str:
        """Queries or keys: projection, norm per head where the model has one, rotation."""
        c = self.config
        width = heads * c.head_dim
        y = self.linear(f"{name}_proj", x, c.hidden_size, width, c.qkv_bias)
        if c.qk_norm:
            split = self.constant(f"shape.heads_{heads}", (0, 0, heads, c.head_dim))
            joined = self.constant(f"shape.width_{width}", (0, 0, width))
            y = self.node("Reshape", f"{name}.heads", y, split)
            y = self.norm(f"{name}_norm.weight", y, c.head_dim)
            y = self.node("Reshape", f"{name}.joined", y, joined)
        attributes = {"num_heads": heads, "interleaved": int(c.interleaved)}
        if 2 * len(c.rotary.frequencies) != c.head_dim:
            attributes["rotary_embedding_dim"] = 2 * len(c.rotary.frequencies)
        return self.node("RotaryEmbedding", f"{name}.rotated", y, *angles, **attributes)

    def feed_forward(self, layer: int, hidden: str) -> str:
        """down(silu(gate(x)) * up(x)) of one layer, with its residual connection."""
        c, base = self.config, f"model.layers.{layer}"
        inner = c.intermediate_size
        x = self.norm(f"{base}.post_attention_layernorm.weight", hidden, c.hidden_size)
        gate = self.linear(f"{base}.mlp.gate_proj", x, c.hidden_size, inner, c.mlp_bias)
        up = self.linear(f"{base}.mlp.up_proj", x, c.hidden_size, inner, c.mlp_bias)
        sigmoid = self.node("Sigmoid", f"{base}.mlp.sigmoid", gate)
        swish = self.node("Mul", f"{base}.mlp.swish", gate, sigmoid)
        product = self.node("Mul", f"{base}.mlp.product", swish, up)
        y = self.linear(f"{base}.mlp.down_proj", product, inner, c.hidden_size, c.mlp_bias)
        return self.node("Add", f"{base}.residual", hidden, y)

    def head(self, embedding: str) -> str:
        """The output matrix; a tied one refers to the embedding's own bytes."""
        c = self.config
        if not c.tied:
            shape = (c.vocab_size, c.hidden_size)
            return self.weight("lm_head.weight", shape, transposed=True)
        ref = self.initializers[embedding]
        name = "lm_head.weight"
        self.initializers[name] = replace(ref, name=name, shape=ref.shape[::-1], transposed=True)
        return name

    # -- the graph's signature

    def inputs(self) -> tuple[Value, ...]:
        ids = (Value(name, "int64", (1, "sequence")) for name in ("input_ids", "position_ids"))
        return (*ids, *self.cache("past_key_values", "past"))

    def outputs(self) -> tuple[Value, ...]:
        logits = Value("logits", "float32", (1, "sequence", self.config.vocab_size))
        return (logits, *self.cache("present", "total"))

    def cache(self, prefix: str, length: str) -> tuple[Value, ...]:
        shape = (1, self.config.kv_heads, length, self.config.head_dim)
        return tuple(
            Value(f"{prefix}.{layer}.{kind}", "float32", shape)
            for layer in range(self.config.layers)
            for kind in ("key", "value")
        )

    def metadata(self) -> dict[str, Any]:
        c = self.config
        return {
            "architecture": c.architecture,
            "name": c.name,
            "context_length": c.context_length,
            "vocab_size": c.vocab_size,
            "eos_token_ids": list(c.eos_token_ids),
        }
