"""Quantised matrices as single weights: products with DequantizeLinear's result, and MatMulNBits.

A product's factor (K, N) that is dequantised from initializers becomes an initializer of its own,
a `WeightRef` in parts over the same bytes, and the product a plain MatMul. So what is stored in
integers is never decoded as a whole, and everything else sees a matrix of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from onnxstream_nb.errors import ModelError, UnsupportedError
from onnxstream_nb.graph import DTYPES, Graph, Node, WeightRef
from onnxstream_nb.passes.facts import Read
from onnxstream_nb.passes.rewriting import Rewriter

_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}
_SCALES = ("float32", "float16")
_HALVES = ("float16", "bfloat16")  # how scales may be stored that are widened to float32
_MIDDLE = {4: b"\x08", 8: b"\x80"}  # what MatMulNBits subtracts when there are no zero points
_NBITS_ATTRIBUTES = ("K", "N", "accuracy_level", "bits", "block_size")


def rewrite(graph: Graph, read: Read) -> Graph:
    """Products with one matrix in parts each.

    Raises UnsupportedError naming the node and the attribute or input of a MatMulNBits that is not
    supported, ModelError for one whose tensors do not fit its attributes.
    """
    rewriter = Rewriter(graph, read)
    made: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            _rewrite_nbits(rewriter, node)
        elif node.op_type in ("MatMul", "Gemm") and not node.domain:
            _rewrite_product(rewriter, node, made)
    return rewriter.finish()


def _rewrite_product(rewriter: Rewriter, node: Node, made: dict[str, str]) -> None:
    """A MatMul or Gemm whose second factor is dequantised."""
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0}
    if any(node.attributes.get(name, known) != known for name, known in plain.items()):
        return
    turned = bool(node.attributes.get("transB", 0))
    key = f"{node.inputs[1]} transposed" if turned else node.inputs[1]
    if key not in made:
        ref = dequantised(rewriter, node.inputs[1], turned)
        if ref is None:
            return
        made[key] = rewriter.fresh(ref.name)
        rewriter.add_initializer(replace(ref, name=made[key]))
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    _put(rewriter, node, made[key], bias)


def _put(rewriter: Rewriter, node: Node, weight: str, bias: str) -> None:
    """MatMul, and Add where there is a bias, in the place of a node."""
    inputs = (node.inputs[0], weight)
    if not bias:
        rewriter.replace(node, Node("MatMul", inputs, node.outputs, {}, node.name))
        return
    product = rewriter.node("MatMul", inputs, f"{node.outputs[0]}.product")
    added = (product.outputs[0], bias)
    rewriter.replace(node, product, Node("Add", added, node.outputs, {}, node.name))


# -- DequantizeLinear ----------------------------------------------------------------------------


def dequantised(rewriter: Rewriter, value: str, turned: bool) -> WeightRef | None:
    """The matrix (K, N) that a value, transposed when `turned`, is dequantised from; None when
    that is no matrix in parts: scales along K without blocks, or blocks along N."""
    while node := rewriter.made_by(value, "Transpose"):
        if node.attributes.get("perm", (1, 0)) != (1, 0):
            return None
        value, turned = node.inputs[0], not turned
    node = rewriter.made_by(value, "DequantizeLinear")
    refs = [rewriter.graph.initializers.get(name) for name in node.inputs if name] if node else []
    found = [ref for ref in refs if ref is not None]
    if node is None or len(found) != len(refs) or not is_matrix(node, found):
        return None
    parts = [_as_factor(node, ref, found[0], turned) for ref in found]
    known = [part for part in parts if part is not None]
    if len(known) != len(found):
        return None
    return in_parts(value, known, int(node.attributes.get("block_size", 0)))


def is_matrix(node: Node, parts: Sequence[WeightRef]) -> bool:
    """Whether a DequantizeLinear makes a matrix of integers into floats of its scales' type."""
    integers, scales, *zeros = parts
    wanted = node.attributes.get("output_dtype", 0)
    return (
        integers.dtype in _BITS
        and all(zero.dtype == integers.dtype for zero in zeros)
        and all(ref.encoding == "raw" for ref in (integers, *zeros))
        and len(integers.shape) == 2
        and scales.dtype in _SCALES
        and scales.encoding in ("raw", *_HALVES)
        and (not wanted or DTYPES[wanted] == scales.dtype)
    )


