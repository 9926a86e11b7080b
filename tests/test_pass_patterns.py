"""Each fusing pass on hand-built graphs: what it must rewrite, and what it must leave."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pass_graphs import (
    Step,
    assert_same_meaning,
    build,
    changed,
    number,
    operators,
    random,
    rewritten,
)

from onnxstream_nb.graph import Graph
from onnxstream_nb.passes import dead, gelu, layer_norm, rms_norm, rotary, swish

HALF = np.float16


# --- RMSNormalization

RMS: list[Step] = [
    ("Pow", "x two", "square"),
    ("ReduceMean", "square", "mean", {"axes": [-1]}),
    ("Add", "mean epsilon", "variance"),
    ("Sqrt", "variance", "root"),
    ("Div", "one root", "inverse"),
    ("Mul", "x inverse", "normal"),
    ("Mul", "w normal", "y"),
]
RMS_WEIGHTS = {"two": number(2), "epsilon": number(1e-5), "one": number(1), "w": random(6)}


def rms(steps: list[Step] = RMS, outputs: str = "y", **weights: Any) -> Graph:
    graph = build(steps, {"x": ["n", 3, 6]}, outputs, RMS_WEIGHTS | weights)
    return rewritten(dead.rewrite, graph)  # a replaced step may have left its input unused


@pytest.mark.parametrize(
    "replacements",
    [
        {},
        {"square": ("Mul", "x x", "square")},
        {"inverse": ("Reciprocal", "root", "inverse")},
        {"normal": ("Div", "x root", "normal")},
        {"y": ("Mul", "normal w", "y")},
        {"mean": ("ReduceMean", "square", "mean", {"axes": [2]})},
    ],
)
def test_rms_norm_is_fused(replacements: dict[str, Step]) -> None:
    before = rms(changed(RMS, **replacements))
    after = rewritten(rms_norm.rewrite, before)
    assert operators(after) == {"RMSNormalization": 1}
    assert after.opset[""] == 23
    assert after.nodes[0].attributes["epsilon"] == pytest.approx(1e-5)
    assert_same_meaning(before, after, {"x": random(5, 3, 6, seed=1)})


@pytest.mark.parametrize(
    ("replacements", "weights"),
    [
        ({"mean": ("ReduceMean", "square", "mean", {"axes": [1]})}, {}),
        ({"mean": ("ReduceSum", "square last", "mean")}, {"last": np.array([-1])}),
        ({"mean": ("ReduceMean", "square", "mean", {"axes": [1, 2]})}, {}),
        ({"variance": ("Add", "mean wide", "variance")}, {"wide": random(6) ** 2 + 1}),
        ({"root": ("Sqrt", "mean", "root"), "inverse": ("Add", "root epsilon", "inverse")}, {}),
        ({"square": ("Pow", "x three", "square")}, {"three": number(3)}),
        ({"inverse": ("Div", "two root", "inverse")}, {}),
        ({"y": ("Mul", "scalar normal", "y")}, {"scalar": random(1)}),
        ({"y": ("Mul", "table normal", "y")}, {"table": random(3, 6)}),
    ],
)
def test_what_only_looks_like_rms_norm_is_left(
    replacements: dict[str, Step], weights: dict[str, Any]
) -> None:
    graph = rms(changed(RMS, **replacements), **weights)
    assert rewritten(rms_norm.rewrite, graph) is graph


@pytest.mark.parametrize("interior", ["square", "mean", "inverse", "normal"])
def test_rms_norm_whose_interior_is_used_is_left(interior: str) -> None:
    graph = rms([*RMS, ("Exp", interior, "other")], "y other")
    assert rewritten(rms_norm.rewrite, graph) is graph
    graph = rms(outputs=f"y {interior}")
    assert rewritten(rms_norm.rewrite, graph) is graph


def half_rms(to: int, **weights: Any) -> Graph:
    """As half-precision models compute it: in float32, between two Casts."""
    steps = [("Cast", "h", "x", {"to": 1}), *RMS[:-1],
             ("Cast", "normal", "narrow", {"to": to}), ("Mul", "w narrow", "y")]  # fmt: skip
    return build(steps, {"h": ["n", 6]}, "y", RMS_WEIGHTS | weights, kinds={"h": "h", "y": "h"})


def test_rms_norm_between_casts_is_fused_in_half_precision() -> None:
    before = half_rms(10, w=random(6).astype(HALF))
    after = rewritten(rms_norm.rewrite, before)
    assert operators(after) == {"RMSNormalization": 1}
    assert after.nodes[0].inputs == ("h", "w")
    assert_same_meaning(before, after, {"h": random(4, 6).astype(HALF)}, 2e-3)


def test_rms_norm_is_left_where_another_node_cannot_follow() -> None:
    """GroupNormalization means something else from opset 21 on."""
    after = ("GroupNormalization", "y ones zeros", "z", {"num_groups": 1, "epsilon": 1e-5})
    steps = changed(RMS, mean=("ReduceMean", "square last", "mean"))
    weights = {"last": np.array([-1]), "ones": np.ones(1, np.float32), "zeros": random(1)}
    graph = build([*steps, after], {"x": ["n", 3, 6]}, "z", RMS_WEIGHTS | weights, 18)
    assert rewritten(rms_norm.rewrite, graph) is graph
    assert operators(rewritten(rms_norm.rewrite, build(steps, {"x": ["n", 3, 6]}, "y",
                     RMS_WEIGHTS | weights, 18)))["RMSNormalization"] == 1  # fmt: skip


# --- LayerNormalization

LAYER: list[Step] = [
    ("ReduceMean", "x", "mean", {"axes": [-1]}),
    ("Sub", "x mean", "centred"),
    ("Pow", "centred two", "square"),
    ("ReduceMean", "square", "variance", {"axes": [-1]}),
    ("Add", "variance epsilon", "stable"),
    ("Sqrt", "stable", "root"),
    ("Div", "centred root", "normal"),
    ("Mul", "normal w", "scaled"),
    ("Add", "scaled b", "y"),
]


def layer(steps: list[Step] = LAYER, outputs: str = "y", **weights: Any) -> Graph:
    return build(steps, {"x": [2, "n", 6]}, outputs, RMS_WEIGHTS | {"b": random(6)} | weights)


@pytest.mark.parametrize("outputs", ["y", "scaled"])
def test_layer_norm_is_fused_with_a_bias_and_without(outputs: str) -> None:
    before = layer(LAYER if outputs == "y" else LAYER[:-1], outputs)
    after = rewritten(layer_norm.rewrite, before)
    assert operators(after) == {"LayerNormalization": 1}
    assert len(after.nodes[0].inputs) == (3 if outputs == "y" else 2)
    assert after.opset[""] == 17
    assert_same_meaning(before, after, {"x": random(2, 5, 6, seed=1)})


@pytest.mark.parametrize(
    "replacements",
    [
        {"mean": ("ReduceMean", "x", "mean", {"axes": [1]})},
        {"variance": ("ReduceMean", "square", "variance", {"axes": [1]})},
        {"centred": ("Sub", "mean x", "centred")},
        {"normal": ("Div", "x root", "normal")},
    ],
)
def test_what_only_looks_like_layer_norm_is_left(replacements: dict[str, Step]) -> None:
    graph = layer(changed(LAYER, **replacements))
    assert rewritten(layer_norm.rewrite, graph) is graph


def test_layer_norm_with_a_wide_bias_keeps_it_apart() -> None:
    before = layer(b=random(2, 1, 6))
    after = rewritten(layer_norm.rewrite, before)
    assert operators(after) == {"LayerNormalization": 1, "Add": 1}
    assert_same_meaning(before, after, {"x": random(2, 5, 6)})


# --- Gelu and Swish

ERF: list[Step] = [
    ("Div", "x root2", "scaled"),
    ("Erf", "scaled", "erf"),
    ("Add", "erf one", "gate"),
    ("Mul", "x gate", "double"),
    ("Mul", "double half", "y"),
]
TANH: list[Step] = [
    ("Pow", "x three", "cube"),
    ("Mul", "cube kappa", "small"),
    ("Add", "x small", "sum"),
    ("Mul", "sum beta", "inner"),
    ("Tanh", "inner", "tanh"),
    ("Add", "tanh one", "gate"),
    ("Mul", "x half", "halved"),
    ("Mul", "halved gate", "y"),
]
GELU_WEIGHTS = {
    "root2": number(2**0.5), "one": number(1), "half": number(0.5), "three": number(3),
    "kappa": number(0.044715), "beta": number((2 / np.pi) ** 0.5), "two": number(2),
    "inverse": number(0.5**0.5),
}  # fmt: skip


def gelu_graph(steps: list[Step], outputs: str = "y", **weights: Any) -> Graph:
    return build(steps, {"x": ["n", 7]}, outputs, GELU_WEIGHTS | weights)


@pytest.mark.parametrize(
    ("steps", "approximate"),
    [
        (ERF, "none"),
        (changed(ERF, scaled=("Mul", "x inverse", "scaled")), "none"),
        (changed(ERF, y=("Div", "double two", "y")), "none"),
        (changed(ERF, double=("Mul", "x half", "double"), y=("Mul", "gate double", "y")), "none"),
        (TANH, "tanh"),
        ([("Mul", "x x", "two_x"), *changed(TANH, cube=("Mul", "two_x x", "cube"))], "tanh"),
    ],
)
def test_gelu_is_fused(steps: list[Step], approximate: str) -> None:
    before = gelu_graph(steps)
    after = rewritten(gelu.rewrite, before)
    assert operators(after) == {"Gelu": 1}
    assert after.nodes[0].attributes == {"approximate": approximate}
    assert after.opset[""] == 20
    assert_same_meaning(before, after, {"x": 3 * random(5, 7)})


@pytest.mark.parametrize(
    "graph",
    [
        gelu_graph(ERF, "y gate"),
        gelu_graph(ERF, half=number(0.4)),
        gelu_graph(ERF, root2=number(1.5)),
        gelu_graph(ERF, one=number(2)),
        gelu_graph(TANH, kappa=number(0.05)),
        gelu_graph(TANH, three=number(2)),
        gelu_graph(changed(TANH, halved=("Mul", "cube half", "halved"))),
    ],
)
def test_what_only_looks_like_gelu_is_left(graph: Graph) -> None:
    assert rewritten(gelu.rewrite, graph) is graph


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_swish_is_fused(alpha: float | None) -> None:
    steps: list[Step] = [("Sigmoid", "x", "gate"), ("Mul", "gate x", "y")]
    if alpha:
        steps = [("Mul", "x alpha", "s"), ("Sigmoid", "s", "gate"), ("Mul", "x gate", "y")]
    before = build(steps, {"x": ["n", 3]}, "y", {"alpha": number(alpha or 0)})
    after = rewritten(swish.rewrite, before)
    assert operators(after) == {"Swish": 1}
    assert after.nodes[0].attributes["alpha"] == pytest.approx(alpha or 1.0)
    assert_same_meaning(before, after, {"x": 3 * random(4, 3)})


@pytest.mark.parametrize(
    ("steps", "outputs"),
    [
        ([("Sigmoid", "x", "gate"), ("Mul", "gate z", "y")], "y"),
        ([("Sigmoid", "x", "gate"), ("Mul", "gate x", "y")], "y gate"),
        ([("Mul", "x z", "s"), ("Sigmoid", "s", "gate"), ("Mul", "x gate", "y")], "y"),
    ],
)
def test_what_only_looks_like_swish_is_left(steps: list[Step], outputs: str) -> None:
    graph = build(steps, {"x": ["n", 3], "z": ["n", 3]}, outputs)
    assert rewritten(swish.rewrite, graph) is graph


# --- RotaryEmbedding


def rotary_graph(
    low: tuple[int, int] = (0, 4), high: tuple[int, int] = (4, 8), width: int = 8, axis: int = -1,
    second: str = "angles", outputs: str = "y", heads: int = 1,
) -> Graph:  # fmt: skip
    """Rotation of an (n, 2, t, width) value by angles (n, t, 4), in the half-split layout."""
    steps: list[Step] = [
        ("Concat", f"angles {second}", "both", {"axis": -1}),
        ("Cos", "both", "cos3"), ("Sin", "both", "sin3"),
        ("Unsqueeze", "cos3 heads", "cos"), ("Unsqueeze", "sin3 heads", "sin"),
        ("Slice", "x low0 low1 axis", "low"), ("Slice", "x high0 high1 axis", "high"),
        ("Neg", "high", "minus"), ("Concat", "minus low", "turned", {"axis": axis}),
        ("Mul", "x cos", "a"), ("Mul", "turned sin", "b"), ("Add", "a b", "y"),
    ]  # fmt: skip
    bounds = {"low0": low[0], "low1": low[1], "high0": high[0], "high1": high[1], "axis": axis}
    weights = {k: np.array([v]) for k, v in bounds.items()} | {"heads": np.array([heads])}
    inputs = {"x": ["n", 2, "t", width], "angles": ["n", "t", 4], "others": ["n", "t", 4]}
    return build(steps, inputs, outputs, weights)


@pytest.mark.parametrize("end", [8, 2**63 - 1])
@pytest.mark.parametrize("length", [1, 5])
def test_rotation_is_fused(end: int, length: int) -> None:
    before = rotary_graph(high=(4, end))
    after = rewritten(rotary.rewrite, before)
    assert operators(after) == {"Cos": 1, "Sin": 1, "RotaryEmbedding": 1}
    feeds = {"x": random(3, 2, length, 8), "angles": random(3, length, 4, seed=1),
             "others": random(3, length, 4)}  # fmt: skip
    assert_same_meaning(before, after, feeds)


@pytest.mark.parametrize(
    "graph",
    [
        rotary_graph(low=(4, 8), high=(0, 4)),
        rotary_graph(low=(0, 4), high=(0, 4)),
        rotary_graph(second="others"),
        rotary_graph(outputs="y turned"),
        rotary_graph(heads=2),
    ],
)
def test_what_only_looks_like_a_rotation_is_left(graph: Graph) -> None:
    assert rewritten(rotary.rewrite, graph) is graph


@pytest.mark.parametrize("repeated", [True, False])
def test_rotation_by_a_table_needs_equal_halves(repeated: bool) -> None:
    half = random(9, 4)
    table = np.concatenate([half, half if repeated else half + 1], -1)
    steps: list[Step] = [
        ("Gather", "table ids", "rows"), ("Unsqueeze", "rows one", "cos"),
        ("Split", "x", "low high", {"axis": 3}), ("Neg", "high", "minus"),
        ("Concat", "minus low", "turned", {"axis": 3}),
        ("Mul", "x cos", "a"), ("Mul", "cos turned", "b"), ("Add", "b a", "y"),
    ]  # fmt: skip
    inputs = {"x": ["n", 2, "t", 8], "ids": ["n", "t"]}
    before = build(steps, inputs, "y", {"table": table, "one": np.array([1])}, kinds={"ids": "i"})
    after = rewritten(rotary.rewrite, before)
    assert operators(after)["RotaryEmbedding"] == int(repeated)
    feeds = {"x": random(2, 2, 3, 8), "ids": np.array([[0, 8, 3], [1, 2, 2]])}
    assert_same_meaning(before, after, feeds)


def test_channels_that_pass_unrotated_are_taken_in() -> None:
    steps = [
        ("Slice", "x zero eight axis", "head"), ("Slice", "x eight end axis", "tail"),
        ("RotaryEmbedding", "head cos sin", "turned"),
        ("Concat", "turned tail", "y", {"axis": -1}),
    ]  # fmt: skip
    bounds = {"zero": 0, "eight": 8, "end": 2**63 - 1, "axis": -1}
    inputs = {"x": [1, 2, "t", 12], "cos": [1, "t", 4], "sin": [1, "t", 4]}
    before = build(steps, inputs, "y", {k: np.array([v]) for k, v in bounds.items()}, 23)
    after = rewritten(rotary.rewrite, before)
    assert operators(after) == {"RotaryEmbedding": 1}
    assert after.nodes[0].attributes["rotary_embedding_dim"] == 8
    feeds = {"x": random(1, 2, 3, 12), "cos": random(1, 3, 4), "sin": random(1, 3, 4, seed=1)}
    assert_same_meaning(before, after, feeds)
