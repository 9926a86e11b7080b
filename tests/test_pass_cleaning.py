"""What the cleaning passes remove and keep, the cache in Attention, the raising of opsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_graphs import (
    Step,
    assert_close,
    assert_same_meaning,
    build,
    operators,
    random,
    rewritten,
    run,
    run_reference,
)

from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.passes import (
    clean,
    common,
    constants,
    dead,
    find_cache,
    grouped,
    identity,
    optimize,
    past,
    rewrite_logit_rows,
    upgrade,
)
from onnxstream_nb.passes.symbols import Poly, divide, is_nonnegative, quotient, symbol

A, B = symbol("a"), symbol("b")


# --- Sizes


@given(*[st.integers(-9, 9)] * 4, st.integers(0, 9), st.integers(0, 9))
def test_polynomials_are_integer_arithmetic(p: int, q: int, r: int, s: int, a: int, b: int) -> None:
    size = (A * p + q) * (B * r + A) - (A + s)
    values = {"a": a, "b": b}
    assert evaluated(size, values) == (a * p + q) * (b * r + a) - (a + s)


def evaluated(size: int | Poly, values: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sum(n * int(np.prod([values[name] for name in names])) for names, n in size.terms)


def test_sizes_that_are_equal_compare_equal() -> None:
    assert A + B == B + A and A * B == B * A and A - A == 0 and (A + 1) * 2 == A * 2 + 2
    assert A != B and A != A + 1
    assert is_nonnegative(A * B + 2) and not is_nonnegative(A - 1)


def test_quotients_are_exact_or_unknown() -> None:
    assert quotient([1, A, 64], [1, A, 16]) == 4
    assert quotient([A, B], [B]) == A
    assert quotient([A * 4, 6], [8]) == A * 3
    assert quotient([A], [B]) is None and quotient([A], [2]) is None and quotient([A], [0]) is None
    assert divide(-7, 2) == -3 and divide(A * 4, 2) == A * 2 and divide(A, 2) == divide(A, 2)


# --- Constants, identities, equal values


def cleaned(steps: list[Step], inputs: Any, outputs: str = "y", **more: Any) -> tuple[Graph, Graph]:
    graph = build(steps, inputs, outputs, **more)
    return graph, rewritten(clean, graph)


def test_constants_are_computed_once_before_the_run() -> None:
    steps = [("Add", "w one", "w1"), ("Neg", "w1", "w2"), ("Mul", "x w2", "y")]
    weights = {"w": random(4), "one": np.float32(1)}
    before, after = cleaned(steps, {"x": ["n", 4]}, weights=weights)
    assert operators(after) == {"Mul": 1}
    assert_same_meaning(before, after, {"x": random(3, 4)}, 0)


def test_large_constants_are_not_read() -> None:
    big = np.zeros((1 << 16) + 1, np.float32)
    graph = build([("Neg", "w", "n"), ("Add", "x n", "y")], {"x": [1]}, "y", {"w": big})

    def refuse(ref: WeightRef) -> Any:
        raise AssertionError(f"{ref.name} was read")

    assert constants.rewrite(graph, refuse) is graph


def test_a_transposed_weight_is_another_view_of_the_same_bytes() -> None:
    steps = [("Transpose", "w", "wt", {"perm": [1, 0]}), ("MatMul", "x wt", "y")]
    before = build(steps, {"x": ["n", 400]}, "y", {"w": random(300, 400)})
    after = rewritten(constants.rewrite, before)
    assert operators(after) == {"MatMul": 1}
    assert after.initializers["wt"].source is before.initializers["w"].source
    assert_same_meaning(before, after, {"x": random(3, 400)})


@pytest.mark.parametrize(
    "step",
    [
        ("Identity", "x", "z"), ("Cast", "x", "z", {"to": 1}), ("Mul", "x one", "z"),
        ("Mul", "one x", "z"), ("Div", "x one", "z"), ("Add", "zero x", "z"),
        ("Sub", "x zero", "z"), ("Reshape", "x same", "z"), ("Concat", "x", "z", {"axis": 1}),
        ("Concat", "x none", "z", {"axis": 1}), ("Expand", "x ones", "z"),
        ("Transpose", "x", "z", {"perm": [0, 1]}), ("Dropout", "x", "z"),
        ("Slice", "x from to axis", "z"), ("Max", "x", "z"),
    ],
)  # fmt: skip
def test_what_changes_nothing_goes(step: Step) -> None:
    weights = {
        "one": np.float32(1), "zero": np.zeros(1, np.float32), "same": np.array([0, 6]),
        "ones": np.array([1, 1]), "none": np.zeros((2, 0), np.float32), "from": np.array([0]),
        "to": np.array([6]), "axis": np.array([1]),
    }  # fmt: skip
    before, after = cleaned([step, ("Neg", "z", "y")], {"x": [2, 6]}, weights=weights)
    assert operators(after) == {"Neg": 1}
    assert_same_meaning(before, after, {"x": random(2, 6)}, 0)


@pytest.mark.parametrize(
    "step",
    [
        ("Mul", "x wide", "z"), ("Add", "x column", "z"), ("Div", "one x", "z"),
        ("Sub", "zero x", "z"), ("Mul", "x near", "z"), ("Reshape", "x other", "z"),
        ("Expand", "x three", "z"), ("Slice", "x from to axis back", "z"),
        ("Transpose", "x", "z", {"perm": [1, 0]}),
    ],
)  # fmt: skip
def test_what_changes_something_stays(step: Step) -> None:
    weights = {
        "wide": np.ones((1, 1, 1), np.float32), "column": np.zeros((2, 1), np.float32),
        "one": np.float32(1), "zero": np.float32(0), "near": np.float32(1.001),
        "other": np.array([3, -1]), "three": np.array([3, 1, 1]), "from": np.array([5]),
        "to": np.array([-7]), "axis": np.array([1]), "back": np.array([-1]),
    }  # fmt: skip
    before, after = cleaned([step, ("Neg", "z", "y")], {"x": [2, 6]}, weights=weights)
    assert operators(after) == {step[0]: 1, "Neg": 1}
    assert_same_meaning(before, after, {"x": random(2, 6)}, 0)


def test_outputs_keep_their_names() -> None:
    steps = [("Identity", "x", "y"), ("Neg", "x", "a"), ("Neg", "x", "b"), ("Abs", "b", "c")]
    before, after = cleaned(steps, {"x": ["n"]}, "y a b c")
    assert operators(after) == {"Identity": 1, "Neg": 2, "Abs": 1}
    assert_same_meaning(before, after, {"x": random(3)}, 0)


def test_casts_cancel_only_through_a_wider_type() -> None:
    for middle, kept in ((1, 0), (7, 2)):
        steps = [("Cast", "x", "m", {"to": middle}), ("Cast", "m", "z", {"to": 10}),
                 ("Neg", "z", "y")]  # fmt: skip
        kinds = {"x": "h", "y": "h"}
        before, after = cleaned(steps, {"x": ["n"]}, kinds=kinds)
        assert operators(after)["Cast"] == kept
        assert_same_meaning(before, after, {"x": 9 * random(5).astype(np.float16)}, 0)


def test_equal_nodes_are_computed_once_and_random_ones_are_not() -> None:
    steps = [("Neg", "x", "a"), ("Neg", "x", "b"), ("Mul", "a b", "y")]
    graph = build(steps, {"x": ["n"]})
    assert operators(rewritten(common.rewrite, graph)) == {"Neg": 1, "Mul": 1}
    noise = {"dtype": 1}
    steps = [("RandomNormalLike", "x", "a", noise), ("RandomNormalLike", "x", "b", noise),
             ("Mul", "a b", "y")]  # fmt: skip
    graph = build(steps, {"x": ["n"]})
    assert rewritten(common.rewrite, graph) is graph
    steps = [("Slice", "x a b", "p"), ("Slice", "x c b", "q"), ("Add", "p q", "y")]
    weights = {"a": np.array([0]), "b": np.array([2]), "c": np.array([1])}
    graph = build(steps, {"x": [3]}, "y", weights)
    assert operators(rewritten(common.rewrite, graph))["Slice"] == 2


SIZES: list[Step] = [
    ("Shape", "x", "s"), ("Gather", "s one", "t"), ("Unsqueeze", "t zero", "t1"),
    ("Concat", "minus t1 four", "wanted", {"axis": 0}), ("Shape", "wanted", "rank"),
    ("ConstantOfShape", "rank", "ones", {"value": onnx.numpy_helper.from_array(np.array([1]))}),
    ("Mul", "ones minus0", "none"), ("Equal", "wanted none", "unset"),
    ("Where", "unset ones wanted", "target"), ("Reshape", "x wanted", "y"),
    ("Expand", "y target", "z"),
]  # fmt: skip


def test_shape_arithmetic_of_exporters_goes() -> None:
    weights = {"one": np.array(1), "zero": np.array([0]), "minus": np.array([-1]),
               "four": np.array([4]), "minus0": np.array(-1)}  # fmt: skip
    before, after = cleaned(SIZES, {"x": [1, "t", 2, 2]}, "y", weights=weights)
    assert operators(after) == {"Reshape": 1}
    for t in (1, 5):
        assert_same_meaning(before, after, {"x": random(1, t, 2, 2)}, 0)


def test_values_that_bodies_use_are_kept() -> None:
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["hidden"], ["o"])], "then", [],
        [onnx.helper.make_tensor_value_info("o", 1, None)],
    )  # fmt: skip
    steps = [("Identity", "x", "hidden"), ("Abs", "x", "unused"),
             ("If", "c", "y", {"then_branch": then, "else_branch": then})]  # fmt: skip
    graph = build(steps, {"x": ["n"], "c": []}, "y", kinds={"c": "b"}, opset=16)
    after = rewritten(clean, graph)
    assert operators(after) == {"Identity": 1, "If": 1}
    assert operators(rewritten(dead.rewrite, graph)) == {"Identity": 1, "If": 1}
    assert operators(rewritten(identity.rewrite, graph))["Identity"] == 1


# --- Attention's keys and values


def attention_graph(
    causal: int = 0, axis: int = 2, again: bool = False, repeat: int = 2, merged: int = 4
) -> Graph:
    steps: list[Step] = [
        ("Concat", "pk k", "keys", {"axis": axis}), ("Concat", "pv v", "values", {"axis": axis}),
    ]  # fmt: skip
    for name in ("keys", "values"):
        steps += [("Unsqueeze", f"{name} two", f"{name}5"),
                  ("Expand", f"{name}5 wide", f"{name}6"),
                  ("Reshape", f"{name}6 merged", f"{name}4")]  # fmt: skip
    steps.append(("Attention", "q keys4 values4", "y", {"is_causal": causal, "scale": 0.5}))
    kv = [1, 2, "s", 8]
    inputs = {"q": [1, 4, "t", 8], "k": kv, "v": kv, "pk": [1, 2, "p", 8], "pv": [1, 2, "p", 8]}
    weights = {"two": np.array([2]), "wide": np.array([1, 1, repeat, 1, 1]),
               "merged": np.array([1, merged, -1, 8])}  # fmt: skip
    if again:
        steps.insert(2, ("ReduceMax", "keys", "top", {"keepdims": 0}))
        steps[-1] = ("Attention", "q2 keys4 values4", "y", {"scale": 0.5})
        steps.insert(3, ("Mul", "q top", "q2"))
    return build(steps, inputs, "y keys values", weights, 23)


def attention_feeds(past_length: int) -> dict[str, Any]:
    kv = {n: random(1, 2, 3, 8, seed=i) for i, n in enumerate("kv")}
    cache = {n: random(1, 2, past_length, 8, seed=i) for i, n in enumerate(("pk", "pv"))}
    return {"q": random(1, 4, 3, 8), **kv, **cache}


@pytest.mark.parametrize("past_length", [0, 4])
def test_attention_takes_keys_unrepeated_and_appends_them_itself(past_length: int) -> None:
    before = attention_graph()
    after = rewritten(optimize, before)
    assert operators(after) == {"Attention": 1}
    assert after.nodes[0].inputs == ("q", "k", "v", "", "pk", "pv")
    assert after.nodes[0].outputs == ("y", "keys", "values")
    assert_same_meaning(before, after, attention_feeds(past_length))


@pytest.mark.parametrize(
    "graph", [attention_graph(causal=1), attention_graph(axis=1), attention_graph(again=True)]
)
def test_append_is_left_where_the_operator_would_mean_something_else(graph: Graph) -> None:
    assert rewritten(past.rewrite, rewritten(grouped.rewrite, graph)).nodes[0].op_type == "Concat"


def test_heads_merged_in_another_way_are_left() -> None:
    graph = attention_graph(repeat=2, merged=2)
    assert rewritten(grouped.rewrite, graph) is graph


# --- The cache


def declared(inputs: list[str], outputs: list[str], *nodes: Node) -> Graph:
    shape = (1, 2, "past", 8)
    return Graph(
        nodes, tuple(Value(i, "float32", shape) for i in inputs),
        tuple(Value(o, "float32", shape) for o in outputs), {}, {"": 23},
    )  # fmt: skip


def pairs(graph: Graph) -> list[tuple[str, str, str]]:
    return [(p.past_input, p.present_output, p.kind) for p in find_cache(graph)]


@pytest.mark.parametrize(
    ("past_names", "present_names"),
    [
        (["pkv0", "pkv1"], ["opkv0", "opkv1"]),
        (
            ["past_key_values.0.key", "past_key_values.0.value"],
            ["present.0.key", "present.0.value"],
        ),
        (["past.7.key", "past.7.value"], ["present.7.key", "present.7.value"]),
    ],
)
def test_cache_is_known_by_its_names(past_names: list[str], present_names: list[str]) -> None:
    graph = declared(["x", *past_names], ["y", *reversed(present_names)])
    kinds = ("key", "value")
    assert pairs(graph) == list(zip(past_names, present_names, kinds, strict=True))


def test_cache_is_known_by_what_is_computed() -> None:
    append = [Node("Concat", (f"c{i}", f"new{i}"), (f"d{i}",), {"axis": 2}) for i in (1, 2)]
    turn = Node("Transpose", ("d1",), ("kt",), {"perm": (0, 1, 3, 2)})
    product = Node("MatMul", ("p", "d2"), ("y",))
    graph = declared(["c1", "c2"], ["d1", "d2"], *append, turn, product)
    assert pairs(graph) == [("c1", "d1", "key"), ("c2", "d2", "value")]
    node = Node("Attention", ("q", "k", "v", "", "c2", "c1"), ("y", "e2", "e1"))
    assert pairs(declared(["c1", "c2"], ["e1", "e2"], node)) == [
        ("c1", "e1", "value"), ("c2", "e2", "key"),
    ]  # fmt: skip


def test_a_graph_without_a_cache_has_none() -> None:
    join = Node("Concat", ("a", "b"), ("y",), {"axis": 1})
    assert pairs(declared(["a", "b", "pkv0"], ["y"], join)) == []


# --- Some positions


@pytest.mark.parametrize("tail", [[], [("Div", "h cap", "i"), ("Tanh", "i", "j")]])
def test_logit_rows_go_back_to_the_product(tail: list[Step]) -> None:
    steps = [("Abs", "x", "a"), ("MatMul", "a w", "g"), ("Add", "g b", "h"), *tail,
             ("Cast", "j" if tail else "h", "logits", {"to": 1})]  # fmt: skip
    weights = {"w": random(6, 9), "b": random(9), "cap": np.float32(3)}
    before = build(steps, {"x": [1, "t", 6]}, "logits", weights)
    after = rewrite_logit_rows(before)
    assert operators(after)["Gather"] == 1 and after.nodes[1].op_type == "Gather"
    feeds = {"x": random(1, 5, 6)}
    expected = {"logits": run(before, feeds)["logits"][:, [3, -1]]}
    feeds["logit_rows"] = np.array([3, -1])
    assert_close(run(after, feeds), expected, 1e-6)
    assert_close(run_reference(after, feeds), expected, 1e-6)


@pytest.mark.parametrize(
    ("steps", "output"),
    [
        ([("MatMul", "x w", "y")], "y"),
        ([("MatMul", "x x2", "logits")], "logits"),
        ([("MatMul", "x w", "h"), ("Softmax", "h", "logits", {"axis": 1})], "logits"),
        ([("MatMul", "x w", "h"), ("Add", "h table", "logits")], "logits"),
        ([("MatMul", "x w", "h"), ("Abs", "h", "o"), ("Tanh", "h", "logits")], "logits o"),
    ],
)
def test_logits_that_are_no_plain_product_are_left(steps: list[Step], output: str) -> None:
    weights = {"w": random(6, 6), "table": random(6, 6)}
    graph = build(steps, {"x": [1, 6, 6], "x2": [1, 6, 6]}, output, weights)
    assert rewrite_logit_rows(graph) is graph


# --- Raising the opset


WIDENED = {
    ("Attention", 24), ("Attention", 25), ("AveragePool", 19), ("Cast", 19), ("Cast", 24),
    ("CastLike", 19), ("CastLike", 24), ("DequantizeLinear", 21), ("DequantizeLinear", 23),
    ("GRU", 14), ("LSTM", 14), ("RNN", 14), ("LpPool", 18), ("OptionalHasElement", 18), ("Pad", 18),
    ("QuantizeLinear", 19), ("QuantizeLinear", 21), ("QuantizeLinear", 23), ("Reshape", 14),
    ("Resize", 18), ("ScatterElements", 16), ("ScatterND", 16), ("Shape", 15), ("ArgMax", 12),
    ("ArgMin", 12), ("Constant", 12), ("DequantizeLinear", 13), ("QuantizeLinear", 13),
    ("GatherND", 12), ("Resize", 13),
}  # fmt: skip
"""Versions that added only inputs and attributes whose absence means what it meant before."""


def signature(schema: Any) -> tuple[Any, ...]:
    return (
        [(i.name, i.option) for i in schema.inputs], [(o.name, o.option) for o in schema.outputs],
        sorted((a.name, a.required, str(a.default_value)) for a in schema.attributes.values()),
    )  # fmt: skip


def test_every_changed_signature_is_converted_or_known_to_be_wider() -> None:
    versions: dict[str, list[Any]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            versions.setdefault(schema.name, []).append(schema)
    changed = set()
    for name, schemas in versions.items():
        schemas.sort(key=lambda s: s.since_version)
        for old, new in zip(schemas, schemas[1:], strict=False):
            inside = upgrade.OLDEST < new.since_version <= upgrade.NEWEST
            if inside and signature(old) != signature(new):
                changed.add((name, new.since_version))
    assert changed == WIDENED | set(upgrade.CONVERTERS)


@pytest.mark.parametrize(
    ("step", "old", "feeds"),
    [
        (("ReduceMean", "x", "y", {"axes": [1], "keepdims": 0}), 13, {}),
        (("ReduceMax", "x", "y"), 13, {}),
        (("ReduceSum", "x", "y", {"axes": [-1]}), 11, {}),
        (("Unsqueeze", "x", "y", {"axes": [0, 2]}), 11, {}),
        (("Squeeze", "x", "y", {"axes": [1]}), 12, {"x": random(2, 1, 3)}),
        (("Split", "x", "y z", {"axis": 1, "split": [1, 3]}), 11, {}),
        (("Split", "x", "y z", {"axis": 1}), 13, {}),
        (("Softmax", "x", "y", {"axis": -1}), 11, {}),
    ],
)
@pytest.mark.parametrize("new", [18, 23, 24])
def test_nodes_are_converted(step: Step, old: int, feeds: dict[str, Any], new: int) -> None:
    feeds = feeds or {"x": random(2, 4)}
    before = build([step], {"x": feeds["x"].shape}, step[2], opset=old)
    after = upgrade.raise_opset(before, new)
    assert after is not None and after.opset[""] == new
    assert_same_meaning(before, after, feeds, 1e-6)


@pytest.mark.parametrize(
    ("step", "old"),
    [
        (("Softmax", "x", "y", {"axis": 1}), 11),
        (("GroupNormalization", "x s s", "y", {"num_groups": 1}), 18),
        (("Abs", "x", "y"), 10),
    ],
)
def test_what_cannot_be_raised_stays(step: Step, old: int) -> None:
    weights = {"s": np.ones(1, np.float32)}
    assert upgrade.raise_opset(build([step], {"x": [2, 4, 3]}, "y", weights, old), 23) is None
