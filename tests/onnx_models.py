"""Small ONNX models for the tests of the formats, and how to run and refuse them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxstream_nb.errors import ModelError, OnnxstreamError

FLOAT = TensorProto.FLOAT


def run(model: onnx.ModelProto | Path, feeds: Mapping[str, Any]) -> dict[str, Any]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def value(name: str, dtype: int = FLOAT, shape: Any = ("n",)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def make(
    nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, weights: Any = (), **options: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    options = {"opset_imports": [helper.make_opsetid("", 21)], "ir_version": 10, **options}
    return helper.make_model(graph, **options)


def adding(weight: TensorProto, **options: Any) -> onnx.ModelProto:
    """y = x + weight."""
    node = helper.make_node("Add", ["x", weight.name], ["y"])
    return make([node], [value("x")], [value("y")], [weight], **options)


def ramp(n: int = 600, name: str = "w") -> TensorProto:
    """A weight large enough to be cut out of the model."""
    return numpy_helper.from_array(np.arange(n, dtype=np.float32), name)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def refusal(call: Callable[[], Any], kind: type[OnnxstreamError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def summing(extra: str = "", over: str = "present.0.key") -> tuple[onnx.ModelProto, Any, Any]:
    """A model with a past and no Attention: logits = (x + the sum of all x so far) W, or with
    `over` "new" of the x of this run; its table and W. An `extra` input changes nothing."""
    rng = np.random.default_rng(0)
    table, w = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4), (4, 9)))
    constants = {"table": table, "W": w, "one": np.array([1]), "one_two": np.array([1, 2])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["new"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", [over, "one_two"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["both"]),
        helper.make_node("MatMul", ["both", "W"], ["logits"]),
    ]
    inputs = [value("input_ids", TensorProto.INT64, (1, "t")),
              value("past_key_values.0.key", shape=(1, 1, "past", 4))]  # fmt: skip
    if extra:
        inputs.append(value(extra, shape=(1,)))
        nodes.append(helper.make_node("Add", ["logits", extra], ["unread"]))
    proto = make(
        nodes, inputs,
        [value("logits", shape=(1, "t", 9)), value("present.0.key", shape=(1, 1, "all", 4))],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )  # fmt: skip
    return proto, table, w
