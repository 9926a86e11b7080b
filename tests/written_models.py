"""ONNX models in the forms that a conversion writes: stored weights that are widened where used.

Dims: x (M, K), weight (K, N), table (V, D), B blocks along K or D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, value
from quantised_models import OPSETS, Array, Quantised, dequantised, integers, scales

HALVES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Written:
    """A model, the float64 matrix (K, N) or table (V, D) it multiplies with, its stored bytes."""

    model: onnx.ModelProto
    dense: Array
    nbytes: int


def _model(
    weights: dict[str, Array], nodes: list[onnx.NodeProto], inputs: Any, outputs: Any
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    return make(nodes, inputs, outputs, tensors, opset_imports=OPSETS)


def _cast(source: str, result: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], to=TensorProto.FLOAT)


def _stored(rng: Any, dtype: str, *shape: int) -> Array:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    found: Array = (rng.standard_normal(shape) / 8).astype(kind)
    found.flat[0] = 1e-7  # subnormal in float16
    return found


def widened(dtype: str, k: int, n: int, *, turned: str = "", gemm: bool = False) -> Written:
    """x w with w of half floats; `turned`: "before" it is widened, or "after", it is transposed."""
    rng = np.random.default_rng((k, n))
    w = _stored(rng, dtype, *((n, k) if turned else (k, n)))
    steps = {"": ["Cast"], "before": ["Transpose", "Cast"], "after": ["Cast", "Transpose"]}[turned]
    nodes, name = [], "w"
    for i, step in enumerate(steps):
        nodes.append(_cast(name, f"w{i}") if step == "Cast"
                     else helper.make_node(step, [name], [f"w{i}"], perm=[1, 0]))  # fmt: skip
        name = f"w{i}"
    weights = {"w": w}
    if gemm:
        weights["b"] = np.zeros(n, np.float32)
        nodes.append(helper.make_node("Gemm", ["x", name, "b"], ["y"]))
    else:
        nodes.append(helper.make_node("MatMul", ["x", name], ["y"]))
    shapes = [value("x", shape=("m", k))], [value("y", shape=("m", n))]
    dense = w.astype(np.float64)
    return Written(_model(weights, nodes, *shapes), dense.T if turned else dense, w.nbytes)


def scaled(dtype: str, d: int) -> Written:
    """x (M, D) times a widened vector (D,), as a norm's."""
    w = _stored(np.random.default_rng(d), dtype, d)
    nodes = [_cast("w", "v"), helper.make_node("Mul", ["x", "v"], ["y"])]
    shapes = [value("x", shape=("m", d))], [value("y", shape=("m", d))]
    return Written(_model({"w": w}, nodes, *shapes), w.astype(np.float64), w.nbytes)


def _tied(weights: dict[str, Array], lookup: Any, head: Any, v: int, d: int) -> onnx.ModelProto:
    """ids -> rows `e` of a table, their logits `y`: products of the rows with all of the table."""
    nodes = [*lookup, *head, helper.make_node("MatMul", ["e", "h"], ["y"])]
    ids = value("ids", TensorProto.INT64, ("b", "m"))
    shapes = [value("e", shape=("b", "m", d)), value("y", shape=("b", "m", v))]
    return _model(weights, nodes, [ids], shapes)


def tied_floats(dtype: str, v: int, d: int) -> Written:
    """A table of half floats (or floats): its rows are widened, and all of it, transposed."""
    w = _stored(np.random.default_rng((v, d)), dtype, v, d)
    turn = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
    if dtype == "float32":
        turn.output[0] = "h"
        lookup, head = [helper.make_node("Gather", ["w", "ids"], ["e"])], [turn]
    else:
        lookup = [helper.make_node("Gather", ["w", "ids"], ["r"]), _cast("r", "e")]
        head = [turn, _cast("t", "h")]
    return Written(_tied({"w": w}, lookup, head, v, d), w.astype(np.float64), w.nbytes)


def tied_integers(
    dtype: str, v: int, d: int, block: int, *, half: bool = True, zeros: bool = False,
    late: bool = False,
) -> Written:  # fmt: skip
    """A table of integers with blocks along D: rows of it and of the scales are looked up, then
    dequantised (`late`: all is, then rows are looked up); for the head all of it, transposed."""
    rng = np.random.default_rng((v, d, block))
    blocks = -(-d // block)
    q = integers(dtype, (v, d), rng)
    s = scales(rng, v, blocks).astype(np.float16 if half else np.float32)
    z = integers(dtype, (v, blocks), rng) if zeros else np.zeros((v, blocks), q.dtype)
    weights = {"q": q, "s": s, **({"z": z} if zeros else {})}
    names = ["q", "s1" if half else "s", *(["z"] if zeros else [])]
    head = [_cast("s", "s1")] if half else []
    head += [
        helper.make_node("DequantizeLinear", names, ["w"], axis=1, block_size=block),
        helper.make_node("Transpose", ["w"], ["h"], perm=[1, 0]),
    ]
    if late:
        lookup = [*head, helper.make_node("Gather", ["w", "ids"], ["e"])]
        head = []
    else:
        lookup = [helper.make_node("Gather", [name, "ids"], [f"{name}r"]) for name in weights]
        rows = [f"{name}r" for name in weights]
        if half:
            lookup.append(_cast("sr", "s1r"))
            rows[1] = "s1r"
        lookup.append(helper.make_node("DequantizeLinear", rows, ["e"], axis=-1, block_size=block))
    each = np.arange(d) // block
    dense = (q.astype(np.float64) - z.astype(np.float64)[:, each]) * s.astype(np.float64)[:, each]
    bits = 4 if dtype.endswith("int4") else 8
    nbytes = sum(-(-a.size * bits // 8) for a in (q, *((z,) if zeros else ()))) + s.nbytes
    return Written(_tied(weights, lookup, head, v, d), dense, nbytes)


def half_scaled(*args: Any, **options: Any) -> Quantised:
    """`dequantised` with scales that are float16 in the file: a Cast widens them."""
    found = dequantised(*args, **options, kind=np.float16)
    graph = found.model.graph
    graph.node[0].input[1] = "s1"
    graph.node.insert(0, _cast("s", "s1"))
    for inout in (*graph.input, *graph.output):
        inout.type.tensor_type.elem_type = TensorProto.FLOAT
    return found
