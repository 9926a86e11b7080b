"""Stable Diffusion's UNet and VAE decoder as graphs of operators and shapes, as exports have them.

Weights are references without bytes: nobody runs these graphs, whose liveness is what counts. With
the default sizes they are version 1.5's, at 512 x 512 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxstream_nb.graph import Graph, Node, Value, WeightRef

Array = np.ndarray[Any, Any]
CHANNELS = (320, 640, 1280, 1280)
GROUPS = 32


class Builder:
    """Nodes one after the other; each method returns the name of what it adds."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.weights: dict[str, WeightRef] = {}
        self.constants: dict[str, Array] = {}

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = tuple(f"{op_type}_{len(self.nodes)}_{i}" for i in range(outputs))
        self.nodes.append(Node(op_type, inputs, names, attributes, name=names[0]))
        return names[0] if outputs == 1 else names

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = WeightRef(name, shape, "float32", b"", nbytes=4 * math.prod(shape))
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name, array = f"c{len(self.weights)}", np.asarray(values, dtype)
        self.weights[name] = WeightRef(name, array.shape, str(array.dtype), array.tobytes(),
                                       nbytes=array.nbytes)  # fmt: skip
        self.constants[name] = array
        return name

    def graph(self, inputs: Sequence[Value], output: str) -> Graph:
        out = Value(output, "float32", None)
        return Graph(tuple(self.nodes), tuple(inputs), (out,), self.weights, {"": 18})

    # -- the parts of the models

    def conv(self, x: str, channels: int, out: int, size: int = 3, stride: int = 1) -> str:
        weights = self.weight(out, channels, size, size), self.weight(out)
        pads = (size // 2,) * 4
        return str(self.node("Conv", x, *weights, kernel_shape=(size, size), pads=pads,
                             strides=(stride, stride)))  # fmt: skip

    def norm(self, x: str, channels: int) -> str:
        """GroupNorm as torch exports it."""
        shape = self.node("Shape", x)
        rows = self.node("Reshape", x, self.constant([0, GROUPS, -1]))
        ones = self.weight(GROUPS), self.weight(GROUPS)
        rows = self.node("InstanceNormalization", rows, *ones)
        y = self.node("Reshape", rows, shape)
        y = self.node("Mul", y, self.weight(channels, 1, 1))
        return str(self.node("Add", y, self.weight(channels, 1, 1)))

    def silu(self, x: str) -> str:
        return str(self.node("Mul", x, self.node("Sigmoid", x)))

    def linear(self, x: str, k: int, n: int) -> str:
        y = self.node("MatMul", x, self.weight(k, n))
        return str(self.node("Add", y, self.weight(n)))

    def resnet(self, x: str, channels: int, out: int, time: str = "") -> str:
        y = self.conv(self.silu(self.norm(x, channels)), channels, out)
        if time:
            t = self.linear(self.silu(time), 4 * CHANNELS[0], out)
            y = self.node("Add", y, self.node("Unsqueeze", t, self.constant([2, 3])))
        y = self.conv(self.silu(self.norm(y, out)), out, out)
        shortcut = x if channels == out else self.conv(x, channels, out, 1)
        return str(self.node("Add", shortcut, y))

    def attention(self, x: str, context: str, width: int, context_width: int, heads: int) -> str:
        size = width // heads
        split, joined = self.constant([0, 0, heads, size]), self.constant([0, 0, width])
        q, k, v = (
            self.node("Reshape", self.node("MatMul", source, self.weight(k, width)), split)
            for source, k in ((x, width), (context, context_width), (context, context_width))
        )
        q, v = (self.node("Transpose", name, perm=(0, 2, 1, 3)) for name in (q, v))
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=(0, 2, 3, 1)))
        scores = self.node("Mul", scores, self.constant(size**-0.5, np.float32))
        y = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        y = self.node("Reshape", self.node("Transpose", y, perm=(0, 2, 1, 3)), joined)
        return self.linear(y, width, width)

    def layer_norm(self, x: str, width: int) -> str:
        scale = self.weight(width), self.weight(width)
        return str(self.node("LayerNormalization", x, *scale, axis=-1))

    def transformer(self, x: str, channels: int, text: str, text_width: int) -> str:
        """Self and cross attention and a gated feed-forward over the pixels (B, H W, C)."""
        shape = self.node("Shape", x)
        y = self.conv(self.norm(x, channels), channels, channels, 1)
        y = self.node("Transpose", y, perm=(0, 2, 3, 1))
        y = self.node("Reshape", y, self.constant([0, -1, channels]))
        h = self.layer_norm(y, channels)
        y = self.node("Add", self.attention(h, h, channels, channels, 8), y)
        h = self.layer_norm(y, channels)
        y = self.node("Add", self.attention(h, text, channels, text_width, 8), y)
        h = self.linear(self.layer_norm(y, channels), channels, 8 * channels)
        value, gate = self.node("Split", h, outputs=2, axis=-1, num_outputs=2)
        h = self.node("Mul", value, self.node("Gelu", gate))
        y = self.node("Add", self.linear(h, 4 * channels, channels), y)
        y = self.node("Reshape", self.node("Transpose", y, perm=(0, 2, 1)), shape)
        return str(self.node("Add", self.conv(y, channels, channels, 1), x))

    def upsample(self, x: str, channels: int) -> str:
        scales = self.constant([1, 1, 2, 2], np.float32)
        y = self.node("Resize", x, "", scales, mode="nearest")
        return self.conv(y, channels, channels)