def in_parts(name: str, parts: Sequence[WeightRef], block_size: int) -> WeightRef | None:
    """A factor (K, N) of integers (K, N), scales and perhaps zero points, both (B, N) or (B, 1);
    None when they do not belong together."""
    integers, *others = parts
    k, n = integers.shape
    blocks = others[0].shape[0]
    block = k if blocks == 1 else block_size
    if not k * n * block or blocks != -(-k // block):
        return None
    if any(part.shape != others[0].shape or part.shape[1] not in (1, n) for part in others):
        return None
    return _in_parts(name, (k, n), block, (integers, *others))


def _as_factor(node: Node, ref: WeightRef, integers: WeightRef, turned: bool) -> WeightRef | None:
    """A part of a DequantizeLinear as one of the factor (K, N): the integers, or scales or zero
    points (B, N), (1, N) or (1, 1); None when there is one for every k."""
    if len(ref.shape) == 2 and (ref is integers or node.attributes.get("block_size", 0)):
        if ref is not integers and node.attributes.get("axis", 1) % 2 != turned:
            return None
        return transposed(ref) if turned else ref
    if math.prod(ref.shape) == 1 and len(ref.shape) < 2:
        return replace(ref, shape=(1, 1))
    if len(ref.shape) != 1 or node.attributes.get("axis", 1) % 2 == turned:
        return None
    return replace(ref, shape=(1, *ref.shape))


def transposed(ref: WeightRef) -> WeightRef:
    """The same stored matrix with its axes swapped."""
    return replace(ref, shape=(ref.shape[1], ref.shape[0]), transposed=not ref.transposed)


def _in_parts(
    name: str, shape: tuple[int, int], block: int, parts: tuple[WeightRef, ...]
) -> WeightRef:
    integers, scales, *zeros = parts
    dtype = scales.dtype  # of the products; scales that are stored in fewer bits stay so
    if scales.encoding in _HALVES:
        scales = replace(scales, dtype=scales.encoding, encoding="raw")
    parts = (integers, scales, *zeros)
    return WeightRef(
        name, shape, dtype, integers.source, integers.offset,
        sum(part.nbytes for part in parts), f"affine{_BITS[integers.dtype]}",
        integers.transposed, parts=parts, block=block,
    )  # fmt: skip


# -- MatMulNBits ---------------------------------------------------------------------------------


def _rewrite_nbits(rewriter: Rewriter, node: Node) -> None:
    _, integers, scales, zeros, groups, bias = (*node.inputs, "", "", "", "")[:6]
    name = node.name or node.outputs[0]
    if groups:
        raise UnsupportedError(
            f"node {name}: MatMulNBits with g_idx (columns in another order) is not supported; "
            "quantise the model without act_order"
        )
    k, n, bits, block = _nbits_attributes(node, name)
    blocks = -(-k // block)
    shapes = [
        (integers, "B", f"uint{bits}", (blocks * block, n)),
        (scales, "scales", "", (blocks, n)),
    ]
    if zeros:
        packed = -(-blocks * bits // 8) * 8 // bits
        ref = rewriter.graph.initializers.get(zeros)
        of_bytes = ref is not None and ref.dtype == "uint8"
        kind, rows = (f"uint{bits}", packed) if of_bytes else ("", blocks)
        shapes.append((zeros, "zero_points", kind, (rows, n)))
    parts = tuple(_nbits_part(rewriter, name, *shape) for shape in shapes)
    if not zeros:
        parts += (WeightRef("middle", (1, 1), "uint8", _MIDDLE[bits], 0, 1),)
    weight = rewriter.fresh(f"{integers}.matrix")
    rewriter.add_initializer(_in_parts(weight, (k, n), block, parts))
    _put(rewriter, node, weight, bias)


def _nbits_attributes(node: Node, name: str) -> tuple[int, int, int, int]:
    """K, N, bits and block_size, checked."""
    for key, given in node.attributes.items():
        if key not in _NBITS_ATTRIBUTES and given:
            raise UnsupportedError(f"node {name}: MatMulNBits with {key}={given} is not supported")
    missing = [key for key in ("K", "N", "block_size") if key not in node.attributes]
    if missing:
        raise ModelError(f"node {name}: MatMulNBits has no attribute {', '.join(missing)}")
    k, n, block = (int(node.attributes[key]) for key in ("K", "N", "block_size"))
    bits = int(node.attributes.get("bits", 4))
    if bits not in _MIDDLE:
        raise UnsupportedError(
            f"node {name}: MatMulNBits with bits={bits} is not supported; quantise to 4 or 8 bits"
        )
    if k < 1 or n < 1:
        raise ModelError(f"node {name}: MatMulNBits with K={k}, N={n}")
    if block < 16 or block & (block - 1):
        raise ModelError(
            f"node {name}: MatMulNBits with block_size={block}; it is a power of two from 16 on"
        )
    return k, n, bits, block


def _nbits_part(
    rewriter: Rewriter, name: str, value: str, role: str, kind: str, shape: tuple[int, int]
) -> WeightRef:
    """An input, stored by rows, as (K or B, N) elements of type `kind` (default: its own)."""
    ref = rewriter.graph.initializers.get(value)
    if ref is None:
        raise UnsupportedError(f"node {name}: MatMulNBits with a computed {role} is not supported")
    wanted = math.prod(shape) * _BITS[kind] // 8 if kind else math.prod(shape)
    fits = ref.dtype == "uint8" if kind else ref.dtype in _SCALES
    if not fits or ref.transposed or math.prod(ref.shape) != wanted:
        raise ModelError(
            f"node {name}: MatMulNBits has {role} of {ref.dtype} {list(ref.shape)}, which does "
            f"not fit its attributes: {wanted} elements of {'uint8' if kind else 'floats'}"
        )
    return replace(ref, shape=shape, dtype=kind or ref.dtype, transposed=True)
