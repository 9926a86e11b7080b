"""Raising a graph to a newer opset, so that a newer operator may stand in it.

Most versions of an operator only widen its types. The others are listed here: how to convert a
node, or that it cannot be. Source: the ONNX operator changelog, opsets 11 to 25.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnxstream_nb.graph import Graph, Node, WeightRef

OLDEST, NEWEST = 11, 25

Constant = tuple[str, tuple[int, ...]]
Converted = tuple[Node, tuple[Constant, ...]]
"""A node, and the int64 vectors it reads that have to become initializers."""
Converter = Callable[[Node], Converted | None]


def _attribute_to_input(attribute: str) -> Converter:
    def convert(node: Node) -> Converted | None:
        attributes = dict(node.attributes)
        listed = attributes.pop(attribute, None)
        if listed is None:
            return replace(node, attributes=attributes), ()
        name = f"{node.outputs[0]}.{attribute}"
        inputs = (node.inputs[0], name)
        return replace(node, inputs=inputs, attributes=attributes), ((name, tuple(listed)),)

    return convert


def _split_evenly(node: Node) -> Converted | None:
    if len(node.inputs) > 1:
        return node, ()
    return _with(node, num_outputs=len(node.outputs)), ()


def _grid_mode(node: Node) -> Converted | None:
    mode = node.attributes.get("mode", "bilinear")
    return _with(node, mode={"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)), ()


def _last_axis_only(node: Node) -> Converted | None:
    """Before opset 13 all axes from `axis` on were one; only for the last is that the same."""
    return (node, ()) if node.attributes.get("axis", 1) == -1 else None


def _inference_only(node: Node) -> Converted | None:
    return (node, ()) if len(node.outputs) == 1 else None


def _output_half_pixel(node: Node) -> Converted | None:
    return _with(node, coordinate_transformation_mode="output_half_pixel"), ()


def _impossible(node: Node) -> Converted | None:
    return None


def _with(node: Node, **attributes: Any) -> Node:
    return replace(node, attributes={**node.attributes, **attributes})


_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSumSquare",
)  # fmt: skip

CONVERTERS: Mapping[tuple[str, int], Converter] = {
    **{(name, 18): _attribute_to_input("axes") for name in _REDUCTIONS},
    **{(name, 13): _attribute_to_input("axes") for name in ("ReduceSum", "Squeeze", "Unsqueeze")},
    **{(name, 13): _last_axis_only for name in ("Softmax", "LogSoftmax", "Hardmax")},
    ("Split", 13): _attribute_to_input("split"), ("Split", 18): _split_evenly,
    ("GridSample", 20): _grid_mode, ("BatchNormalization", 14): _inference_only,
    ("RoiAlign", 16): _output_half_pixel, ("Dropout", 12): _impossible, ("DFT", 20): _impossible,
    ("GroupNormalization", 21): _impossible,
}  # fmt: skip
"""(operator, opset that changed it) -> how an older node is written from then on."""

_CHANGES: dict[str, list[int]] = {}
for _name, _version in sorted(CONVERTERS):
    _CHANGES.setdefault(_name, []).append(_version)


def raise_opset(graph: Graph, version: int) -> Graph | None:
    """The same graph at `version` or above; None when one of its nodes cannot be converted."""
    current = graph.opset.get("", version)
    if current >= version:
        return graph
    if current < OLDEST or version > NEWEST:
        return None
    return _raised(graph, current, version)


def _raised(graph: Graph, current: int, version: int) -> Graph | None:
    nodes: list[Node] = []
    added: dict[str, WeightRef] = {}
    for node in graph.nodes:
        converted = _converted(node, current, version, added)
        if converted is None:
            return None
        nodes.append(converted)
    return graph.with_(
        nodes=tuple(nodes),
        initializers={**graph.initializers, **added},
        opset={**graph.opset, "": version},
    )


def _converted(node: Node, current: int, version: int, added: dict[str, WeightRef]) -> Node | None:
    if node.domain:
        return node
    for change in _CHANGES.get(node.op_type, ()):
        if current < change <= version:
            result = CONVERTERS[node.op_type, change](node)
            if result is None:
                return None
            node, constants = result
            for name, values in constants:
                data = np.array(values, np.int64).tobytes()
                added[name] = WeightRef(name, (len(values),), "int64", data, 0, len(data))
    bodies: dict[str, Graph] = {}
    for key, value in node.attributes.items():
        if isinstance(value, Graph):
            body = _raised(value, current, version)
            if body is None:
                return None
            bodies[key] = body
    return _with(node, **bodies) if bodies else node
