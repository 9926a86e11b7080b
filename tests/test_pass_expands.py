"""Expand before operators that broadcast, Tanh as converters spell it, repeat_kv by a Concat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pass_graphs import Step, assert_same_meaning, build, number, operators, random, rewritten

from onnxstream_nb.passes import attention, clean, expands, grouped, tanh

Shape = list[Any]


FULL: list[Step] = [
    ("Shape", "a", "rows"), ("Shape", "b", "columns"),
    ("Concat", "rows columns", "full", {"axis": 0}), ("Unsqueeze", "a axes", "column"),
    ("Expand", "column full", "wa"), ("Expand", "b full", "wb"),
]  # fmt: skip


@pytest.mark.parametrize(("op_type", "kind"), [("Less", "b"), ("Add", "i"), ("Greater", "b")])
def test_both_sides_are_stretched_by_the_operator(op_type: str, kind: str) -> None:
    steps = [*FULL, (op_type, "wb wa", "y")]
    before = build(steps, {"a": ["t"], "b": ["l"]}, weights={"axes": np.array([1])},
                   kinds={"a": "i", "b": "i", "y": kind})  # fmt: skip
    after = rewritten(expands.rewrite, before)
    assert operators(after) == {"Unsqueeze": 1, op_type: 1}
    for t, n in ((3, 5), (1, 4), (1, 1)):
        assert_same_meaning(before, after, {"a": np.arange(t), "b": np.arange(n)})


def test_a_cast_between_is_made_of_less() -> None:
    steps = [("Shape", "c", "full"), ("Expand", "m full", "w"), ("Cast", "w", "bool", {"to": 9}),
             ("And", "c bool", "y")]  # fmt: skip
    before = build(steps, {"c": ["t", "l"], "m": [1, "l"]}, kinds={"c": "b", "m": "i", "y": "b"})
    after = rewritten(expands.rewrite, before)
    assert operators(after) == {"Cast": 1, "And": 1}
    assert after.nodes[0].inputs == ("m",)
    feeds = {"c": random(3, 5) > 0, "m": np.array([[0, 1, 1, 0, 1]])}
    assert_same_meaning(before, after, feeds)


@pytest.mark.parametrize("other", [[1, "l"], [1, 1]])
def test_what_needs_the_stretching_keeps_it(other: Shape) -> None:
    """The other side is no larger than the value before the Expand."""
    steps = [("Expand", "a full", "wa"), ("Add", "wa b", "y")]
    before = build(steps, {"a": [1, "l"], "b": other}, weights={"full": np.array([3, 1])})
    assert rewritten(expands.rewrite, before) is before


def test_tanh_of_a_sigmoid() -> None:
    steps: list[Step] = [("Mul", "x two", "a"), ("Sigmoid", "a", "b"), ("Mul", "two b", "c"),
                         ("Sub", "c one", "y")]  # fmt: skip
    weights = {"two": number(2.0), "one": number(1.0), "three": number(3.0)}
    before = build(steps, {"x": [3, "n"]}, weights=weights)
    after = rewritten(tanh.rewrite, before)
    assert operators(after) == {"Tanh": 1}
    assert_same_meaning(before, after, {"x": 4 * random(3, 33)}, 1e-6)
    for i, wrong in enumerate(
        [("Mul", "x three", "a"), ("Mul", "three b", "c"), ("Sub", "c three", "y")]
    ):
        changed = [wrong if s[2] == wrong[2] else s for s in steps]
        graph = build(changed, {"x": [3, "n"]}, weights=weights)
        assert rewritten(tanh.rewrite, graph) is graph, i


@pytest.mark.parametrize("copies", ["s s s", "s t s"])
def test_heads_that_a_concat_repeats(copies: str) -> None:
    steps: list[Step] = [
        ("Unsqueeze", "k axis", "s"), ("Unsqueeze", "l axis", "t"),
        ("Concat", copies, "w", {"axis": 2}), ("Reshape", "w heads", "r"),
        ("Transpose", "r", "kt", {"perm": [0, 1, 3, 2]}), ("MatMul", "q kt", "scores"),
        ("Softmax", "scores", "p", {"axis": -1}), ("MatMul", "p r", "y"),
    ]  # fmt: skip
    kv = [1, 2, "n", 4]
    before = build(steps, {"q": [1, 6, "t", 4], "k": kv, "l": kv},
                   weights={"axis": np.array([2]), "heads": np.array([0, 6, -1, 4])})  # fmt: skip
    fused = rewritten(attention.rewrite, before)
    after = rewritten(lambda g, r: clean(grouped.rewrite(g, r), r), fused)
    assert ("Concat" in operators(after)) == (copies != "s s s")
    feeds = {"q": random(1, 6, 3, 4), "k": random(1, 2, 5, 4, seed=1),
             "l": random(1, 2, 5, 4, seed=2)}  # fmt: skip
    assert_same_meaning(before, after, feeds)
