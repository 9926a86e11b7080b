"""Small graphs for the tests of the passes, and how to run them in two independent engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from weight_bytes import logical

from onnxstream_nb.formats.onnx import read_bytes, to_model_proto
from onnxstream_nb.graph import Graph, WeightRef

Array = np.ndarray[Any, Any]
Rewrite = Callable[[Graph, Callable[[WeightRef], Array]], Graph]
Step = tuple[Any, ...]
"""(operator, its inputs, its outputs, its attributes); names are separated by blanks."""

_TYPES = {"f": TensorProto.FLOAT, "h": TensorProto.FLOAT16, "i": TensorProto.INT64,
          "b": TensorProto.BOOL}  # fmt: skip


def build(
    steps: Sequence[Step],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: str = "y",
    weights: Mapping[str, Any] | None = None,
    opset: int = 14,
    kinds: Mapping[str, str] | None = None,
) -> Graph:
    """A graph of float inputs and outputs, but for those whose type `kinds` gives by letter."""
    kind = {k: _TYPES[v] for k, v in (kinds or {}).items()}
    nodes = [
        helper.make_node(op, i.split(" ") if i else [], o.split(" "), **(rest[0] if rest else {}))
        for op, i, o, *rest in steps
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, kind.get(n, 1), s) for n, s in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs.split()],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()],
    )
    for o in graph.output:
        o.type.tensor_type.elem_type = kind.get(o.name, 1)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return read_bytes(onnx.shape_inference.infer_shapes(model).SerializeToString())


def operators(graph: Graph) -> Counter[str]:
    return Counter(n.op_type for n in graph.nodes)


def run(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs as onnxruntime computes them, without its own rewrites."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = to_model_proto(graph, logical).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in graph.outputs]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_reference(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs as the standard's reference implementation computes them."""
    model = to_model_proto(graph, logical)
    with np.errstate(all="ignore"):
        results = ReferenceEvaluator(model).run(None, dict(feeds))
    return dict(zip((o.name for o in graph.outputs), results, strict=True))


def assert_close(actual: Mapping[str, Array], expected: Mapping[str, Array], limit: float) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].shape == array.shape
        assert actual[name].dtype == array.dtype
        wide = array.astype(np.float64)
        error = np.abs(actual[name].astype(np.float64) - wide)
        assert error.max(initial=0.0) <= limit * max(np.abs(wide).max(initial=0.0), 1e-30), name


def assert_same_meaning(
    before: Graph, after: Graph, feeds: Mapping[str, Array], limit: float = 1e-5
) -> None:
    """Both are valid, and give the same in onnxruntime; the rewritten one in the reference too."""
    onnx.checker.check_model(to_model_proto(after, logical), full_check=True)
    expected = run(before, feeds)
    assert_close(run(after, feeds), expected, limit)
    assert_close(run_reference(after, feeds), expected, limit)


def rewritten(rewrite: Rewrite, graph: Graph) -> Graph:
    return rewrite(graph, logical)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def number(value: float, dtype: Any = np.float32) -> Any:
    return np.array(value, dtype)


def changed(steps: list[Step], **replacements: Step) -> list[Step]:
    """The steps with those that make the named values replaced."""
    return [replacements.get(step[2], step) for step in steps]
