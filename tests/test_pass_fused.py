"""Several operators as one, for a GPU: what is fused, what is not, and that it means the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from session_models import graph_of

from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.passes import optimize, rewrite_fused
from onnxstream_nb.session import Session, decode_constant, load_graph

TINY = Tiny(vocab=67, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, head_dim=16)
OWN = "onnxstream_nb"


def counts(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph.nodes)


def weight(name: str, *shape: int) -> WeightRef:
    data = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32).tobytes()
    return WeightRef(name, shape, "float32", data, 0, len(data))


def graph(*nodes: Node, outputs: tuple[str, ...], weights: tuple[WeightRef, ...] = ()) -> Graph:
    made = graph_of(*nodes, outputs=outputs, opset=24)
    inputs = tuple(Value(name, "float32", (None, 6)) for name in ("x", "y"))
    return made.with_(inputs=inputs, initializers={ref.name: ref for ref in weights})


def outputs(graph: Graph, **feeds: Any) -> dict[str, Any]:
    with Session(graph, optimize=False, precision="exact") as session:
        return session.run(feeds)


def same(before: Graph, after: Graph, **feeds: Any) -> None:
    wanted, found = outputs(before, **feeds), outputs(after, **feeds)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def rows(*shape: int) -> Any:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_language_model_means_the_same(tokens: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    before = optimize(load_graph(tmp_path / "m.gguf"), decode_constant)
    after = rewrite_fused(before)
    layers = TINY.layers
    found = counts(after)
    assert found["RotaryAttention"] == found["SwishMul"] == layers
    assert found["MatMuls"] == found["AddRMSNormalization"] == 2 * layers
    assert found["MatMul"] == 2 * layers + 1 and found["RMSNormalization"] == 1
    assert not {"Attention", "RotaryEmbedding", "Swish", "Add"} & found.keys()
    feeds: dict[str, Any] = {
        "input_ids": np.arange(tokens)[None] + 3, "position_ids": np.arange(tokens)[None] + 2
    }  # fmt: skip
    for value in before.inputs:
        feeds.setdefault(value.name, rows(1, TINY.kv_heads, 2, TINY.head_dim).astype(value.dtype))
    same(before, after, **feeds)


def test_products_of_one_value_in_groups() -> None:
    """Four of one value; one of another; one with a value that is computed."""
    weights = tuple(weight("w" * i, 6, 6 + i) for i in range(1, 6))
    nodes = [Node("MatMul", ("x", ref.name), (f"o{i}",)) for i, ref in enumerate(weights[:4])]
    nodes += [Node("MatMul", ("y", "wwwww"), ("o4",)), Node("MatMul", ("o4", "y"), ("o5",))]
    before = graph(*nodes, outputs=("o0", "o1", "o2", "o3", "o4"), weights=weights)
    before = before.with_(nodes=before.nodes[:5])
    after = rewrite_fused(before)
    assert [(n.op_type, len(n.inputs) - 1) for n in after.nodes] == [
        ("MatMuls", 3), ("MatMul", 1), ("MatMul", 1)
    ]  # fmt: skip
    same(before, after, x=rows(3, 6), y=rows(2, 6))


def test_a_sum_that_others_read_too() -> None:
    nodes = (
        Node("Add", ("x", "y"), ("s",)),
        Node("RMSNormalization", ("s", "w"), ("n",), {"axis": -1, "epsilon": 1e-3}),
        Node("Mul", ("s", "n"), ("z",)),
    )
    before = graph(*nodes, outputs=("z", "s"), weights=(weight("w", 6),))
    after = rewrite_fused(before)
    assert counts(after) == {"AddRMSNormalization": 1, "Mul": 1}
    assert after.nodes[0].domain == OWN and after.nodes[0].outputs == ("s", "n")
    same(before, after, x=rows(3, 6), y=rows(4, 6)[:3].copy())


SWISH = Node("Swish", ("x",), ("t",), {"alpha": 1.0})
NORM = Node("RMSNormalization", ("t", "w"), ("n",), {"axis": -1, "epsilon": 1e-5})
NOT_FUSED = {
    "swish of another slope": (
        Node("Swish", ("x",), ("t",), {"alpha": 2.0}), Node("Mul", ("t", "y"), ("z",))
    ),
    "swish that others read": (
        SWISH, Node("Mul", ("t", "y"), ("u",)), Node("Add", ("t", "u"), ("z",))
    ),
    "the square of swish": (SWISH, Node("Mul", ("t", "t"), ("z",))),
    "two norms of a sum": (
        Node("Add", ("x", "y"), ("t",)), NORM,
        Node("RMSNormalization", ("t", "w"), ("m",), {"axis": -1, "epsilon": 1e-2}),
        Node("Mul", ("n", "m"), ("z",)),
    ),
    "one product": (Node("MatMul", ("x", "v"), ("z",)),),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_fused(case: str) -> None:
    before = graph(*NOT_FUSED[case], outputs=("z",), weights=(weight("w", 6), weight("v", 6, 4)))
    assert rewrite_fused(before).nodes == before.nodes


def test_a_swish_that_is_an_output_is_not_fused() -> None:
    before = graph(SWISH, Node("Mul", ("t", "y"), ("z",)), outputs=("t", "z"))
    assert rewrite_fused(before).nodes == before.nodes


@pytest.mark.parametrize(
    "change", ["masked", "other tables", "other heads", "keys alone", "rotation read by others"]
)
def test_attention_that_does_not_rotate_itself(change: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    before = optimize(load_graph(tmp_path / "m.gguf"), decode_constant)
    rotary = [n for n in before.nodes if n.op_type == "RotaryEmbedding"]
    attention = next(n for n in before.nodes if n.op_type == "Attention")
    changes: dict[int, Node] = {}
    if change == "masked":
        named = (*attention.inputs[:3], "position_ids", *attention.inputs[4:])
        changes[id(attention)] = replace(attention, inputs=named)
    elif change == "other tables":
        changes[id(rotary[0])] = replace(rotary[0], inputs=(rotary[0].inputs[0], "other", "tables"))
    elif change == "other heads":
        attributes = {**rotary[0].attributes, "num_heads": 1}
        changes[id(rotary[0])] = replace(rotary[0], attributes=attributes)
    elif change == "keys alone":
        named = (rotary[0].inputs[0], *attention.inputs[1:])
        changes[id(attention)] = replace(attention, inputs=named)
    else:
        output = Value(rotary[0].outputs[0], "float32", None)
        before = before.with_(outputs=(*before.outputs, output))
    changed = before.with_(nodes=tuple(changes.get(id(n), n) for n in before.nodes))
    assert counts(rewrite_fused(changed))["RotaryAttention"] == TINY.layers - 1
