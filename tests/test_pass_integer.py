"""Products of dynamic integers become products with quantised matrices, of the same meaning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from integer_models import Node, draft_of, ours, silent, snr, theirs, weight, written
from onnx import numpy_helper
from onnx_models import make, saved, value
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnxstream_nb.convert.quantisation.quantise import QuantiseOptions, quantise
from onnxstream_nb.formats.onnx import read_bytes
from onnxstream_nb.graph import Graph
from onnxstream_nb.passes import optimize
from onnxstream_nb.session import decode_constant

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def products() -> onnx.ModelProto:
    """x (t, 64) times three matrices, two of them of the same input."""
    rng = np.random.default_rng(0)
    nodes = [
        Node("MatMul", ["x", "w1"], ["a"]),
        Node("MatMul", ["x", "w2"], ["b"]),
        Node("Add", ["a", "b"], ["c"]),
        Node("MatMul", ["c", "w3"], ["y"]),
    ]
    weights = [weight(rng, "w1", 64, 96), weight(rng, "w2", 64, 96), weight(rng, "w3", 96, 50)]
    return make(nodes, [value("x", shape=("t", 64))], [value("y", shape=("t", 50))], weights)


def optimized(model: onnx.ModelProto) -> Graph:
    return optimize(read_bytes(model.SerializeToString()), decode_constant)


def kinds(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.nodes)


def check(model: onnx.ModelProto) -> None:
    """The products are with stored integers, and the outputs those of exact integer products."""
    graph = optimized(model)
    assert kinds(graph) == {
        "DynamicQuantizeLinear": 2, "DequantizeLinear": 2, "MatMul": 3, "Add": 1,
    }  # fmt: skip
    assert [r.encoding for r in graph.initializers.values()].count("affine8") == 3
    x = np.random.default_rng(1).standard_normal((7, 64)).astype("f4")
    for rows in (x, x[:1]):
        exact = ours(model, {"x": rows}, optimize=False)
        np.testing.assert_allclose(theirs(model, {"x": rows}), exact, 1e-5, 1e-5)
        # Activations of 15 bits: a step of the second DynamicQuantizeLinear may fall otherwise.
        assert snr(exact, ours(model, {"x": rows})) > 50


@pytest.mark.parametrize("asymmetric", [False, True])
def test_our_own_models(asymmetric: bool) -> None:
    options = QuantiseOptions(method="dynamic", asymmetric=asymmetric)
    check(written(quantise(draft_of(products()), options, silent)))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_onnxruntimes_models(tmp_path: Path, kind: Any, per_channel: bool) -> None:
    source = saved(products(), tmp_path / "model.onnx")
    path = tmp_path / "quantised.onnx"
    quantize_dynamic(str(source), str(path), per_channel=per_channel, weight_type=kind)
    check(onnx.load(path))


def dynamic(scale: Any, zero: Any, *more: onnx.NodeProto, **outputs: Any) -> Graph:
    rng = np.random.default_rng(2)
    nodes = [
        Node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        Node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
        Node("Cast", ["i"], ["f"], to=1),
        Node("Mul", ["s", "ws"], ["both"]),
        Node("Mul", ["f", "both"], ["y"]),
        *more,
    ]
    weights = [
        numpy_helper.from_array(rng.integers(-128, 128, (64, 32)).astype("i1"), "w"),
        numpy_helper.from_array(np.asarray(scale, "f4"), "ws"),
        numpy_helper.from_array(np.asarray(zero, "i1"), "wz"),
    ]
    declared = [value("y", shape=("t", 32))]
    declared += [value(name, dtype, None) for name, dtype in outputs.items()]
    return optimized(make(nodes, [value("x", shape=("t", 64))], declared, weights))


ONE, EACH = np.float32(0.01), np.linspace(0.01, 0.02, 32)


@pytest.mark.parametrize("scale, zero", [(ONE, 3), (EACH, 3), (EACH, [3]), (EACH, range(32))])
def test_any_scales_and_zero_points_of_columns(scale: Any, zero: Any) -> None:
    zero = list(zero) if isinstance(zero, range) else zero
    assert kinds(dynamic(scale, zero))["MatMulInteger"] == 0


def test_what_is_used_elsewhere_stays() -> None:
    assert kinds(dynamic(ONE, range(32)))["MatMulInteger"] == 1  # a zero point more than a scale
    again = Node("Neg", ["f"], ["n"])
    assert kinds(dynamic(ONE, 3, again, n=1))["MatMulInteger"] == 1
    assert kinds(dynamic(ONE, 3, i=onnx.TensorProto.INT32))["MatMulInteger"] == 1
