"""Small models to quantise in 8 bits, and what their outputs are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx_models import make, value

from onnxstream_nb import formats
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.formats.onnx_write import to_model_proto
from onnxstream_nb.session import Session

Array = np.ndarray[Any, Any]
Node = helper.make_node


def silent(text: str, fraction: float | None) -> None:
    """A report that nobody reads."""


def weight(rng: Any, name: str, *shape: int, spread: float = 1.0) -> onnx.TensorProto:
    """Of deviation 1 / sqrt(fan-in), its outputs of sizes up to `spread` times each other."""
    floats = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
    sizes = spread ** rng.uniform(0, 1, shape[:1]).reshape(-1, *(1,) * (len(shape) - 1))
    return numpy_helper.from_array((floats * sizes).astype(np.float32), name)


def conv_net(seed: int = 0, opset: int = 13) -> onnx.ModelProto:
    """x (n, 3, 16, 16) -> y (n, 10): strides, batch normalization, a depthwise convolution,
    dilations, groups, a residual, Gemm with a transposed weight and MatMul."""
    rng = np.random.default_rng(seed)
    variance = numpy_helper.from_array(rng.uniform(0.5, 2, 16).astype("f4"), "variance")
    nodes = [
        Node("Conv", ["x", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1], strides=[2, 2]),
        Node("BatchNormalization", ["c1", "gain", "shift", "mean", "variance"], ["n1"]),
        Node("Relu", ["n1"], ["r1"], "relu"),
        Node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", group=16, pads=[1, 1, 1, 1]),
        Node("Clip", ["c2", "zero", "six"], ["r2"], "clip"),
        Node(
            "Conv", ["r2", "w3", "b3"], ["c3"], "grouped", group=2, pads=[2] * 4, dilations=[2, 2]
        ),
        Node("Add", ["c3", "r1"], ["a"], "residual"),
        Node("MaxPool", ["a"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        Node("Flatten", ["p"], ["f"], "flat"),
        Node("Gemm", ["f", "w4", "b4"], ["g"], "gemm", transB=1),
        Node("LeakyRelu", ["g"], ["t"], "leaky"),
        Node("MatMul", ["t", "w5"], ["y"], "last"),
    ]  # fmt: skip
    weights = [
        weight(rng, "w1", 16, 3, 3, 3, spread=20), weight(rng, "b1", 16), variance,
        weight(rng, "gain", 16), weight(rng, "shift", 16), weight(rng, "mean", 16),
        weight(rng, "w2", 16, 1, 3, 3, spread=10), weight(rng, "b2", 16),
        weight(rng, "w3", 16, 8, 3, 3, spread=10), weight(rng, "b3", 16),
        weight(rng, "w4", 40, 256, spread=10), weight(rng, "b4", 40), weight(rng, "w5", 40, 10),
        *(numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0), ("six", 6))),
    ]  # fmt: skip
    return make(
        nodes, [value("x", shape=("n", 3, 16, 16))], [value("y", shape=("n", 10))], weights,
        opset_imports=[helper.make_opsetid("", opset)], ir_version=8,
    )  # fmt: skip


def images(count: int, seed: int = 0) -> Array:
    """Smooth ones of different brightness, (count, 3, 16, 16)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, 3, 18, 18)).cumsum(-1).cumsum(-2)[..., 2:, 2:]
    found: Array = (noise / 8 + rng.uniform(-1, 1, (count, 1, 1, 1))).astype(np.float32)
    return found


def draft_of(model: onnx.ModelProto) -> Draft:
    return Draft(formats.load_bytes(model.SerializeToString()))


def saved_feeds(folder: Path, arrays: Mapping[str, Array]) -> Path:
    """One .npz for each entry of the first axis."""
    folder.mkdir(exist_ok=True)
    for i in range(len(next(iter(arrays.values())))):
        np.savez(folder / f"{i:03}.npz", **{name: a[i : i + 1] for name, a in arrays.items()})
    return folder


def written(draft: Draft) -> onnx.ModelProto:
    """The draft as a model that the standard's checker accepts."""
    model = to_model_proto(draft.graph, draft.read)
    onnx.checker.check_model(model, full_check=True)
    return model


def ours(model: onnx.ModelProto, feeds: Mapping[str, Any], **options: Any) -> Array:
    with Session(model, threads=1, **options) as session:
        result: Array = next(iter(session.run(feeds).values()))
    return result


def theirs(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> Array:
    """onnxruntime's first output, its operators as the graph has them."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(None, dict(feeds))[0]
    return result


def snr(wanted: Array, found: Array) -> float:
    """The signal over the error, in dB."""
    error = np.square(found.astype(float) - wanted).sum()
    return float(10 * np.log10(np.square(wanted.astype(float)).sum() / max(error, 1e-300)))
