"""Which products become products with one quantised matrix, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from kernel_oracles import assert_product
from onnx import helper, numpy_helper
from onnx_models import make, refusal, saved, value
from quantised_models import (
    activations,
    dequantised,
    nbits,
    onnxruntime_s,
    parts_of,
    rewritten,
    scales,
)

from onnxstream_nb import formats
from onnxstream_nb.errors import ModelError, UnsupportedError
from onnxstream_nb.loading import CHUNK, work_bytes
from onnxstream_nb.passes import optimize
from onnxstream_nb.plan import make_plan
from onnxstream_nb.session import Session, decode_constant, internal
from onnxstream_nb.weights import DiskProvider, RamProvider

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


def test_the_graph_says_matmul() -> None:
    for found, wanted in (
        (dequantised("int4", 64, 8, 32, turned=True), ["MatMul"]),
        (nbits(4, 64, 8, 32), ["MatMul"]),
        (nbits(4, 64, 8, 32, bias=True), ["MatMul", "Add"]),
        (dequantised("int8", 64, 8, 32, turned=True, gemm=True), ["MatMul", "Add"]),
    ):  # fmt: skip
        graph = rewritten(found.model)
        assert [n.op_type for n in graph.nodes] == wanted
        assert len(graph.initializers) == len(wanted)


def variants() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Models that keep their DequantizeLinear: no panel has such scales, or no product reads it."""
    rng = np.random.default_rng(3)
    q = rng.integers(-128, 128, (64, 64)).astype(np.int8)
    per_k = scales(rng, 64).astype(np.float32)
    across = scales(rng, 64, 2).astype(np.float32)
    full = scales(rng, 2, 64).astype(np.float32)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    for name, s, attributes, node in (
        ("a scale for every k", per_k, {"axis": 0}, product),
        ("blocks across", across, {"axis": 1, "block_size": 32}, product),
        ("first factor", full, {"axis": 0, "block_size": 32},
         helper.make_node("MatMul", ["w", "x"], ["y"])),
        ("alpha", full, {"axis": 0, "block_size": 32},
         helper.make_node("Gemm", ["x", "w"], ["y"], alpha=0.5)),
        ("a sum", full, {"axis": 0, "block_size": 32}, helper.make_node("Add", ["x", "w"], ["y"])),
    ):  # fmt: skip
        nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], **attributes), node]
        tensors = [numpy_helper.from_array(q, "q"), numpy_helper.from_array(s, "s")]
        shapes = [value("x", shape=(64, 64))], [value("y", shape=(64, 64))]
        yield name, make(nodes, *shapes, tensors, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize(("name", "model"), [*variants()])
def test_others_stay(name: str, model: onnx.ModelProto) -> None:
    x = activations(64, 64)
    with Session(model) as session:
        assert session.graph.nodes[0].op_type == "DequantizeLinear"
        wanted = onnxruntime_s(model, {"x": x})
        assert np.allclose(session.run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-4)


def test_two_products_of_one_matrix_and_another_reader() -> None:
    """The matrix is packed once; who reads it otherwise gets it decoded as before."""
    found = dequantised("int4", 64, 64, 32, zeros=True)
    model = found.model
    nodes = [
        helper.make_node("MatMul", ["y", "w"], ["v"]), helper.make_node("Add", ["v", "w"], ["u"])
    ]  # fmt: skip
    model.graph.node.extend(nodes)
    model.graph.output.append(value("u", shape=("m", 64)))
    x = activations(64, 64)
    with Session(model, load="ram") as session:
        ops = [n.op_type for n in session.graph.nodes]
        assert ops == ["DequantizeLinear", "MatMul", "MatMul", "Add"]
        assert len(session.plan.packable) == 1
        result = session.run({"x": x})
    assert_product(result["y"], x, found.dense, packed=True)
    z = (result["u"] - found.dense.astype(np.float32)).astype(np.float32)
    size = 1e-6 * np.abs(found.dense).max() * np.ones_like(z)
    y = result["y"].astype(np.float64)
    slack = size + 2e-4 * (np.abs(y) @ np.abs(found.dense))
    assert (np.abs(z - y @ found.dense) <= slack).all()


def test_a_matrix_that_is_transposed_before_it_is_dequantised() -> None:
    for dtype in ("int4", "uint8"):
        found = dequantised(dtype, 96, 37, 32, zeros=True)
        model = altered(found.model)
        model.graph.node[0].input[0] = "t"
        model.graph.node.insert(0, helper.make_node("Transpose", ["q"], ["t"]))
        for tensor in model.graph.initializer:
            if tensor.name == "q":
                q = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
                tensor.CopyFrom(numpy_helper.from_array(q, "q"))
        x = activations(3, 96)
        for load in ("ram", "stream"):
            with Session(model, load=load) as session:
                assert [n.op_type for n in session.graph.nodes] == ["MatMul"]
                assert_product(session.run({"x": x})["y"], x, found.dense, packed=True)


@pytest.mark.parametrize("wrong", ["columns", "blocks", "zeros"])
def test_parts_that_do_not_fit_stay_as_they_are(wrong: str) -> None:
    """The operator says what is wrong with them, if it is asked to run."""
    found = dequantised("int8", 64, 8, 32, zeros=True)
    shapes = {"columns": ("s", (2, 9)), "blocks": ("s", (3, 8)), "zeros": ("z", (1, 8))}
    name, shape = shapes[wrong]
    for tensor in found.model.graph.initializer:
        if tensor.name == name:
            kind = np.float32 if name == "s" else np.int8
            tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, kind), name))
    graph = rewritten(found.model)
    assert [n.op_type for n in graph.nodes] == ["DequantizeLinear", "MatMul"]