def unet(latent: int = 64, text: int = 77, text_width: int = 768) -> tuple[Graph, dict[str, Array]]:
    """(sample, time embedding, text) -> noise, and the graph's constants."""
    b, widths = Builder(), CHANNELS
    skips = [(b.conv("sample", 4, widths[0]), widths[0])]
    x, channels = skips[0]
    for level, out in enumerate(widths):
        for _ in range(2):
            x = b.resnet(x, channels, out, "time")
            x = b.transformer(x, out, "text", text_width) if level < 3 else x
            channels = out
            skips.append((x, out))
        if level < 3:
            x = b.conv(x, out, out, stride=2)
            skips.append((x, out))
    x = b.resnet(b.transformer(b.resnet(x, channels, channels, "time"), channels, "text",
                               text_width), channels, channels, "time")  # fmt: skip
    for level, out in reversed(list(enumerate(widths))):
        for _ in range(3):
            skip, more = skips.pop()
            x = b.resnet(b.node("Concat", x, skip, axis=1), channels + more, out, "time")
            x = b.transformer(x, out, "text", text_width) if level < 3 else x
            channels = out
        x = b.upsample(x, out) if level else x
    x = b.conv(b.silu(b.norm(x, channels)), channels, 4)
    inputs = (
        Value("sample", "float32", ("batch", 4, "height", "width")),
        Value("time", "float32", ("batch", 4 * widths[0])),
        Value("text", "float32", ("batch", text, text_width)),
    )
    assert latent % 8 == 0
    return b.graph(inputs, x), b.constants


def vae_decoder() -> tuple[Graph, dict[str, Array]]:
    """latent (B, 4, H, W) -> pixels (B, 3, 8 H, 8 W), and the graph's constants."""
    b, channels = Builder(), 512
    x = b.conv(b.conv("latent", 4, 4, 1), 4, channels)
    x = b.resnet(x, channels, channels)
    shape = b.node("Shape", x)
    rows = b.node("Reshape", b.norm(x, channels), b.constant([0, channels, -1]))
    rows = b.node("Transpose", rows, perm=(0, 2, 1))
    rows = b.attention(rows, rows, channels, channels, 1)
    y = b.node("Reshape", b.node("Transpose", rows, perm=(0, 2, 1)), shape)
    x = b.resnet(b.node("Add", y, x), channels, channels)
    for level, out in enumerate((512, 512, 256, 128)):
        for _ in range(3):
            x = b.resnet(x, channels, out)
            channels = out
        x = b.upsample(x, out) if level < 3 else x
    x = b.conv(b.silu(b.norm(x, channels)), channels, 3)
    inputs = (Value("latent", "float32", ("batch", 4, "height", "width")),)
    return b.graph(inputs, x), b.constants
