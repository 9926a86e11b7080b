"""Shapes and types at given sizes, against what onnxruntime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import run
from pass_graphs import Step, build, number
from weight_bytes import logical

from onnxstream_nb.formats.onnx import to_model_proto
from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.shapes import Shapes, itemsize, symbol_of

Array = np.ndarray[Any, Any]
i64 = lambda *values: np.array(values, np.int64)  # noqa: E731


def shapes_of(graph: Graph, **sizes: int) -> Shapes:
    constants = {name: logical(ref) for name, ref in graph.initializers.items()}
    return Shapes(graph, sizes, constants)


def measured(graph: Graph, feeds: dict[str, Array]) -> dict[str, Array]:
    """Every value of the graph, by onnxruntime."""
    model = to_model_proto(graph, logical)
    del model.graph.output[:]
    names = [name for node in graph.nodes for name in node.outputs if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return run(model, feeds)


CONVOLUTIONS: list[Step] = [
    ("Conv", "x w", "c", {"pads": (1, 1, 1, 1), "strides": (2, 2)}),
    ("Shape", "c", "s"),
    ("Reshape", "c groups", "g"),
    ("InstanceNormalization", "g one one", "i"),
    ("Reshape", "i s", "n"),
    ("Resize", "n  scales", "r", {"mode": "nearest"}),
    ("MaxPool", "r", "m p", {"kernel_shape": (3, 3), "ceil_mode": 1}),
    ("Pad", "m pads", "d"),
    ("ConvTranspose", "c w", "t", {"strides": (2, 2)}),
    ("GlobalAveragePool", "t", "a"),
    ("Split", "c halves", "u v", {"axis": 1}),
    ("TopK", "u k", "tv ti"),
    ("Einsum", "u v", "e", {"equation": "bchw,bdhw->bcd"}),
    ("ArgMax", "e", "am", {"axis": 1, "keepdims": 0}),
    ("Concat", "m m", "y", {"axis": 0}),
]
WEIGHTS = {
    "w": np.ones((4, 4, 3, 3), np.float32), "one": np.ones(2, np.float32), "groups": i64(0, 2, -1),
    "scales": np.array([1, 1, 1.5, 2], np.float32), "pads": i64(0, 0, 1, 2, 0, 0, 3, 4),
    "halves": i64(1, 3), "k": i64(2),
}  # fmt: skip


@pytest.mark.parametrize(("batch", "height"), [(1, 16), (3, 21)])
def test_operators_that_no_rule_knows(batch: int, height: int) -> None:
    """Convolutions, pooling, resizing: the standard's own inference says it."""
    shape = {"x": ("b", 4, "h", 18)}
    graph = build(CONVOLUTIONS, shape, weights=WEIGHTS, opset=18)
    known = shapes_of(graph, b=batch, h=height)
    found = measured(graph, {"x": np.ones((batch, 4, height, 18), np.float32)})
    assert found
    for name, array in found.items():
        assert known.sizes(name) == array.shape, name
        assert known.dtype(name) == str(array.dtype), name
        assert known.nbytes(name) == array.nbytes, name


def test_sizes_that_are_computed_in_the_graph() -> None:
    """A causal mask as exports make it, with nothing read before."""
    steps: list[Step] = [
        ("Shape", "x", "s"), ("Gather", "s one", "t", {"axis": 0}),
        ("Shape", "past", "ps"), ("Gather", "ps two", "p", {"axis": 0}),
        ("Add", "t p", "total"), ("Range", "p total step", "rows"),
        ("Range", "zero total step", "columns"), ("Unsqueeze", "rows ax", "column"),
        ("LessOrEqual", "columns column", "y"),
    ]  # fmt: skip
    weights = {"one": number(1, np.int64), "two": number(2, np.int64), "ax": i64(1),
               "zero": number(0, np.int64), "step": number(1, np.int64)}  # fmt: skip
    shapes = {"x": (1, "t", 8), "past": (1, 2, "p", 8)}
    graph = build(steps, shapes, weights=weights, kinds={"y": "b"})
    for t, p in ((7, 0), (5, 9), (1, 300)):
        known = shapes_of(graph, t=t, p=p)
        feeds = {"x": np.ones((1, t, 8), np.float32), "past": np.ones((1, 2, p, 8), np.float32)}
        for name, array in measured(graph, feeds).items():
            assert (known.sizes(name), known.dtype(name)) == (array.shape, str(array.dtype)), name


def test_what_depends_on_elements_stays_unknown() -> None:
    steps: list[Step] = [("NonZero", "x", "n"), ("Cast", "n", "y", {"to": 1}), ("Exp", "x", "z")]
    known = shapes_of(build(steps, {"x": ("n", 3)}, "y z"), n=4)
    assert (known.sizes("n"), known.dtype("n")) == (None, "int64")
    assert known.sizes("y") is None and known.nbytes("y") is None
    assert known.nbytes("z") == 4 * 4 * 3


def test_operators_that_nobody_knows() -> None:
    x = Value("x", "float32", (2, 3))
    nodes = (
        Node("Frobnicate", ("x",), ("f",), domain="com.example"),
        Node("Frobnicate", ("x",), ("g",)),
        Node("If", ("c",), ("h",), {"then_branch": Graph((), (), (), {}, {})}),
        Node("Add", ("x", "f"), ("y",)),
    )
    known = shapes_of(Graph(nodes, (x,), (), {}, {"": 18}))
    assert [known.sizes(name) for name in "fghy"] == [None] * 4
    assert known.sizes("x") == (2, 3) and known.sizes("missing") is None


def test_shapes_that_contradict_each_other_are_unknown() -> None:
    """Neither a rule nor the standard's inference takes these; what follows is unknown, too."""
    steps: list[Step] = [("Reshape", "x s", "r"), ("Exp", "r", "y")]
    graph = build(steps, {"x": (1, "c", 5, 5)}, weights={"s": i64(4, -1)})
    assert shapes_of(graph, c=3).sizes("y") is None
    assert shapes_of(graph, c=4).sizes("y") == (4, 25)
    x = Value("x", "float32", (1, 3, 5, 5))
    scales = build([("Exp", "x", "y")], {"x": (1,)}, weights={"s": np.ones(3, np.float32)})
    resize = Node("Resize", ("x", "", "s"), ("y",))  # three scales of four axes
    graph = Graph((resize,), (x,), (), scales.initializers, {"": 18})
    assert shapes_of(graph).sizes("y") is None


def test_names_of_open_sizes() -> None:
    x = Value("x", "float32", ("n", None, 3, 0))
    assert [symbol_of(x, axis) for axis in range(4)] == ["n", "x.1", None, "x.3"]
    graph = Graph((Node("Exp", ("x",), ("y",)),), (x,), (), {}, {"": 18})
    assert shapes_of(graph, n=2).sizes("y") is None
    assert shapes_of(graph, **{"n": 2, "x.1": 5, "x.3": 0}).sizes("y") == (2, 5, 3, 0)


def test_bytes_of_an_element() -> None:
    wanted = {"float32": 4, "bfloat16": 2, "bool": 1, "int64": 8, "string": 8, "float8e5m2": 1}
    assert {dtype: itemsize(dtype) for dtype in wanted} == wanted
