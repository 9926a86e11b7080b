"""ONNX models of one quantised product, and the matrix that their integers stand for.

Dims: x (M, K), weight (K, N), B blocks along K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, value

from onnxstream_nb.formats.onnx import read_bytes
from onnxstream_nb.graph import Graph
from onnxstream_nb.passes import optimize
from onnxstream_nb.session import decode_constant
from onnxstream_nb.weights import DiskProvider, Weight

Array = np.ndarray[Any, Any]
INTEGERS = ("int4", "uint4", "int8", "uint8")
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def integers(dtype: str, shape: tuple[int, ...], rng: Any) -> Array:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    info = ml_dtypes.iinfo(kind)
    found: Array = rng.integers(int(info.min), int(info.max) + 1, shape).astype(kind)
    return found


@dataclass(frozen=True)
class Quantised:
    """A model y = x w (+ bias), w (K, N) in float64 and the number of bytes it is stored in."""

    model: onnx.ModelProto
    dense: Array
    nbytes: int
    bias: Array | None = None

    @property
    def k(self) -> int:
        return len(self.dense)


def scales(rng: Any, *shape: int) -> Array:
    """Around 0.05, of either sign."""
    found: Array = rng.uniform(0.5, 1.5, shape) * 0.05 * rng.choice([-1, 1], shape)
    return found


def _stored_bytes(array: Array) -> int:
    return -(-array.size // 2) if array.dtype.name.endswith("int4") else array.nbytes


def _product(
    weights: dict[str, Array], nodes: list[onnx.NodeProto], k: int, n: int, kind: Any
) -> onnx.ModelProto:
    element = TensorProto.FLOAT16 if kind == np.float16 else TensorProto.FLOAT
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    inputs, outputs = [value("x", element, ("m", k))], [value("y", element, ("m", n))]
    return make(nodes, inputs, outputs, tensors, opset_imports=OPSETS)


def dequantised(
    dtype: str, k: int, n: int, block: int = 0, *, turned: bool = False, zeros: bool = False,
    kind: Any = np.float32, per: str = "block", gemm: bool = False, seed: int = 0,
) -> Quantised:  # fmt: skip
    """DequantizeLinear of (K, N), or of (N, K) and then transposed; scales `per` block, row (an
    output) or tensor. `gemm` has the transposition and a bias as Gemm's own."""
    rng = np.random.default_rng((seed, k, n))
    blocks = -(-k // block) if block else 1
    shape = {"block": (blocks, n), "row": (1, n), "tensor": (1, 1)}[per]
    q, s = integers(dtype, (k, n), rng), scales(rng, *shape).astype(kind)
    z = integers(dtype, shape, rng) if zeros else np.zeros(shape, q.dtype)
    spread = np.arange(k) // (block or k)
    dense = (q.astype(np.float64) - z.astype(np.float64)[spread]) * s.astype(np.float64)[spread]
    attributes: dict[str, int] = {"axis": int(turned) if per == "block" else int(not turned)}
    if per == "block":
        attributes["block_size"] = block
    stored = [a.T if turned else a for a in (q, s, z)[: 2 + zeros]]
    if per != "block":
        stored[1:] = [a.reshape(() if per == "tensor" else -1) for a in stored[1:]]
    weights = {name: np.ascontiguousarray(a).reshape(a.shape)
               for name, a in zip("qsz", stored, strict=False)}  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", list(weights), ["w"], **attributes)]
    nbytes, bias = sum(map(_stored_bytes, weights.values())), None
    if gemm:
        bias = rng.standard_normal(n).astype(kind)
        weights["bias"] = bias
        nodes += [helper.make_node("Gemm", ["x", "w", "bias"], ["y"], transB=int(turned))]
    else:
        if turned:
            nodes += [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])]
        nodes += [helper.make_node("MatMul", ["x", "t" if turned else "w"], ["y"])]
    return Quantised(_product(weights, nodes, k, n, kind), dense, nbytes, bias)


def pairs(q: Array) -> Array:
    """Nibbles (N, K) uint8 -> (N, K / 2 rounded up), the lower half of a byte first."""
    q = np.pad(q, ((0, 0), (0, q.shape[1] % 2)))
    packed: Array = q[:, ::2] | q[:, 1::2] << 4
    return packed


def nbits(
    bits: int, k: int, n: int, block: int, *, zeros: str = "", kind: Any = np.float32,
    bias: bool = False, seed: int = 0, **attributes: int,
) -> Quantised:  # fmt: skip
    """MatMulNBits, its zero points none, "packed" or "float"."""
    rng = np.random.default_rng((seed, k, n))
    blocks = -(-k // block)
    q = rng.integers(0, 1 << bits, (n, blocks * block), dtype=np.uint8)
    s = scales(rng, n, blocks).astype(kind)
    z = np.full((n, blocks), 1 << (bits - 1), np.float64)
    weights = {"q": pairs(q) if bits == 4 else q, "s": s.reshape(-1)}
    weights["q"] = weights["q"].reshape(n, blocks, -1)
    if zeros == "packed":
        each = rng.integers(0, 1 << bits, (n, blocks), dtype=np.uint8)
        z, weights["z"] = each.astype(np.float64), (pairs(each) if bits == 4 else each).reshape(-1)
    elif zeros == "float":
        weights["z"] = rng.uniform(0, (1 << bits) - 1, (n, blocks)).astype(kind)
        z = weights["z"].astype(np.float64)
    dense = (q.astype(np.float64) - np.repeat(z, block, 1)) * np.repeat(s, block, 1)
    nbytes, added = sum(a.nbytes for a in weights.values()), None
    names = ["x", "q", "s", "z" if zeros else ""]
    if bias:
        added = weights["bias"] = rng.standard_normal(n).astype(kind)
        names += ["", "bias"]
    node = helper.make_node(
        "MatMulNBits", names, ["y"], name="proj", domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=block, **attributes,
    )  # fmt: skip
    model = _product(weights, [node], k, n, kind)
    return Quantised(model, dense[:, :k].T, nbytes, added)


def onnxruntime_s(model: onnx.ModelProto, feeds: dict[str, Array], name: str = "") -> Array:
    """The named output, or the first, by onnxruntime, which rounds activations where it may fuse
    operators."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    result: Array = session.run([name] if name else None, feeds)[0]
    return result


def activations(m: int, k: int, kind: Any = np.float32) -> Array:
    x = np.random.default_rng((m, k)).standard_normal((m, k), np.float32)
    return x.astype(kind)


def rewritten(model: onnx.ModelProto) -> Graph:
    return optimize(read_bytes(model.SerializeToString()), decode_constant)


def weight_of(found: Quantised) -> Weight:
    """The weight in parts, as stored."""
    return DiskProvider().get(parts_of(rewritten(found.model)))


def parts_of(graph: Graph) -> Any:
    """The only weight in parts of a graph."""
    (ref,) = (ref for ref in graph.initializers.values() if ref.parts)
    return ref
