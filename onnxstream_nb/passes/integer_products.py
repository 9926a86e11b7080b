"""Products of integers whose result becomes numbers, as products of the numbers they stand for.

DynamicQuantizeLinear(x) -> q, s, z;  Mul(Cast(MatMulInteger(q, W, z, w_zero)), Mul(s, w_scale)) is
the product of DequantizeLinear(q, s, z) and DequantizeLinear(W, w_scale, w_zero): x is rounded as
before. The latter is then one quantised matrix, which is multiplied as it is stored.
"""

from __future__ import annotations

import numpy as np

from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter

_OPSET = 13  # DequantizeLinear along an axis
_FLOAT = 1  # TensorProto.FLOAT


def rewrite(graph: Graph, read: Read) -> Graph:
    """MatMulInteger of constant matrices, scaled to float32, as MatMul."""
    rewriter = Rewriter(graph, read)
    numbers: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type == "Mul" and not node.domain:
            _rewrite(rewriter, node, numbers)
    return rewriter.finish(_OPSET)


def _rewrite(rewriter: Rewriter, node: Node, numbers: dict[str, str]) -> None:
    for value, scale in (node.inputs, node.inputs[::-1]):
        cast = rewriter.made_by(value, "Cast")
        product = rewriter.made_by(cast.inputs[0], "MatMulInteger") if cast else None
        scales = rewriter.made_by(scale, "Mul")
        if cast is None or product is None or scales is None or cast.attributes["to"] != _FLOAT:
            continue
        found = _factors(rewriter, product, scales)
        if found is not None and rewriter.is_private((cast, product, scales, node), node):
            _put(rewriter, node, product, *found, numbers)
            return


def _factors(rewriter: Rewriter, product: Node, scales: Node) -> tuple[str, Node] | None:
    """The scales of the matrix, and the node that quantised the activation."""
    dynamic = rewriter.made_by(product.inputs[0], "DynamicQuantizeLinear")
    weight = rewriter.graph.initializers.get(product.inputs[1])
    if dynamic is None or weight is None or len(weight.shape) != 2 or len(product.inputs) < 3:
        return None
    _, x_scale, x_zero = dynamic.outputs
    others = [name for name in scales.inputs if name != x_scale]
    if product.inputs[2] != x_zero or len(others) != 1:
        return None
    w_scale = rewriter.graph.initializers.get(others[0])
    if w_scale is None or not _is_per_column(w_scale, weight):
        return None
    zero = product.inputs[3] if len(product.inputs) > 3 else ""
    known = rewriter.graph.initializers.get(zero)
    if zero and (known is None or known.shape not in ((), (1,), w_scale.shape)):
        return None
    return others[0], dynamic


def _is_per_column(ref: WeightRef, weight: WeightRef) -> bool:
    return ref.shape in ((), (1,), (weight.shape[1],))


def _put(
    rewriter: Rewriter, node: Node, product: Node, w_scale: str, dynamic: Node,
    numbers: dict[str, str],
) -> None:  # fmt: skip
    new, q = list[Node](), product.inputs[0]
    if q not in numbers:
        made = rewriter.node("DequantizeLinear", dynamic.outputs, f"{dynamic.inputs[0]}.rounded")
        numbers[q] = made.outputs[0]
        new.append(made)
    parts = [product.inputs[1], w_scale]
    zero = product.inputs[3] if len(product.inputs) > 3 else ""
    if zero:
        parts.append(_of_shape(rewriter, zero, rewriter.graph.initializers[w_scale].shape, new))
    matrix = rewriter.node("DequantizeLinear", parts, f"{product.inputs[1]}.numbers", axis=1)
    factors = (numbers[q], matrix.outputs[0])
    rewriter.replace(node, *new, matrix, Node("MatMul", factors, node.outputs, {}, node.name))


def _of_shape(rewriter: Rewriter, zero: str, shape: tuple[int, ...], new: list[Node]) -> str:
    """The zero points in the shape of the scales, as DequantizeLinear wants them."""
    if rewriter.graph.initializers[zero].shape == shape:
        return zero
    wanted = rewriter.constant(f"{zero}.shape", np.array(shape, np.int64))
    new.append(rewriter.node("Reshape" if not shape else "Expand", (zero, wanted), f"{zero}.each"))
    return new[-1].outputs[0]
