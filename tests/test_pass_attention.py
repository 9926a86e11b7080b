"""Fusing Attention on hand-built graphs: what must be rewritten, and what must be left."""

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
from onnxstream_nb.passes import attention

ATTENTION: list[Step] = [
    ("Transpose", "k", "kt", {"perm": [0, 1, 3, 2]}),
    ("MatMul", "q kt", "product"),
    ("Div", "product scale", "scores"),
    ("Add", "scores mask", "masked"),
    ("Softmax", "masked", "p", {"axis": -1}),
    ("MatMul", "p v", "y"),
]


def attention_graph(
    steps: list[Step] = ATTENTION, mask: tuple[int | str, ...] = (1, 1, "t", "s"),
    kv_heads: int = 4, outputs: str = "y", **weights: Any,
) -> Graph:  # fmt: skip
    kv = ["n", kv_heads, "s", 8]
    inputs = {"q": ["n", 4, "t", 8], "k": kv, "v": kv, "mask": mask}
    weights = {"scale": number(3.0), "zero": number(0), "ninf": number(-np.inf)} | weights
    return build(steps, inputs, outputs, weights)


def attention_feeds(kv_heads: int = 4, t: int = 3, s: int = 5) -> dict[str, Any]:
    return {"q": random(2, 4, t, 8), "k": random(2, kv_heads, s, 8, seed=1),
            "v": random(2, kv_heads, s, 8, seed=2), "mask": random(1, 1, t, s, seed=3)}  # fmt: skip


SPLIT_SCALE: list[Step] = [
    ATTENTION[0], ("Mul", "q scale", "qs"), ("Mul", "scale kt", "ks"),
    ("MatMul", "qs ks", "scores"), *ATTENTION[3:],
]  # fmt: skip
SOFTCAP: list[Step] = [
    *ATTENTION[:2], ("Div", "product scale", "over"), ("Tanh", "over", "tanh"),
    ("Mul", "tanh scale", "scores"), *ATTENTION[3:],
]  # fmt: skip
WITHOUT_NAN: list[Step] = [
    *ATTENTION[:5], ("IsNaN", "p", "nan"), ("Where", "nan zero p", "clean"),
    ("MatMul", "clean v", "y"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "attributes"),
    [
        (ATTENTION, {"scale": 1 / 3}),
        (SPLIT_SCALE, {"scale": 9.0}),
        (changed(ATTENTION, scores=("Mul", "scale product", "scores")), {"scale": 3.0}),
        (SOFTCAP, {"scale": 1.0, "softcap": 3.0}),
        (WITHOUT_NAN, {"scale": 1 / 3}),
    ],
)
def test_attention_is_fused(steps: list[Step], attributes: dict[str, float]) -> None:
    before = attention_graph(steps)
    after = rewritten(attention.rewrite, before)
    assert operators(after) == {"Attention": 1}
    assert after.nodes[0].attributes == pytest.approx(attributes)
    assert_same_meaning(before, after, attention_feeds())
    assert_same_meaning(before, after, attention_feeds(t=1, s=1))


def test_attention_without_a_mask_and_with_one_key_head() -> None:
    steps = [*ATTENTION[:3], ("Softmax", "scores", "p", {"axis": 3}), ATTENTION[-1]]
    before = attention_graph(steps, kv_heads=1)
    after = rewritten(attention.rewrite, before)
    assert operators(after) == {"Attention": 1}
    assert_same_meaning(before, after, attention_feeds(kv_heads=1))


def test_two_masks_are_added_first() -> None:
    steps = [*ATTENTION[:4], ("Add", "masked more", "twice"), ("Softmax", "twice", "p"),
             ATTENTION[-1]]  # fmt: skip
    before = attention_graph(steps, more=random(1, 4, 3, 5, seed=4))
    after = rewritten(attention.rewrite, before)
    assert operators(after) == {"Attention": 1, "Add": 1}
    assert_same_meaning(before, after, attention_feeds())


def test_keys_split_and_transposed_at_once() -> None:
    steps = changed(ATTENTION, kt=("Transpose", "k", "kt", {"perm": [0, 2, 3, 1]}))
    inputs = {"q": ["n", 4, "t", 8], "k": ["n", "s", 4, 8], "v": ["n", 4, "s", 8],
              "mask": ["t", "s"]}  # fmt: skip
    before = build(steps, inputs, "y", {"scale": number(3.0)})
    after = rewritten(attention.rewrite, before)
    assert operators(after) == {"Attention": 1, "Transpose": 1}
    feeds = attention_feeds() | {"k": random(2, 5, 4, 8), "mask": random(3, 5)}
    assert_same_meaning(before, after, feeds)


def test_rows_that_see_nothing_are_zero_before_and_after() -> None:
    steps = [("Where", "seen zero ninf", "mask"), *WITHOUT_NAN]
    kv = ["n", 4, "s", 8]
    inputs = {"q": ["n", 4, "t", 8], "k": kv, "v": kv, "seen": [1, 1, "t", "s"]}
    weights = {"scale": number(3.0), "zero": number(0), "ninf": number(-np.inf)}
    before = build(steps, inputs, "y", weights, kinds={"seen": "b"})
    after = rewritten(attention.rewrite, before)
    assert operators(after) == {"Attention": 1}
    assert after.nodes[0].inputs[3] == "seen"
    feeds = attention_feeds()
    feeds["seen"] = feeds.pop("mask") > 0
    feeds["seen"][..., 1, :] = False
    assert_same_meaning(before, after, feeds)


@pytest.mark.parametrize(
    "graph",
    [
        attention_graph(changed(ATTENTION, p=("Softmax", "masked", "p", {"axis": 1}))),
        attention_graph(changed(ATTENTION, kt=("Transpose", "k", "kt", {"perm": [1, 0, 3, 2]}))),
        attention_graph(changed(ATTENTION, scores=("Div", "product mask", "scores"))),
        attention_graph(scale=random(8, 1, 1, 1)),
        attention_graph(scale=number(-1.0)),
        attention_graph(mask=(1, 1, "t", 1)),
        attention_graph(mask=("t", 1, 1, 1, "s")),
        attention_graph(outputs="y p"),
        attention_graph(outputs="y scores"),
        attention_graph([*ATTENTION, ("Exp", "masked", "z")], outputs="y z"),
        attention_graph(kv_heads=2),
    ],
)
def test_what_only_looks_like_attention_is_left(graph: Graph) -> None:
    assert rewritten(attention.rewrite, graph) is graph
