"""The shape and element type of every value of a graph when the sizes of its inputs are given.

What the passes' rules (passes/facts.py) cannot tell, the standard's own shape inference is asked:
it knows every operator of the standard. What both cannot tell stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .errors import UnsupportedError
from .graph import DTYPES, Graph, Node, Value, WeightRef
from .passes.facts import Array, Facts
from .passes.symbols import Poly, Size
from .weight import numpy_dtype

if TYPE_CHECKING:
    import onnx

_NUMBERS = {name: number for number, name in DTYPES.items()}
_MISFITS = (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError)
"""What rules raise when a graph's shapes contradict each other at the given sizes."""


def symbol_of(value: Value, axis: int) -> str | None:
    """The name of an input's size that is not fixed, its own or else "input.axis"; None when it is
    a number."""
    dim = (value.shape or ())[axis]
    if isinstance(dim, int) and dim > 0:
        return None
    return dim if isinstance(dim, str) else f"{value.name}.{axis}"


class Shapes(Facts):
    """What is known of every value at `sizes`, numbers for the graph's symbols (see `symbol_of`).

    `constants` are the elements of small initializers by name: shapes and axes are among them.
    Nobody asks for the values named in `ignored`.
    """

    def __init__(
        self,
        graph: Graph,
        sizes: Mapping[str, int],
        constants: Mapping[str, Array],
        ignored: Collection[str] = (),
    ) -> None:
        self._bound, self._constants, self._opset = sizes, constants, graph.opset
        self._ignored = {*ignored, ""}
        super().__init__(graph, _unread)

    def value(self, name: str) -> Array | None:
        """The elements of a small constant or of a shape, or None."""
        if name in self._initializers:
            return self._constants.get(name)
        return self._values.get(name)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value, or None when a size of it is not known, or is none: where a window
        is larger than what it looks at, the standard's inference gives a number below zero."""
        known = self.shape(name)
        if known is None or any(isinstance(size, Poly) or size < 0 for size in known):
            return None
        return tuple(int(size) for size in known if not isinstance(size, Poly))

    def nbytes(self, name: str) -> int | None:
        """Bytes of a value as an array, or None when its shape or type is not known."""
        sizes, dtype = self.sizes(name), self.dtype(name)
        if sizes is None or dtype is None:
            return None
        try:
            return math.prod(sizes) * itemsize(dtype)
        except UnsupportedError:  # a sequence, say
            return None

    def _input_size(self, value: Value, axis: int) -> Size:
        name = symbol_of(value, axis)
        known = self._bound.get(name) if name is not None else None
        return super()._input_size(value, axis) if known is None else known

    def _learn(self, node: Node) -> None:
        try:
            super()._learn(node)
        except _MISFITS:
            self._forget(node)
        wanted = [o for o in node.outputs if o not in self._ignored]
        missing = [o for o in wanted if self.nbytes(o) is None]
        if missing:
            self._complete(node, missing)

    def _forget(self, node: Node) -> None:
        for output in node.outputs:
            self._shapes.pop(output, None)
            self._values.pop(output, None)

    def _complete(self, node: Node, missing: list[str]) -> None:
        """Take what the standard's inference says of some outputs."""
        for name, found in _inferred(node, self._opset, self).items():
            if name not in missing:
                continue
            tensor = found.tensor_type
            if tensor.elem_type in DTYPES:
                self._dtypes[name] = DTYPES[tensor.elem_type]
            if tensor.HasField("shape") and self.sizes(name) is None:
                dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
                self._learn_shape(name, dims)


def itemsize(dtype: str) -> int:
    """Bytes of an element in an array; a string is a reference. Raises UnsupportedError."""
    return 8 if dtype == "string" else numpy_dtype(dtype).itemsize


def _unread(ref: WeightRef) -> NoReturn:
    raise AssertionError(f"{ref.name}: constants are given, not read")


def _inferred(node: Node, opset: Mapping[str, int], known: Shapes) -> Mapping[str, onnx.TypeProto]:
    """What onnx infers of a node's outputs, nothing when it knows too little."""
    import onnx

    version = opset.get(node.domain, 1)
    inputs = dict(_input_types(node, known))
    bodies = any(isinstance(value, Graph) for value in node.attributes.values())
    if bodies or len(inputs) < len({i for i in node.inputs if i}):
        return {}
    if not onnx.defs.has(node.op_type, version, node.domain):
        return {}
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    values = {i: known.constant(i) for i in node.inputs if i}
    data = {n: onnx.numpy_helper.from_array(v, n) for n, v in values.items() if v is not None}
    imports = [onnx.helper.make_opsetid(d, v) for d, v in opset.items()]
    try:
        found: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema, _proto(node), inputs, data, opset_imports=imports
        )
    except onnx.shape_inference.InferenceError:
        return {}  # the shapes contradict each other at these sizes
    return found


def _input_types(node: Node, known: Shapes) -> Iterator[tuple[str, onnx.TypeProto]]:
    import onnx

    for name in filter(None, node.inputs):
        dtype, shape = known.dtype(name), known.shape(name)
        if dtype in _NUMBERS:
            sizes = None if shape is None else [None if isinstance(s, Poly) else s for s in shape]
            yield name, onnx.helper.make_tensor_type_proto(_NUMBERS[dtype], sizes)


def _proto(node: Node) -> onnx.NodeProto:
    import onnx

    def convert(value: Any) -> Any:
        return onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value

    attributes = {name: convert(v) for name, v in node.attributes.items() if v != ()}
    return onnx.helper.make_node(
        node.op_type, node.inputs, node.outputs, domain=node.domain or None, **attributes
    )
