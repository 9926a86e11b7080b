"""What OnnxStream's text can say: float32, int64 and booleans, and the operators of opset 14."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, helper

from ...errors import UnsupportedError
from ...graph import DTYPES, Graph, Node, Value, WeightRef
from ...passes.upgrade import raise_opset
from ..draft import Draft, Make, placeholder

OPSET = 14

_HALVES = ("float16", "bfloat16")
_FLOAT = 1
_NUMBERS = {name: number for number, name in DTYPES.items()}
_CHANGED = frozenset({"RoiAlign", "GridSample"})
"""Operators of which a newer opset means something else by the same words."""

_KINDS = frozenset({"INT", "FLOAT", "STRING", "INTS", "FLOATS", "TENSOR"})


def widened(graph: Graph) -> Graph:
    """The graph with float32 in the place of float16 and bfloat16; weights stay stored as such."""
    return graph.with_(
        nodes=tuple(_widened_node(n) for n in graph.nodes),
        inputs=tuple(map(_widened_value, graph.inputs)),
        outputs=tuple(map(_widened_value, graph.outputs)),
        initializers={name: _widened_weight(r) for name, r in graph.initializers.items()},
    )


def _widened_value(value: Value) -> Value:
    return replace(value, dtype="float32") if value.dtype in _HALVES else value


def _widened_weight(ref: WeightRef) -> WeightRef:
    return replace(ref, dtype="float32", encoding=ref.dtype) if ref.dtype in _HALVES else ref


def _widened_node(node: Node) -> Node:
    attributes: dict[str, Any] = dict(node.attributes)
    if node.op_type == "Cast" and DTYPES[attributes["to"]] in _HALVES:
        attributes["to"] = _FLOAT
    for name, value in attributes.items():
        if isinstance(value, np.ndarray) and str(value.dtype) in _HALVES:
            attributes[name] = value.astype(np.float32)
    return replace(node, attributes=attributes)


def lowered(graph: Graph) -> Graph:
    """The graph at opset 14, if its nodes can be written so, else an UnsupportedError."""
    current = graph.opset.get("", OPSET)
    if current < OPSET:
        raised = raise_opset(graph, OPSET)
        if raised is None:
            raise UnsupportedError(
                f"{graph.name}: opset {current} cannot be raised to {OPSET}; export it anew"
            )
        return raised
    nodes = tuple(_lowered(node, current) for node in graph.nodes)
    return graph.with_(nodes=nodes, opset={"": OPSET})


def _lowered(node: Node, current: int) -> Node:
    where = f"{node.op_type} {node.name or node.outputs[0]!r}"
    if node.domain or not onnx.defs.has(node.op_type, OPSET, ""):
        raise UnsupportedError(
            f"{where}: no operator of opset {OPSET}, which OnnxStream's text is limited to"
        )
    old, new = (onnx.defs.get_schema(node.op_type, v, "") for v in (OPSET, current))
    if node.op_type in _CHANGED and old.since_version != new.since_version:
        raise UnsupportedError(f"{where}: means something else in opset {OPSET}")
    attributes = {}
    for name, value in node.attributes.items():
        if name in old.attributes:
            _check_kind(value, str(old.attributes[name].type).rpartition(".")[2], where, name)
            attributes[name] = value
        elif value != _default(node.op_type, current, name):
            raise UnsupportedError(f"{where}: opset {OPSET} has no attribute {name!r}")
    inputs = node.inputs
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]
    if len(inputs) > old.max_input:
        raise UnsupportedError(f"{where}: takes {old.max_input} inputs in opset {OPSET}")
    return replace(node, attributes=attributes, inputs=inputs)


def _check_kind(value: Any, kind: str, where: str, name: str) -> None:
    if kind not in _KINDS or (kind == "TENSOR" and np.size(value) != 1):
        raise UnsupportedError(f"{where}: OnnxStream's text cannot hold its attribute {name!r}")


@lru_cache(maxsize=512)
def _default(op_type: str, version: int, name: str) -> Any:
    attribute: AttributeProto = (
        onnx.defs.get_schema(op_type, version, "").attributes[name].default_value
    )
    value = helper.get_attribute_value(attribute) if attribute.name else None
    return value.decode() if isinstance(value, bytes) else value


def storable(draft: Draft) -> Draft:
    """The draft with float32 and int64 initializers only: any other becomes a Cast of one.

    Raises UnsupportedError for elements that float32 or int64 cannot hold.
    """
    made: dict[str, Make] = {}
    casts: list[Node] = []
    initializers: dict[str, WeightRef] = {}
    for name, ref in draft.graph.initializers.items():
        if ref.dtype in ("float32", "int64"):
            initializers[name] = ref
            continue
        stored = f"{name}.{ref.dtype}"
        kind = "float32" if ref.dtype in ("float64", *_HALVES) else "int64"
        initializers[stored] = placeholder(stored, kind, ref.shape)
        made[stored] = _maker(draft, ref, kind)
        casts.append(Node("Cast", (stored,), (name,), {"to": _NUMBERS[ref.dtype]}, stored))
    graph = draft.graph.with_(nodes=(*casts, *draft.graph.nodes), initializers=initializers)
    return draft.with_(graph, made) if casts else draft


def _maker(draft: Draft, ref: WeightRef, dtype: str) -> Make:
    def make() -> Any:
        array = draft.read(ref)
        result = array.astype(dtype)
        if not np.array_equal(result.astype(array.dtype), array, equal_nan=array.dtype.kind == "f"):
            raise UnsupportedError(
                f"{ref.name!r}: OnnxStream's text has no {ref.dtype}, and {dtype} cannot hold it"
            )
        return result

    return make
