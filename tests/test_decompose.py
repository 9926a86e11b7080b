"""Fused operators taken apart: the same numbers in onnxruntime, OnnxStream's operators only, and
our passes put them together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny
from pass_graphs import assert_close, build, operators, random

from onnxstream_nb import passes
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.onnxstream.decompose import decompose, foreign
from onnxstream_nb.convert.onnxstream.half_split import half_split
from onnxstream_nb.convert.onnxstream.opset14 import storable
from onnxstream_nb.convert.onnxstream.streamed_llm import streamed
from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.formats.onnx_write import to_model_proto
from onnxstream_nb.graph import Graph
from onnxstream_nb.session import Session, load_graph

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

MODELS = Path(__file__).parent / "fixtures" / "models"


def onnxruntime_of(draft: Draft, feeds: Feeds) -> dict[str, Array]:
    """The outputs as onnxruntime computes them, after the checker has seen the graph."""
    model = to_model_proto(draft.graph, draft.read)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def ours(graph: Graph, feeds: Feeds, *, optimize: bool = True) -> dict[str, Array]:
    with Session(graph, load="ram", optimize=optimize, precision="exact") as session:
        return {k: np.asarray(v) for k, v in session.run(dict(feeds)).items()}


def taken_apart(graph: Graph, feeds: Feeds, limit: float = 2e-6) -> Graph:
    """The decomposed graph, after all engines gave for it what the fused one gives."""
    after = decompose(Draft(graph))
    assert foreign(after.graph) == [] and after.graph.opset == {"": 14}
    expected = ours(graph, feeds, optimize=False)
    assert_close(onnxruntime_of(after, feeds), expected, limit)
    assert_close(ours(after.graph, feeds), expected, limit)
    return after.graph


def put_together(graph: Graph) -> Any:
    return operators(passes.optimize(graph, Draft(graph).read))


# -- normalisations and activations


@pytest.mark.parametrize("axis", [-1, -2, 1])
@pytest.mark.parametrize("shape", [(1, 3, 37), (2, 1, 8), (1, 5, 3, 16)])
def test_rms_normalization(axis: int, shape: tuple[int, ...]) -> None:
    weight = random(*shape[axis:], seed=1)
    step = ("RMSNormalization", "x w", "y", {"axis": axis, "epsilon": 1e-3})
    before = build([step], {"x": shape}, weights={"w": weight}, opset=23)
    after = taken_apart(before, {"x": random(*shape)})
    if axis == -1:
        assert put_together(after) == {"RMSNormalization": 1}


@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(bias: bool) -> None:
    weights = {"w": random(19, seed=1)} | ({"b": random(19, seed=2)} if bias else {})
    step = ("LayerNormalization", " ".join(["x", *weights]), "y", {"epsilon": 1e-5})
    before = build([step], {"x": [2, "t", 19]}, weights=weights, opset=17)
    after = taken_apart(before, {"x": random(2, 5, 19)})
    assert put_together(after) == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    ("step", "again"),
    [
        (("Gelu", "x", "y"), {"Gelu": 1}),
        (("Gelu", "x", "y", {"approximate": "tanh"}), {"Gelu": 1}),
        (("Swish", "x", "y"), {"Swish": 1}),
        (("Swish", "x", "y", {"alpha": 1.702}), {"Swish": 1}),
        (("Tanh", "x", "y"), {"Tanh": 1}),
        (("Reciprocal", "x", "y"), {"Div": 1}),
    ],
)
def test_activations(step: Any, again: dict[str, int]) -> None:
    before = build([step], {"x": [3, "n"]}, opset=24)
    after = taken_apart(before, {"x": 3 * random(3, 101)})
    assert put_together(after) == again


# -- logic and shapes

NUMBERS = np.array([[1.0, 2.0, np.nan], [3.0, -1.0, 2.0]], np.float32)


@pytest.mark.parametrize("kind", ["f", "i"])
@pytest.mark.parametrize("op_type", ["GreaterOrEqual", "LessOrEqual", "Greater", "Less"])
def test_comparisons(op_type: str, kind: str) -> None:
    x = NUMBERS if kind == "f" else np.nan_to_num(NUMBERS, nan=2.0).astype(np.int64)
    other = np.array([2.0, 2.0, 2.0], np.float32).astype(x.dtype)
    before = build([(op_type, "x o", "y")], {"x": [2, "n"]}, weights={"o": other}, opset=16,
                   kinds={"x": kind, "y": "b"})  # fmt: skip
    taken_apart(before, {"x": x})


@pytest.mark.parametrize("op_type", ["GreaterOrEqual", "LessOrEqual", "Greater", "Less"])
@pytest.mark.parametrize("bound", [-3, 0, 4])
def test_the_distance_of_a_column_to_a_row(op_type: str, bound: int) -> None:
    steps = [("Sub", "column row", "distance"), (op_type, "distance bound", "y")]
    before = build(
        steps, {"column": ["t", 1], "row": ["l"]}, weights={"bound": np.int64(bound)}, opset=16,
        kinds={"column": "i", "row": "i", "y": "b"},
    )  # fmt: skip
    for t, n in ((3, 7), (1, 5), (1, 1)):
        feeds = {"column": np.arange(t)[:, None] + 2, "row": np.arange(n)}
        after = taken_apart(before, feeds)
    assert "Sub" not in operators(after)  # which OnnxStream has for scalars only
    assert "Expand" not in put_together(after)


@pytest.mark.parametrize("step", [("Not", "a", "y"), ("Or", "a b", "y"), ("And", "a b", "y")])
def test_booleans(step: Any) -> None:
    names = step[1].split()
    before = build([step], dict.fromkeys(names, [4]), opset=16, kinds=dict.fromkeys("aby", "b"))
    values = {"a": np.array([0, 0, 1, 1], bool), "b": np.array([0, 1, 0, 1], bool)}
    taken_apart(before, {name: values[name] for name in names})


def test_is_nan() -> None:
    before = build([("IsNaN", "x", "y")], {"x": [2, 3]}, opset=16, kinds={"y": "b"})
    taken_apart(before, {"x": NUMBERS})


@pytest.mark.parametrize(
    "window", [{"start": 1}, {"end": -1}, {"start": -2, "end": 3}, {"start": 1, "end": 9}]
)
def test_shape_of_some_axes(window: dict[str, int]) -> None:
    before = build([("Shape", "x", "y", window)], {"x": ["a", "b", 4]}, opset=16, kinds={"y": "i"})
    taken_apart(before, {"x": random(2, 5, 4)})


@pytest.mark.parametrize(
    ("steps", "weights"),
    [
        ([("Squeeze", "x", "y")], {}),
        ([("ReduceMean", "x a", "y", {"keepdims": 1})], {"a": np.array([-1])}),
        ([("ReduceMax", "x a", "y", {"keepdims": 0})], {"a": np.array([1, 2])}),
        ([("ReduceSum", "x a", "y")], {"a": np.array([2])}),
        ([("Split", "x", "p q", {"axis": 2, "num_outputs": 2}),
          ("Concat", "q p", "y", {"axis": 2})], {}),
        ([("Split", "x s", "p q y", {"axis": -1})], {"s": np.array([1, 2, 4])}),
    ],
)  # fmt: skip
def test_forms_of_newer_opsets(steps: Any, weights: dict[str, Any]) -> None:
    before = build(steps, {"x": [1, 3, 7]}, weights=weights, opset=20)
    after = decompose(Draft(before))
    feeds = {"x": random(1, 3, 7)}
    assert_close(onnxruntime_of(after, feeds), ours(before, feeds, optimize=False), 1e-6)
    names = {o for n in after.graph.nodes for o in n.outputs}
    used = {i for n in after.graph.nodes for i in n.inputs} | {"y"}
    assert names <= used


def test_half_precision_becomes_float32() -> None:
    weight = random(8, 5).astype(np.float16)
    steps = [("MatMul", "x w", "h"), ("Cast", "h", "y", {"to": 1})]
    before = build(steps, {"x": [2, 8]}, weights={"w": weight}, kinds={"x": "h"})
    after = decompose(Draft(before))
    assert [(n.op_type, n.outputs) for n in after.graph.nodes] == [("MatMul", ("y",))]
    ref = after.graph.initializers["w"]
    assert (ref.dtype, ref.encoding) == ("float32", "float16")
    x = random(2, 8, seed=1)
    got = onnxruntime_of(after, {"x": x})["y"]
    np.testing.assert_allclose(got, x @ weight.astype(np.float32), rtol=1e-5, atol=1e-6)


def test_constants_that_the_text_has_no_type_for() -> None:
    weights = {"mask": np.array([True, False]), "n": np.array([3, 4], np.int32)}
    steps = [("Cast", "n", "f", {"to": 1}), ("Where", "mask x f", "y")]
    before = build(steps, {"x": [2]}, weights=weights)
    after = storable(Draft(before))
    assert {r.dtype for r in after.graph.initializers.values()} == {"int64"}
    x = np.array([7, 8], np.float32)
    assert onnxruntime_of(after, {"x": x})["y"].tolist() == [7, 4]
    big = build([("Cast", "d", "f", {"to": 1}), ("Add", "x f", "y")], {"x": [1]},
                weights={"d": np.array([0.1])})  # fmt: skip
    draft = storable(Draft(big))
    with pytest.raises(UnsupportedError, match="no float64, and float32 cannot hold it"):
        draft.read(next(iter(draft.graph.initializers.values())))


# -- rotary embeddings


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [0, 6])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rotary_embedding(interleaved: int, rotated: int, rank: int, tokens: int) -> None:
    shape = [1, "t", 30] if rank == 3 else [1, 3, "t", 10]
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": rotated}
    if rank == 3:
        attributes["num_heads"] = 3
    half = (rotated or 10) // 2
    step = ("RotaryEmbedding", "x c s", "y", attributes)
    before = build([step], {"x": shape, "c": [1, "t", half], "s": [1, "t", half]}, opset=23)
    angles = random(1, tokens, half, seed=1)
    x = random(1, tokens, 30) if rank == 3 else random(1, 3, tokens, 10)
    after = taken_apart(before, {"x": x, "c": np.cos(angles), "s": np.sin(angles)})
    again = put_together(after)
    assert again["RotaryEmbedding"] == 1 and not {"Mul", "Neg"} & again.keys()
    assert "Slice" not in again or (interleaved and rotated)


def test_rotary_embedding_by_positions() -> None:
    step = ("RotaryEmbedding", "x c s p", "y", {})
    angles = random(20, 4)
    weights = {"c": np.cos(angles), "s": np.sin(angles)}
    before = build([step], {"x": [2, 3, "t", 8], "p": [2, "t"]}, weights=weights, opset=23,
                   kinds={"p": "i"})  # fmt: skip
    positions = np.array([[3, 4, 5], [0, 19, 7]])
    taken_apart(before, {"x": random(2, 3, 3, 8), "p": positions})


@pytest.mark.parametrize("rotated", [0, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_take_the_order_of_halves(rotated: int, bias: bool) -> None:
    heads = {"q": 4, "k": 2, "v": 2}
    steps: list[Any] = []
    weights = {f"w{n}": random(7, 10 * h, seed=ord(n)) for n, h in heads.items()}
    if bias:
        weights |= {f"b{n}": random(10 * h, seed=ord(n) + 9) for n, h in heads.items()}
    for name, count in heads.items():
        steps.append(("MatMul", f"x w{name}", f"m{name}"))
        steps.append(("Add", f"m{name} b{name}", f"p{name}") if bias else
                     ("Identity", f"m{name}", f"p{name}"))  # fmt: skip
        if name != "v":
            attributes = {"interleaved": 1, "num_heads": count, "rotary_embedding_dim": rotated}
            steps.append(("RotaryEmbedding", f"p{name} c s", f"r{name}", attributes))
    steps.append(("Attention", "rq rk pv", "y", {"q_num_heads": 4, "kv_num_heads": 2}))
    half = (rotated or 10) // 2
    shapes = {"x": [1, "t", 7], "c": [1, "t", half], "s": [1, "t", half]}
    draft = Draft(build(steps, shapes, weights=weights, opset=23))
    draft = draft.with_(passes.clean(draft.graph, draft.read))
    after = half_split(draft)
    rotations = [n for n in after.graph.nodes if n.op_type == "RotaryEmbedding"]
    assert len(rotations) == 2 and not any(n.attributes.get("interleaved") for n in rotations)
    assert after.made.keys() == {"wq", "wk"} | ({"bq", "bk"} if bias else set())
    angles = random(1, 5, half)
    feeds = {"x": random(1, 5, 7), "c": np.cos(angles), "s": np.sin(angles)}
    assert_close(onnxruntime_of(after, feeds), onnxruntime_of(draft, feeds), 1e-6)


def test_projections_that_others_read_keep_their_order() -> None:
    steps = [("MatMul", "x w", "q"),
             ("RotaryEmbedding", "q c s", "r", {"interleaved": 1, "num_heads": 2}),
             ("Attention", "r r q", "y", {"q_num_heads": 2, "kv_num_heads": 2})]  # fmt: skip
    shapes = {"x": [1, "t", 8], "c": [1, "t", 2], "s": [1, "t", 2]}
    draft = Draft(build(steps, shapes, weights={"w": random(8, 8)}, opset=23))
    assert half_split(draft).graph is draft.graph


# -- attention


def attention_graph(
    inputs: str = "q k v", rank: int = 4, heads: tuple[int, int] = (4, 4), past: bool = False,
    mask: Any = None, mask_kind: str = "f", **attributes: Any,
) -> Graph:  # fmt: skip
    h, kv = heads
    shapes: dict[str, Any] = {"q": [1, h, "t", 6], "k": [1, kv, "s", 6], "v": [1, kv, "s", 10]}
    if rank == 3:
        attributes |= {"q_num_heads": h, "kv_num_heads": kv}
        shapes = {"q": [1, "t", h * 6], "k": [1, "s", kv * 6], "v": [1, "s", kv * 10]}
    if mask is not None:
        shapes["m"], inputs = mask, f"{inputs} m"
    outputs = "y"
    if past:
        inputs += " pk pv" if mask is not None else "  pk pv"
        shapes |= {"pk": [1, kv, "p", 6], "pv": [1, kv, "p", 10]}
        outputs = "y nk nv"
    step = ("Attention", inputs, outputs, attributes)
    graph = build([step], shapes, outputs, opset=23, kinds={"m": mask_kind})
    whole: dict[str, Any] = {"y": [1, "t", h * 10] if rank == 3 else [1, h, "t", 10]}
    whole |= {"nk": [1, kv, "n", 6], "nv": [1, kv, "n", 10]}
    return graph.with_(outputs=tuple(replace(o, shape=tuple(whole[o.name])) for o in graph.outputs))


def attention_feeds(graph: Graph, t: int, s: int, p: int = 0) -> dict[str, Array]:
    sizes = {"t": t, "s": s, "p": p, "l": p + s}
    feeds = {}
    for i, value in enumerate(graph.inputs):
        shape = [sizes[d] if isinstance(d, str) else d for d in value.shape or ()]
        array = random(*shape, seed=i)
        feeds[value.name] = array > -0.3 if value.dtype == "bool" else array
        if value.dtype == "bool":
            feeds[value.name][..., 0] = True  # no query without a key
    return feeds


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (5, 5), (2, 7)])
def test_attention(rank: int, heads: tuple[int, int], t: int, s: int) -> None:
    before = attention_graph(rank=rank, heads=heads)
    after = taken_apart(before, attention_feeds(before, t, s))
    again = put_together(after)
    assert again["Attention"] == 1 and not {"Softmax", "MatMul", "Concat"} & again.keys()


@pytest.mark.parametrize(
    "attributes",
    [{}, {"scale": 0.7}, {"softcap": 2.5}, {"is_causal": 1}, {"is_causal": 1, "softcap": 3.0}],
    ids=str,
)
@pytest.mark.parametrize(("t", "p"), [(1, 0), (1, 9), (4, 0), (4, 9)])
def test_attention_with_a_past(attributes: dict[str, Any], t: int, p: int) -> None:
    before = attention_graph(heads=(6, 2), rank=3, past=True, **attributes)
    after = taken_apart(before, attention_feeds(before, t, t, p))
    again = put_together(after)
    assert again["Attention"] == 1 and not {"Softmax", "MatMul", "Expand"} & again.keys()


@pytest.mark.parametrize("shape", [["t", "l"], [1, 1, "t", "l"], [1, 4, "t", "l"], [1, 1, 1, "l"]])
@pytest.mark.parametrize("kind", ["f", "b"])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_with_masks(shape: list[Any], kind: str, causal: int) -> None:
    before = attention_graph(past=True, mask=shape, mask_kind=kind, is_causal=causal)
    for t, p in ((1, 6), (3, 0), (3, 6)):
        after = taken_apart(before, attention_feeds(before, t, t, p))
    assert put_together(after)["Attention"] == 1


def test_what_cannot_be_taken_apart() -> None:
    step = ("Attention", "q k v", "y   z", {})
    shape = [1, 2, "t", 4]
    before = build([step], dict.fromkeys("qkv", shape), "y z", opset=23)
    with pytest.raises(UnsupportedError, match="Attention 'y' cannot be written.*scores are used"):
        decompose(Draft(before))
    before = build([("Attention", "q k v", "y")], {"q": [1, "h", "t", 4], "k": shape, "v": shape},
                   opset=23)  # fmt: skip
    with pytest.raises(UnsupportedError, match="number of heads is not a fixed size"):
        decompose(Draft(before))
    before = build([("Mish", "x", "y")], {"x": [3]}, opset=20)
    with pytest.raises(UnsupportedError, match="Mish 'y': no operator of opset 14"):
        decompose(Draft(before))
    steps = [("Resize", "x  s", "y", {"antialias": 1, "mode": "linear"})]
    before = build(steps, {"x": [1, 1, 4, 4]}, weights={"s": np.ones(4, np.float32)}, opset=18)
    with pytest.raises(UnsupportedError, match="opset 14 has no attribute 'antialias'"):
        decompose(Draft(before))


# -- whole language models


def feeds_of(graph: Graph, ids: list[int], past: Mapping[str, Array]) -> dict[str, Array]:
    """A step's feeds; `past` gives the cache by OnnxStream's names or is empty."""
    length = next(iter(past.values())).shape[2] if past else 0
    known = {
        "input_ids": np.array([ids]),
        "position_ids": np.arange(length, length + len(ids))[None],
        "attention_mask": np.ones((1, length + len(ids)), np.int64),
    }
    feeds = {}
    for value in graph.inputs:
        empty = [n if isinstance(n, int) else 0 for n in value.shape or ()]
        array = known[value.name] if value.name in known else past.get(value.name)
        feeds[value.name] = np.zeros(empty, np.float32) if array is None else array
    return feeds


def in_steps(run: Any, graph: Graph, ids: list[int], sizes: tuple[int, ...]) -> Array:
    """Logits (T, V) of ids read in several steps, the cache fed back."""
    pairs = passes.find_cache(graph)
    past: dict[str, Array] = {}
    rows = []
    for size in sizes:
        step, ids = ids[:size], ids[size:]
        results = run(feeds_of(graph, step, past))
        past = {p.past_input: results[p.present_output] for p in pairs}
        rows.append(results["logits"][0])
    return np.concatenate(rows)


IDS = [1, 5, 9, 33, 7, 2, 60, 41, 17]
GEOMETRIES = {
    "gqa, interleaved": Tiny(heads=6, kv_heads=2, head_dim=8),
    "qk norm": Tiny("qwen3", heads=4, kv_heads=2, head_dim=8, tied=True),
    "biases": Tiny("qwen2", heads=4, kv_heads=4, head_dim=10),
}


def assert_streamed(draft: Draft, sizes: tuple[int, ...]) -> Graph:
    after = streamed(draft)
    names = [v.name for v in after.graph.inputs]
    count = len(passes.find_cache(draft.graph))
    cache = [f"pkv{i}" for i in range(count)]
    assert names == ["input_ids", "attention_mask", "position_ids", *cache]
    assert [v.name for v in after.graph.outputs] == ["logits", *(f"o{n}" for n in cache)]
    assert foreign(after.graph) == []
    wanted = in_steps(lambda f: ours(draft.graph, f), draft.graph, IDS, (len(IDS),))
    for run in (
        lambda f: onnxruntime_of(after, f),
        lambda f: ours(after.graph.with_(initializers=in_memory(after)), f),
    ):
        got = in_steps(run, after.graph, IDS, sizes)
        assert np.abs(got - wanted).max() <= 5e-6 * np.abs(wanted).max()
    return after.graph


def in_memory(draft: Draft) -> dict[str, Any]:
    """Initializers of which none is left to be made."""
    from onnxstream_nb.passes.rewriting import constant_ref

    refs = draft.graph.initializers
    return {n: constant_ref(n, draft.read(r)) if n in draft.made else r for n, r in refs.items()}


@pytest.mark.parametrize("sizes", [(9,), (4, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gguf_models(geometry: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", GEOMETRIES[geometry], "F16")
    graph = assert_streamed(Draft(load_graph(tmp_path / "m.gguf")), sizes)
    assert not [n for n in graph.nodes if n.attributes.get("perm") == (0, 1, 2, 4, 3)]


@pytest.mark.parametrize("sizes", [(9,), (1, 5, 3)], ids=str)
def test_sliding_windows(sizes: tuple[int, ...], tmp_path: Path) -> None:
    tiny = Tiny("mistral", window=4, heads=4, kv_heads=2)
    write_hf(tmp_path / "m", tiny)
    graph = assert_streamed(Draft(load_graph(tmp_path / "m")), sizes)
    assert {n.op_type for n in graph.nodes} >= {"Less", "Greater", "And"}


def test_a_streamed_model_is_fused_as_its_source_is(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Tiny(heads=6, kv_heads=2, head_dim=8), "F16")
    draft = streamed(Draft(load_graph(tmp_path / "m.gguf")))
    again = operators(passes.optimize(draft.graph, draft.read))
    assert again["Attention"] == 2 and again["RotaryEmbedding"] == 4
    assert again["RMSNormalization"] == 5 and again["MatMul"] == 15 and again["Swish"] == 2
    assert not {"Softmax", "Reshape", "Transpose", "Expand", "Neg", "Slice"} & again.keys()


def test_the_keys_of_a_cache_and_where_padding_hides_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Tiny(), "F32")
    draft = streamed(Draft(load_graph(tmp_path / "m.gguf")))
    feeds = feeds_of(draft.graph, IDS, {})
    feeds["attention_mask"] = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    feeds["position_ids"] = np.array([[0, 0, 0, 1, 2, 3, 4, 5, 6]])
    padded = onnxruntime_of(draft, feeds)["logits"][0, 2:]
    alone = onnxruntime_of(draft, feeds_of(draft.graph, IDS[2:], {}))["logits"][0]
    np.testing.assert_allclose(padded, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23"])
def test_exports(name: str) -> None:
    """An export in either form: the names stay OnnxStream's, and the numbers PyTorch's."""
    draft = Draft(load_graph(MODELS / name / "model.onnx"))
    after = streamed(draft)
    assert foreign(after.graph) == []
    for path in sorted((MODELS / name).glob("case*.npz")):
        with np.load(path) as data:
            given = {k.removeprefix("in__"): data[k] for k in data if k.startswith("in__")}
            wanted = {k.removeprefix("out__"): data[k] for k in data if k.startswith("out__")}
        got = onnxruntime_of(after, given)
        assert_close(got, wanted, 1e-4)


def test_operators_tell_where_they_belong(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", Tiny(), "F32")
    names = [n.name for n in streamed(Draft(load_graph(tmp_path / "m.gguf"))).graph.nodes]
    assert "/model/layers.0/input_layernorm/Pow" in names
    assert "/model/layers.1/post_attention_layernorm/Sqrt" in names
    assert "/model/layers.1/self_attn/Softmax" in names
    angles = [n for n in names if "rotary_emb/input_layernorm/" in n]  # computed in float32 there
    assert [n.split("/")[-1].split("_")[0] for n in angles] == [
        "Cast", "Unsqueeze", "Mul", "Cos", "Sin",
    ]  # fmt: skip
