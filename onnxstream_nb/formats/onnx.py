"""ONNX files: read into a `Graph` without their weights' bytes, and written out again.

Constant nodes become initializers (only those of strings, which have no fixed size, stay nodes).
Initializers are constants here: one that is listed as a graph input too (always so in models of
IR version 3, an overridable default later) is dropped from the inputs. Model-local functions are
inlined.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, numpy_helper

from ..errors import ModelError, UnsupportedError
from ..graph import Graph, Node, Value, WeightRef
from .onnx_tensors import Tensors
from .onnx_write import METADATA_KEY, to_model_proto, write
from .protobuf import strip_raw_data

__all__ = ["read", "read_bytes", "to_model_proto", "write"]

_CONSTANT_LISTS = {
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64,
    "value_ints": np.int64, "value_string": object, "value_strings": object,
}  # fmt: skip


def read(path: str | Path) -> Graph:
    """Read the .onnx file at `path`; its weights stay where they are, embedded or external."""
    path = Path(path).absolute()
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        return _Reader(str(path), file, path.stat().st_size, path).read()


def read_bytes(data: bytes) -> Graph:
    """Read a serialized ModelProto; its weights refer into `data`, which is not copied."""
    return _Reader("the model's bytes", io.BytesIO(data), len(data), data).read()


class _Reader:
    """One model on its way from protobuf to `Graph`; `source` is what embedded weights refer to."""

    def __init__(self, name: str, file: BinaryIO, size: int, source: Path | bytes) -> None:
        self.name, self.file, self.size = name, file, size
        self.tensors = Tensors(name, source, size)
        self.opset: dict[str, int] = {}

    def read(self) -> Graph:
        """The whole model."""
        model = self.parse()
        self.opset = {_domain(o.domain): o.version for o in model.opset_import}
        if not self.opset and model.ir_version < 3:
            self.opset = {"": 1}
        if not self.opset:
            raise ModelError(f"{self.name}: the model imports no operator set")
        metadata: dict[str, Any] = {p.key: p.value for p in model.metadata_props}
        metadata |= self.own_metadata(metadata.pop(METADATA_KEY, "{}"))
        return self.graph(model.graph, frozenset()).with_(metadata=metadata)

    def parse(self) -> onnx.ModelProto:
        """The model without large weights, its functions inlined."""
        if not self.size:
            raise ModelError(f"{self.name}: empty; fetch or export the model again")
        try:
            model = onnx.ModelProto.FromString(strip_raw_data(self.file, self.size, self.name))
        except DecodeError as e:
            raise ModelError(f"{self.name}: not an intact ONNX model ({e})") from e
        if not model.HasField("graph") or not model.graph.output:
            raise ModelError(f"{self.name}: not an ONNX model: it has no graph with outputs")
        return self.inline(model) if model.functions else model

    def inline(self, model: onnx.ModelProto) -> onnx.ModelProto:
        import onnx.inliner

        try:
            return onnx.inliner.inline_local_functions(model)
        except (RuntimeError, DecodeError) as e:
            raise ModelError(f"{self.name}: its functions cannot be inlined: {e}") from e

    def own_metadata(self, text: str) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as e:
            raise ModelError(f"{self.name}: metadata {METADATA_KEY!r} is damaged: {e}") from e

    def graph(self, proto: onnx.GraphProto, outer: frozenset[str]) -> Graph:
        """A graph, or a body whose nodes also see the names in `outer`."""
        if proto.sparse_initializer:
            name = proto.sparse_initializer[0].values.name
            raise UnsupportedError(f"{self.name}: {name!r} is a sparse tensor; make it dense")
        body = _Body(self, outer)
        for tensor in proto.initializer:
            body.constant(tensor.name, tensor)
        inputs = tuple(self.value(v) for v in proto.input if v.name not in body.defined)
        for value in inputs:
            body.define(value.name, "the graph's inputs")
        for node in proto.node:
            body.node(node)
        outputs = tuple(self.value(v) for v in proto.output)
        for value in outputs:
            body.require(value.name, "the graph's outputs")
        return Graph(tuple(body.nodes), inputs, outputs, body.initializers, self.opset, proto.name)

    def value(self, proto: onnx.ValueInfoProto) -> Value:
        """A graph input or output; without a type (allowed in bodies) its dtype is empty."""
        return Value(proto.name, *self.type_(proto.type, proto.name))

    def type_(
        self, proto: onnx.TypeProto, name: str
    ) -> tuple[str, tuple[int | str | None, ...] | None]:
        """(dtype, shape) of a type; a sequence of float32 tensors has dtype "seq(float32)"."""
        kind = proto.WhichOneof("value")
        if kind is None:
            return "", None
        if kind == "tensor_type":
            tensor = proto.tensor_type
            dtype = self.tensors.dtype(tensor.elem_type, name) if tensor.elem_type else ""
            known = tensor.HasField("shape")
            return dtype, tuple(map(_dim, tensor.shape.dim)) if known else None
        if kind == "sequence_type":
            return f"seq({self.type_(proto.sequence_type.elem_type, name)[0]})", None
        if kind == "optional_type":
            return f"optional({self.type_(proto.optional_type.elem_type, name)[0]})", None
        raise UnsupportedError(f"{self.name}: {name!r} is of {kind}, which is not supported")


class _Body:
    """One graph under construction: what is defined so far, in the order of the file."""

    def __init__(self, reader: _Reader, outer: frozenset[str]) -> None:
        self.reader, self.outer = reader, outer
        self.nodes: list[Node] = []
        self.initializers: dict[str, WeightRef] = {}
        self.defined: set[str] = set()

    def define(self, name: str, where: str) -> None:
        if name in self.defined:
            raise ModelError(f"{self.reader.name}: {name!r} is defined twice, again by {where}")
        self.defined.add(name)

    def require(self, name: str, where: str) -> None:
        if name not in self.defined and name not in self.outer:
            raise ModelError(
                f"{self.reader.name}: {where} needs {name!r}, which nothing before it computes"
            )

    def constant(self, name: str, tensor: TensorProto) -> None:
        """An initializer; of strings, a Constant node."""
        self.define(name, "an initializer")
        if tensor.data_type == TensorProto.STRING:
            value = self.reader.tensors.array(tensor, name)
            self.nodes.append(Node("Constant", (), (name,), {"value": value}))
        else:
            self.initializers[name] = self.reader.tensors.weight(tensor, name)

    def node(self, proto: onnx.NodeProto) -> None:
        where = f"node {proto.name or '(unnamed)'!r} ({proto.op_type})"
        domain = _domain(proto.domain)
        if (proto.op_type, domain) == ("Constant", ""):
            self.constant(proto.output[0], self.constant_tensor(proto.attribute, where))
            return
        for name in filter(None, proto.input):
            self.require(name, where)
        attributes = {a.name: self.attribute(a, where) for a in proto.attribute}
        for name in filter(None, proto.output):
            self.define(name, where)
        self.nodes.append(
            Node(
                proto.op_type, tuple(proto.input), tuple(proto.output), attributes, proto.name,
                domain,
            )
        )  # fmt: skip

    def constant_tensor(self, attributes: Iterable[AttributeProto], where: str) -> TensorProto:
        """The value of a Constant node, whichever of its attributes holds it."""
        for attribute in attributes:
            if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
                return attribute.t
            if attribute.name in _CONSTANT_LISTS:
                value = self.attribute(attribute, where)
                return numpy_helper.from_array(np.array(value, _CONSTANT_LISTS[attribute.name]))
        name = ", ".join(a.name for a in attributes) or "no attribute"
        raise UnsupportedError(f"{self.reader.name}: {where} has {name}, not a dense value")

    def attribute(self, proto: AttributeProto, where: str) -> Any:
        """An attribute's value, in the types that `Node` documents."""
        where = f"attribute {proto.name!r} of {where}"
        kind = AttributeProto.AttributeType.Name(proto.type)
        if kind in ("FLOAT", "INT"):
            return proto.f if kind == "FLOAT" else proto.i
        if kind == "STRING":
            return _text(proto.s)
        if kind in ("FLOATS", "INTS"):
            return tuple(proto.floats if kind == "FLOATS" else proto.ints)
        if kind == "STRINGS":
            return tuple(map(_text, proto.strings))
        if kind == "TENSOR":
            return self.reader.tensors.array(proto.t, where)
        if kind == "TENSORS":
            return tuple(self.reader.tensors.array(t, where) for t in proto.tensors)
        if kind == "GRAPH":
            return self.reader.graph(proto.g, self.outer | self.defined)
        if kind == "GRAPHS":
            visible = self.outer | self.defined
            return tuple(self.reader.graph(g, visible) for g in proto.graphs)
        if kind == "TYPE_PROTO":
            return proto.tp.SerializeToString()
        raise UnsupportedError(f"{self.reader.name}: {where} is of type {kind}")


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return dim.dim_value
    return dim.dim_param or None


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
