"""Element types for OnnxStream's text, which names them for weights only.

Each operator's schema says which of its inputs and outputs share a type, and which types are
allowed: tensors are joined into classes (union-find), and one known member types its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from ..graph import DTYPES, Node, WeightRef

_ONNX_NAMES = {"float32": "float", "float64": "double"}
_DTYPES = {f"tensor({_ONNX_NAMES.get(name, name)})": name for name in DTYPES.values()}
_UNIVERSE = frozenset(("tensor(float)", "tensor(int64)", "tensor(bool)"))  # OnnxStream's types
_INTEGER_INPUTS = ("_ids", "_mask")

_Key = str | tuple[int, str]
"""A tensor's name, or the number of a node and the name of a type variable in its schema."""


def infer(nodes: Sequence[Node], weights: Mapping[str, WeightRef], version: int) -> Types:
    """The element types of all tensors of the graph `nodes`, of opset `version`."""
    types = Types()
    # OnnxStream's converter stores an int64 second operand of Mul as float32, so the type of such
    # a weight counts only when nothing else says what is multiplied.
    doubtful = {n.inputs[1] for n in nodes if n.op_type == "Mul"}
    for name, ref in weights.items():
        if name not in doubtful or ref.dtype != "float32":
            types.set(name, ref.dtype)
    for index, node in enumerate(nodes):
        _relate(types, index, node, version)
    for name in doubtful & weights.keys():
        types.set(name, weights[name].dtype)
    return types


class Types:
    """Classes of tensors of one element type."""

    def __init__(self) -> None:
        self._parent: dict[_Key, _Key] = {}
        self._dtype: dict[_Key, str] = {}

    def root(self, key: _Key) -> _Key:
        """The representative of `key`'s class."""
        while (parent := self._parent.get(key)) is not None:
            self._parent[key] = self._parent.get(parent, parent)
            key = parent
        return key

    def set(self, key: _Key, dtype: str) -> None:
        """Say that `key` is of `dtype`, unless its class has a type already."""
        self._dtype.setdefault(self.root(key), dtype)

    def join(self, a: _Key, b: _Key) -> None:
        """Say that `a` and `b` are of one type."""
        a, b = self.root(a), self.root(b)
        if a != b:
            self._parent[a] = b
            if a in self._dtype:
                self._dtype.setdefault(b, self._dtype[a])

    def __getitem__(self, name: str) -> str:
        """The type of `name`; where nothing decides it, its name does (ids and masks: int64)."""
        default = "int64" if name.endswith(_INTEGER_INPUTS) else "float32"
        return self._dtype.get(self.root(name), default)


def _relate(types: Types, index: int, node: Node, version: int) -> None:
    schema = onnx.defs.get_schema(node.op_type, version, "")
    for names, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for i, name in enumerate(names):
            if name and formals:
                kind = formals[min(i, len(formals) - 1)].type_str  # the last may be variadic
                types.join(name, (index, kind))
    for constraint in schema.type_constraints:
        allowed = _UNIVERSE.intersection(constraint.allowed_type_strs)
        if len(allowed) == 1:
            types.set((index, constraint.type_param_str), _DTYPES[next(iter(allowed))])
    for formal in (*schema.inputs, *schema.outputs):
        if formal.type_str in _DTYPES:
            types.set((index, formal.type_str), _DTYPES[formal.type_str])
    _relate_attribute(types, node)


def _relate_attribute(types: Types, node: Node) -> None:
    """Operators whose output type is an attribute's."""
    if node.op_type == "Cast":
        types.set(node.outputs[0], DTYPES[node.attributes["to"]])
    if node.op_type == "ConstantOfShape":
        value: Any = node.attributes.get("value")
        types.set(node.outputs[0], "float32" if value is None else str(value.dtype))
