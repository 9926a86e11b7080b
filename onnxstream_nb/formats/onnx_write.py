"""Write a `Graph` as a valid ONNX model, in memory or as a file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from ..errors import ModelError, UsageError
from ..graph import DTYPES, Graph, Node, Value, WeightRef

Array = np.ndarray[Any, Any]
Read = Callable[[WeightRef], Array]

METADATA_KEY = "onnxstream_nb.metadata"
"""The metadata property that holds, as JSON, the graph's metadata that are no strings."""

_IR_VERSION = 10  # what onnxruntime 1.20 reads; newer operator sets may need more
NUMBERS = {name: number for number, name in DTYPES.items()}
PROTOBUF_LIMIT = 2**31 - 2**20
PAGE = 4096  # external tensors begin on a page, so that they can be mapped


def to_model_proto(graph: Graph, read: Read) -> onnx.ModelProto:
    """`graph` as a ModelProto with its weights inside.

    `read` gives the logical array of a weight: (q - zero_point) * scale and the like are already
    undone, and so is transposition. An encoded weight is therefore written as float32.
    Raises UsageError when the weights are more than a protobuf message can hold (2 GiB).
    """
    total = sum(math.prod(r.shape) * _dtype(r.dtype).itemsize for r in all_weights(graph))
    if total > PROTOBUF_LIMIT:
        raise UsageError(
            f"the weights take {total} bytes, more than the 2 GiB of one protobuf file; "
            "write them with external=True"
        )
    return model_proto(graph, lambda name, ref: _tensor(name, ref, read))


def write(
    graph: Graph,
    path: str | Path,
    *,
    read: Read,
    external: bool = False,
    threshold: int = 1024,
) -> None:
    """Write `graph` to the .onnx file `path`; `read` as for `to_model_proto`.

    With `external`, weights of `threshold` bytes or more go to `path` + ".data", one at a time,
    so that the model may be larger than memory. Files appear only once they are complete.
    """
    path = Path(path)
    if not external:
        model = to_model_proto(graph, read)
        with _replacing(path) as file:
            file.write(model.SerializeToString())
        return
    data_path = path.with_name(path.name + ".data")
    with _replacing(path) as file:
        with _replacing(data_path) as data:
            sink = _ExternalSink(data, data_path.name, threshold, read)
            model = model_proto(graph, sink.tensor)
        file.write(model.SerializeToString())


class _ExternalSink:
    """Appends weights to a data file."""

    def __init__(self, file: BinaryIO, location: str, threshold: int, read: Read) -> None:
        self.file, self.location, self.threshold, self.read = file, location, threshold, read

    def tensor(self, name: str, ref: WeightRef) -> TensorProto:
        """The tensor of `ref`: its bytes appended to the file, or inside when it is small."""
        tensor = _tensor(name, ref, self.read)
        data = tensor.raw_data
        if len(data) < self.threshold:
            return tensor
        offset = -(-self.file.tell() // PAGE) * PAGE
        self.file.seek(offset)
        self.file.write(data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": self.location, "offset": str(offset), "length": str(len(data))}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return tensor


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def all_weights(graph: Graph) -> Iterator[WeightRef]:
    """The initializers of a graph and of the bodies of its nodes."""
    yield from graph.initializers.values()
    for node in graph.nodes:
        for value in node.attributes.values():
            for body in value if isinstance(value, tuple) else (value,):
                if isinstance(body, Graph):
                    yield from all_weights(body)


def model_proto(graph: Graph, tensor: Callable[[str, WeightRef], TensorProto]) -> onnx.ModelProto:
    """`graph` as a ModelProto; `tensor` gives each weight, by the initializer's name."""
    opsets = [helper.make_opsetid(d, v) for d, v in graph.opset.items()]
    needed: int = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    model = helper.make_model(
        _graph(graph, graph.opset, tensor),
        opset_imports=opsets,
        ir_version=max(needed, _IR_VERSION),
        producer_name="onnxstream_nb",
    )
    texts = {k: v for k, v in graph.metadata.items() if isinstance(v, str)}
    others = {k: v for k, v in graph.metadata.items() if k not in texts}
    if others:
        texts[METADATA_KEY] = json.dumps(others)
    helper.set_model_props(model, texts)
    return model


def _graph(
    graph: Graph, opset: Any, tensor: Callable[[str, WeightRef], TensorProto]
) -> onnx.GraphProto:
    return helper.make_graph(
        [_node(n, opset, tensor) for n in graph.nodes],
        graph.name or "graph",
        [_value(v) for v in graph.inputs],
        [_value(v) for v in graph.outputs],
        [tensor(name, ref) for name, ref in graph.initializers.items()],
    )


def _node(
    node: Node, opset: Any, tensor: Callable[[str, WeightRef], TensorProto]
) -> onnx.NodeProto:
    proto = helper.make_node(
        node.op_type, node.inputs, node.outputs, name=node.name, domain=node.domain or None
    )
    kinds = _attribute_kinds(node.op_type, node.domain, opset.get(node.domain, 1))

    def convert(value: Any) -> Any:
        if isinstance(value, Graph):
            return _graph(value, opset, tensor)
        return numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value

    for name, value in node.attributes.items():
        kind = kinds.get(name)
        if kind == AttributeProto.TYPE_PROTO:
            converted: Any = onnx.TypeProto.FromString(value)
        else:
            converted = [convert(v) for v in value] if isinstance(value, tuple) else convert(value)
        # Only the operator's schema knows what an empty list is a list of.
        empty = (kind or AttributeProto.INTS) if isinstance(value, tuple) and not value else None
        proto.attribute.append(helper.make_attribute(name, converted, attr_type=empty))
    return proto


@lru_cache(maxsize=512)
def _attribute_kinds(op_type: str, domain: str, version: int) -> dict[str, int]:
    """Attribute name -> AttributeProto.AttributeType; nothing for an operator unknown to onnx."""
    if not onnx.defs.has(op_type, domain):
        return {}
    schema = onnx.defs.get_schema(op_type, version, domain)
    return {name: int(cast(Any, a.type).value) for name, a in schema.attributes.items()}


def _value(value: Value) -> onnx.ValueInfoProto:
    if not value.dtype:
        return onnx.ValueInfoProto(name=value.name)
    return helper.make_value_info(value.name, _type(value.dtype, value.shape))


def _type(dtype: str, shape: Any = None) -> onnx.TypeProto:
    nested = re.fullmatch(r"(seq|optional)\((.*)\)", dtype)
    if nested is None:
        return helper.make_tensor_type_proto(NUMBERS[dtype], shape)
    make = {"seq": helper.make_sequence_type_proto, "optional": helper.make_optional_type_proto}
    return make[nested[1]](_type(nested[2]))


def _tensor(name: str, ref: WeightRef, read: Read) -> TensorProto:
    array = read(ref)
    if array.shape != ref.shape or array.dtype != _dtype(ref.dtype):
        raise ModelError(
            f"weight {name!r} was read as {array.dtype} {array.shape}; "
            f"the graph says {ref.dtype} {ref.shape}"
        )
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(ref.shape), name)


def _dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a graph's element type; ml_dtypes has those that numpy lacks."""
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(NUMBERS[name])
    return dtype
