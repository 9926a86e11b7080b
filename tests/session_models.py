"""A chain of matrix products for the tests of the executor, and its comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx_models import make, value

from onnxstream_nb.graph import Graph, Node, Value

Array = np.ndarray[Any, Any]
LOADS = ("stream", "mmap", "ram")
DOMAIN = "tests.session"


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def deep(layers: int = 3, width: int = 131, seed: int = 0) -> onnx.ModelProto:
    """y = relu(relu(x W0 + b0) W1 + b1) ..., the matrices too large to be constants."""
    nodes, weights, name = [], [], "x"
    for i in range(layers):
        rows, columns = (width, 2 * width - 5) if i % 2 == 0 else (2 * width - 5, width)
        w = random(seed + 2 * i, rows, columns) / np.float32(rows**0.5)
        weights += [numpy_helper.from_array(w, f"W{i}")]
        weights += [numpy_helper.from_array(random(seed + 2 * i + 1, columns), f"b{i}")]
        nodes += [helper.make_node("MatMul", [name, f"W{i}"], [f"p{i}"])]
        nodes += [helper.make_node("Add", [f"p{i}", f"b{i}"], [f"s{i}"])]
        nodes += [helper.make_node("Relu", [f"s{i}"], [f"y{i}"], name=f"relu {i}")]
        name = f"y{i}"
    return make(nodes, [value("x", shape=("n", width))], [value(name, shape=("n", "m"))], weights)


def close_to(got: Array, wanted: Array) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert np.abs(got - wanted).max(initial=0) <= 1e-5 * max(1e-3, np.abs(wanted).max(initial=0))


def graph_of(*nodes: Node, outputs: tuple[str, ...] = ("y",), opset: int = 21) -> Graph:
    """x -> the nodes -> outputs, of the standard's and other domains."""
    return Graph(
        nodes, (Value("x", "float32", None),), tuple(Value(o, "float32", None) for o in outputs),
        {}, {"": opset, "com.acme": 1, DOMAIN: 1},
    )  # fmt: skip