def test_short_integers_are_read_as_constants() -> None:
    """Initializers of 4 bits that no product takes: a byte holds two, the last one alone."""
    rng = np.random.default_rng(1)
    for dtype in ("int4", "uint4"):
        found = dequantised(dtype, 5, 3, 5, zeros=True)
        nodes = [found.model.graph.node[0], helper.make_node("Mul", ["x", "w"], ["y"])]
        model = make(nodes, [value("x", shape=(5, 3))], [value("y", shape=(5, 3))],
                     list(found.model.graph.initializer))  # fmt: skip
        x = rng.standard_normal((5, 3), np.float32)
        with Session(model) as session:
            y = session.run({"x": x})["y"]
        assert np.allclose(y, x * found.dense, rtol=1e-6)


# -- what is refused -----------------------------------------------------------------------------


def altered(model: onnx.ModelProto, **attributes: Any) -> onnx.ModelProto:
    """The model with attributes of its first node set, or removed when None."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    node = copy.graph.node[0]
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(
        helper.make_attribute(k, v) for k, v in attributes.items() if v is not None
    )
    return copy


@pytest.mark.parametrize(("attributes", "kind", "words"), [
    ({"bits": 2}, UnsupportedError, "bits=2"), ({"bits": 3}, UnsupportedError, "bits=3"),
    ({"block_size": 8}, ModelError, "block_size=8"),
    ({"block_size": 48}, ModelError, "block_size=48"),
    ({"N": None}, ModelError, "no attribute N"),
    ({"K": None, "block_size": None}, ModelError, "no attribute K, block_size"),
    ({"K": 0}, ModelError, "K=0"), ({"K": 640}, ModelError, "B of uint8"),
    ({"weight_prepacked": 1}, UnsupportedError, "weight_prepacked=1"),
])  # fmt: skip
def test_attributes_that_are_refused(attributes: Any, kind: Any, words: str) -> None:
    model = altered(nbits(4, 64, 8, 32).model, **attributes)
    message = refusal(lambda: Session(model), kind)
    assert "proj" in message and words in message


def test_inputs_that_are_refused() -> None:
    found = nbits(4, 64, 8, 32, zeros="packed")
    model = altered(found.model)
    groups = numpy_helper.from_array(np.arange(64, dtype=np.int32), "g")
    model.graph.initializer.append(groups)
    model.graph.node[0].input.append("g")
    message = refusal(lambda: Session(model), UnsupportedError)
    assert "proj" in message and "g_idx" in message
    with pytest.raises(UnsupportedError, match="g_idx"), Session(model, optimize=False) as session:
        session.run({"x": activations(1, 64)})
    for name, role in (("q", "B"), ("s", "scales"), ("z", "zero_points")):
        computed = altered(found.model)
        names = list(computed.graph.node[0].input)
        computed.graph.node[0].input[names.index(name)] = f"{name}2"
        computed.graph.node.insert(0, helper.make_node("Relu", [name], [f"{name}2"]))
        assert f"computed {role}" in refusal(
            lambda model=computed: Session(model, optimize=True), UnsupportedError
        )
    wrong = altered(found.model)
    for tensor in wrong.graph.initializer:
        if tensor.name == "z":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(7, np.uint8), "z"))
    message = refusal(lambda: Session(wrong), ModelError)
    assert "proj" in message and "zero_points" in message and "[7]" in message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = saved(dequantised("int8", 256, 64, 32).model, tmp_path / "model.onnx")
    ref = parts_of(optimize(formats.load(path), decode_constant))
    path.write_bytes(path.read_bytes()[: ref.parts[0].offset + 100])
    for provider in (DiskProvider(), RamProvider()):
        message = refusal(lambda provider=provider: provider.get(ref), ModelError)
        assert "model.onnx" in message and "q" in message


def test_a_key_is_that_of_all_parts() -> None:
    ref = parts_of(rewritten(dequantised("int8", 64, 8, 32, zeros=True).model))
    assert replace(ref, name="other").key == ref.key
    for i in range(3):
        moved = replace(ref.parts[i], offset=1)
        parts = (*ref.parts[:i], moved, *ref.parts[i + 1 :])
        assert replace(ref, parts=parts).key != ref.key


def test_a_turn_s_panels_or_floats_are_counted_as_work() -> None:
    """Of what is streamed the stored bytes are the provider's; a product makes more of them."""
    for found, factor in ((nbits(4, 256, 40, 32), 2), (nbits(4, 240, 40, 16), 0)):
        graph = rewritten(found.model)
        ref = parts_of(graph)
        plan = make_plan(graph, decode_constant, internal("Panels")().panel_bytes)
        made = work_bytes(plan, CHUNK) - work_bytes(replace(plan, steps=()), CHUNK)
        assert made == (factor * ref.nbytes or 9 * found.dense.size)
        if factor:
            assert len(plan.packable) == 1
            assert 3 * internal("Panels")().panel_bytes(ref) <= made  # 40 columns: three panels
