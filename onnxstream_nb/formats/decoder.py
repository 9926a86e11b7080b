"""The compact ONNX graph of a decoder-only language model, in the standard's fused operators.

Shared by the readers of GGUF and safetensors. Dims: T tokens ("sequence"), P past tokens,
H query heads, KV key/value heads, D head size. Weights are asked for by the names that Hugging
Face gives them in a Llama and are references into the original file. What distinguishes one
architecture from another is data: see architectures.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..graph import Graph, Node, Value
from .decoder_config import DecoderConfig, Layer
from .notation import Lookup, Notation
from .positions import Angles, masks, rotary_angles
from .rope import Rotary

OPSET: Mapping[str, int] = {"": 23}


def build(config: DecoderConfig, lookup: Lookup) -> Graph:
    """The graph of `config`: ids, positions and past -> logits (1, T, vocab) and present.

    A tensor of another shape than `config` implies is a ModelError.
    """
    config.check()
    builder = _Builder(config, lookup)
    builder.build()
    return Graph(
        tuple(builder.nodes), _inputs(config), _outputs(config), builder.initializers, OPSET,
        name=config.name, metadata=config.metadata(),
    )  # fmt: skip


class _Builder(Notation):
    """Each method adds one part of the model and names the value it yields."""

    def __init__(self, config: DecoderConfig, lookup: Lookup) -> None:
        super().__init__(lookup)
        self.config = config
        self._fused_rows = config.fused_rows()
        self._angles: dict[Rotary, Angles] = {}
        self._masks: dict[int | None, str] = {}

    def build(self) -> None:
        c = self.config
        table = self.weight("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        hidden = self.embedding(table)
        self._angles = rotary_angles(self, (layer.rotary for layer in c.layers))
        self._masks = masks(self, (layer.window for layer in c.layers))
        for number, layer in enumerate(c.layers):
            hidden = self.layer(number, layer, hidden)
        self.logits(self.norm("model.norm", hidden), table)

    def embedding(self, table: str) -> str:
        """The tokens' rows of the table, (1, T, hidden size)."""
        if not self.config.kind.scaled_embedding:
            return self.node("Gather", "hidden", table, "input_ids", axis=0)
        rows = self.node("Gather", "hidden.rows", table, "input_ids", axis=0)
        root = math.sqrt(self.config.hidden_size)
        return self.node("Mul", "hidden", rows, self.scalar("hidden.scale", root))

    def layer(self, number: int, layer: Layer, hidden: str) -> str:
        """One layer: attention and mlp, each normalised before, added to the residual after."""
        base, kind = f"model.layers.{number}", self.config.kind
        x = self.norm(f"{base}.input_layernorm", hidden)
        y = self.attention(number, layer, x)
        if kind.output_norms:
            y = self.norm(f"{base}.self_attn.output_norm", y)
        hidden = self.node("Add", f"{base}.attention_residual", hidden, y)
        if not kind.parallel:
            x = self.norm(f"{base}.post_attention_layernorm", hidden)
        y = self.feed_forward(base, x)
        if kind.output_norms:
            y = self.norm(f"{base}.mlp.output_norm", y)
        return self.node("Add", f"{base}.residual", hidden, y)

    def attention(self, number: int, layer: Layer, x: str) -> str:
        """What the attention of one layer adds, before a norm of it."""
        c, base = self.config, f"model.layers.{number}"
        query = self.rotated(base, "q", x, c.heads, layer.rotary)
        key = self.rotated(base, "k", x, c.kv_heads, layer.rotary)
        width = c.kv_heads * c.head_dim
        value = self.linear(base, "self_attn.v_proj", x, c.hidden_size, width, "qkv")
        mixed, mask = f"{base}.self_attn.out", self._masks[layer.window]
        past = tuple(f"past_key_values.{number}.{kind}" for kind in ("key", "value"))
        present = tuple(f"present.{number}.{kind}" for kind in ("key", "value"))
        attributes: dict[str, Any] = {
            "q_num_heads": c.heads,
            "kv_num_heads": c.kv_heads,
            "is_causal": 0 if mask else 1,
            "scale": 1 / math.sqrt(c.query_size or c.head_dim),
        }
        if c.attention_softcap:
            attributes["softcap"] = c.attention_softcap
        inputs = (query, key, value, mask, *past)
        self.nodes.append(Node("Attention", inputs, (mixed, *present), attributes, name=mixed))
        width = c.heads * c.head_dim
        return self.linear(base, "self_attn.o_proj", mixed, width, c.hidden_size, "output")

    def rotated(self, base: str, kind: str, x: str, heads: int, rotary: Rotary) -> str:
        """Queries or keys: projection, norm per head where the model has one, rotation."""
        c, name = self.config, f"{base}.self_attn.{kind}"
        width = heads * c.head_dim
        y = self.linear(base, f"self_attn.{kind}_proj", x, c.hidden_size, width, "qkv")
        if c.kind.qk_norm:
            split = self.constant(f"shape.heads_{heads}", (0, 0, heads, c.head_dim))
            joined = self.constant(f"shape.width_{width}", (0, 0, width))
            y = self.node("Reshape", f"{name}.heads", y, split)
            y = self.norm(f"{name}_norm", y, c.head_dim)
            y = self.node("Reshape", f"{name}.joined", y, joined)
        attributes = {"num_heads": heads, "interleaved": int(c.interleaved)}
        if 2 * len(rotary.frequencies) != c.head_dim:
            attributes["rotary_embedding_dim"] = 2 * len(rotary.frequencies)
        angles = self._angles[rotary]
        return self.node("RotaryEmbedding", f"{name}.rotated", y, *angles, **attributes)

    def feed_forward(self, base: str, x: str) -> str:
        """What the mlp of one layer adds: down(act(gate(x)) * up(x)), or down(act(up(x)))."""
        c, size, inner = self.config, self.config.hidden_size, self.config.intermediate_size
        if c.kind.gated:
            gate = self.linear(base, "mlp.gate_proj", x, size, inner, "mlp")
            up = self.linear(base, "mlp.up_proj", x, size, inner, "mlp")
            y = self.node("Mul", f"{base}.mlp.product", self.activated(base, gate), up)
        else:
            y = self.activated(base, self.linear(base, "mlp.up_proj", x, size, inner, "mlp"))
        return self.linear(base, "mlp.down_proj", y, inner, size, "mlp")

    def activated(self, base: str, x: str) -> str:
        if self.config.activation == "silu":
            sigmoid = self.node("Sigmoid", f"{base}.mlp.sigmoid", x)
            return self.node("Mul", f"{base}.mlp.swish", x, sigmoid)
        form = "tanh" if self.config.activation == "gelu_tanh" else "none"
        return self.node("Gelu", f"{base}.mlp.gelu", x, approximate=form)

    def norm(self, name: str, x: str, size: int = 0) -> str:
        """x (..., size), normalised by the layer `name`; size 0 is that of the hidden state."""
        c, shape = self.config, (size or self.config.hidden_size,)
        scale = self.weight(f"{name}.weight", shape)
        if c.shifted:
            scale = self.node("Add", f"{name}.scale", scale, self.scalar("norm.one", 1.0))
        op_type, inputs = "RMSNormalization", [x, scale]
        if c.kind.layer_norm:
            op_type, inputs = "LayerNormalization", [x, scale, self.weight(f"{name}.bias", shape)]
        return self.node(op_type, f"{name}.out", *inputs, axis=-1, epsilon=c.epsilon)

    def linear(self, base: str, module: str, x: str, k: int, n: int, part: str) -> str:
        """x (1, T, k) -> (1, T, n) by a layer of the model's `part`, which may have biases."""
        name = f"{base}.{module}"
        y = self.node("MatMul", f"{name}.out", x, self.stored(base, module, "weight", (n, k)))
        if part in self.config.biases:
            y = self.node("Add", f"{name}.biased", y, self.stored(base, module, "bias", (n,)))
        return y

    def stored(self, base: str, module: str, kind: str, shape: tuple[int, ...]) -> str:
        """A layer's weight or bias: a tensor of its own, or rows of one that holds several."""
        is_matrix = len(shape) == 2
        if module not in self._fused_rows:
            return self.weight(f"{base}.{module}.{kind}", shape, transposed=is_matrix)
        whole, first, total = self._fused_rows[module]
        rows, own = (first, total), module.rpartition(".")[2]
        return self.rows(own, f"{base}.{whole}.{kind}", rows, shape, transposed=is_matrix)

    def logits(self, hidden: str, table: str) -> None:
        """The graph's output, from the last hidden state (1, T, hidden size)."""
        c, name = self.config, "logits"
        cap = c.logit_softcap
        biased = "head" in c.biases
        y = self.node("MatMul", "logits.plain" if biased or cap else name, hidden, self.head(table))
        if biased:
            bias = self.weight("lm_head.bias", (c.vocab_size,))
            y = self.node("Add", "logits.biased" if cap else name, y, bias)
        if cap:
            limit = self.scalar("logits.softcap", cap)
            y = self.node("Tanh", "logits.tanh", self.node("Div", "logits.part", y, limit))
            self.node("Mul", name, y, limit)

    def head(self, table: str) -> str:
        """The output matrix; a tied one refers to the embedding's own bytes."""
        c = self.config
        if not c.tied:
            shape = (c.vocab_size, c.hidden_size)
            return self.weight("lm_head.weight", shape, transposed=True)
        ref = self.initializers[table]
        name = "lm_head.weight"
        self.initializers[name] = replace(ref, name=name, shape=ref.shape[::-1], transposed=True)
        return name


def _inputs(c: DecoderConfig) -> tuple[Value, ...]:
    ids = (Value(name, "int64", (1, "sequence")) for name in ("input_ids", "position_ids"))
    return (*ids, *_cache(c, "past_key_values", "past"))


def _outputs(c: DecoderConfig) -> tuple[Value, ...]:
    logits = Value("logits", "float32", (1, "sequence", c.vocab_size))
    return (logits, *_cache(c, "present", "total"))


def _cache(c: DecoderConfig, prefix: str, length: str) -> tuple[Value, ...]:
    shape = (1, c.kv_heads, length, c.head_dim)
    return tuple(
        Value(f"{prefix}.{layer}.{kind}", "float32", shape)
        for layer in range(len(c.layers))
        for kind in ("key", "value")
    )
