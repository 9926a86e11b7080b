"""What can be said about every value of a graph before it runs: type, shape, small contents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxstream_nb.graph import DTYPES, Graph, Node, Value, WeightRef
from onnxstream_nb.passes.evaluate import EVALUATORS, LIMIT, evaluate, is_symbolic
from onnxstream_nb.passes.shape_rules import RULES, Partial, Shape
from onnxstream_nb.passes.symbols import Poly, Size, symbol

Array = npt.NDArray[Any]
Read = Callable[[WeightRef], Array]

_SECOND = {"Where": 1}
_BOOLEAN = (
    "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not",
    "IsNaN", "IsInf",
)  # fmt: skip
_INTEGER = (
    "Shape", "Size", "ArgMax", "ArgMin", "NonZero",
)  # fmt: skip
_KEEPS_TYPE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf",
    "Sigmoid", "Tanh", "Relu", "Cos", "Sin", "Softmax", "MatMul", "Gemm", "Transpose", "Reshape",
    "Unsqueeze", "Squeeze", "Concat", "Gather", "GatherElements", "GatherND", "Slice", "Expand",
    "Range", "Flatten", "Identity", "Dropout", "Split", "ReduceMean", "ReduceSum", "ReduceMax",
    "ReduceMin", "ReduceProd", "Where", "Max", "Min", "Clip", "CumSum", "Trilu", "Tile", "Conv",
    "LayerNormalization", "RotaryEmbedding", "Attention", "Gelu", "Swish", "ScatterND",
    "ScatterElements", "LogSoftmax", "LeakyRelu", "ConvTranspose", "InstanceNormalization",
    "BatchNormalization", "GroupNormalization", "Resize", "Pad", "MaxPool", "AveragePool",
    "GlobalAveragePool", "HardSigmoid", "HardSwish", "Elu", "Softplus", "Floor", "Ceil", "Round",
    "Sign", "Mod",
)  # fmt: skip


class Facts:
    """Types, shapes and small values, found in one sweep over the nodes in order.

    A size with a name in the graph's inputs is that symbol; any other unknown size is a symbol of
    its own. Nothing is known about the values of nodes outside the tables.
    """

    def __init__(self, graph: Graph, read: Read) -> None:
        self._read = read
        self._initializers = graph.initializers
        self._shapes: dict[str, Shape] = {}
        self._dtypes: dict[str, str] = {}
        self._values: dict[str, Array | None] = {}
        for value in graph.inputs:
            self._dtypes[value.name] = value.dtype
            if value.shape is not None:
                axes = range(len(value.shape))
                self._shapes[value.name] = tuple(self._input_size(value, i) for i in axes)
        for node in graph.nodes:
            self._learn(node)

    def _input_size(self, value: Value, axis: int) -> Size:
        dim = (value.shape or ())[axis]
        if isinstance(dim, str):
            return symbol(dim)
        return symbol(f"{value.name}.{axis}") if dim is None or dim <= 0 else dim

    def shape(self, name: str) -> Shape | None:
        """The shape of a value, or None when not even its rank is known."""
        ref = self._initializers.get(name)
        return self._shapes.get(name) if ref is None else ref.shape

    def dtype(self, name: str) -> str | None:
        """The element type of a value, or None when it is not known."""
        ref = self._initializers.get(name)
        return self._dtypes.get(name) if ref is None else ref.dtype

    def value(self, name: str) -> Array | None:
        """The elements of a small constant or of a shape; object elements hold symbols."""
        if name not in self._values and name in self._initializers:
            self._values[name] = self._constant(self._initializers[name])
        return self._values.get(name)

    def constant(self, name: str) -> Array | None:
        """The elements of a small value all of whose elements are known."""
        value = self.value(name)
        return None if value is None or is_symbolic(value) else value

    def _constant(self, ref: WeightRef) -> Array | None:
        if int(np.prod(ref.shape)) > LIMIT or ref.dtype == "string":
            return None
        return np.asarray(self._read(ref))

    def _learn(self, node: Node) -> None:
        if node.domain or not node.outputs:
            return
        self._learn_dtype(node)
        output = node.outputs[0]
        value = self._evaluated(node)
        if value is not None:
            self._values[output] = value
            self._shapes[output] = value.shape
        elif node.op_type == "Split":
            self._learn_split(node)
        elif rule := RULES.get(node.op_type):
            self._learn_shape(output, rule(self, node))

    def _learn_shape(self, name: str, sizes: Partial | None) -> None:
        if sizes is not None and name:
            self._shapes[name] = tuple(
                symbol(f"{name}.{i}") if s is None else s for i, s in enumerate(sizes)
            )

    def _learn_split(self, node: Node) -> None:
        x = self.shape(node.inputs[0])
        if x is None:
            return
        axis = node.attributes.get("axis", 0) % len(x)
        parts = node.attributes.get("split")
        if parts is None and len(node.inputs) > 1:
            parts = self.value(node.inputs[1])
        if parts is None and isinstance(x[axis], int):
            size, count = int(x[axis]), len(node.outputs)
            parts = [size // count] * count if size % count == 0 else None
        for i, output in enumerate(node.outputs):
            part: Size | None = None if parts is None else parts[i]
            part = part if part is None or isinstance(part, Poly) else int(part)
            self._learn_shape(output, [*x[:axis], part, *x[axis + 1 :]])

    def _learn_dtype(self, node: Node) -> None:
        op = node.op_type
        dtype: str | None = None
        if op == "Cast":
            dtype = DTYPES[node.attributes["to"]]
        elif op in _BOOLEAN:
            dtype = "bool"
        elif op in _INTEGER:
            dtype = "int64"
        elif op == "ConstantOfShape":
            dtype = str(np.asarray(node.attributes.get("value", np.zeros(1, np.float32))).dtype)
        elif op == "RMSNormalization":
            dtype = self.dtype(node.inputs[1])
        elif op in _KEEPS_TYPE:
            dtype = self.dtype(node.inputs[_SECOND.get(op, 0)])
        if dtype is not None:
            typed = node.outputs if op in ("Split", "Attention") else node.outputs[:1]
            self._dtypes.update((o, dtype) for o in typed if o)

    def _evaluated(self, node: Node) -> Array | None:
        if node.op_type == "Shape":
            shape = self.shape(node.inputs[0])
            if shape is None:
                return None
            window = shape[node.attributes.get("start", 0) : node.attributes.get("end", len(shape))]
            return _vector(window)
        if node.op_type not in EVALUATORS or not all(map(self._knowable, node.inputs)):
            return None
        args = [self.value(i) if i else None for i in node.inputs]
        if any(a is None and i for a, i in zip(args, node.inputs, strict=True)):
            return None
        return evaluate(node, args)

    def _knowable(self, name: str) -> bool:
        """Whether the value may be known, so that no weight is read for a node that isn't."""
        return not name or name in self._initializers or self._values.get(name) is not None


def _vector(sizes: Shape) -> Array:
    symbolic = any(isinstance(s, Poly) for s in sizes)
    return np.array(sizes, object if symbolic else np.int64)
