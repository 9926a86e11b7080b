"""All passes together, on exports of language models: the plan they give, and its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pass_graphs import assert_close, operators, run, run_reference
from weight_bytes import logical

from onnxstream_nb.formats import load
from onnxstream_nb.formats.onnx import to_model_proto
from onnxstream_nb.graph import Graph
from onnxstream_nb.passes import find_cache, optimize, rewrite_logit_rows

MODELS = Path(__file__).parent / "fixtures" / "models"
EXPORTS = ["llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23"]
TEXT = "onnxstream_llama_small"
LAYERS = 2


def model(name: str) -> Graph:
    path = MODELS / name
    return load(path if name == TEXT else path / "model.onnx")


def cases(name: str) -> list[Path]:
    found = sorted((MODELS / name).glob("case*.npz"))
    assert found
    return found


def feeds_and_references(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(path) as arrays:
        feeds = {k[4:]: arrays[k] for k in arrays.files if k.startswith("in__")}
        references = {k[5:]: arrays[k] for k in arrays.files if k.startswith("out__")}
    return feeds, references


def language_model_feeds(ids: int, past: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, 300, (1, ids)),
        "attention_mask": np.ones((1, past + ids), np.int64),
        "position_ids": np.arange(past, past + ids)[None],
        **{f"pkv{i}": rng.standard_normal((1, 2, past, 16)).astype(np.float32) for i in range(4)},
    }


@pytest.mark.parametrize("name", EXPORTS)
def test_results_are_the_references(name: str) -> None:
    graph = optimize(model(name), logical)
    onnx.checker.check_model(to_model_proto(graph, logical), full_check=True)
    for path in cases(name):
        feeds, references = feeds_and_references(path)
        assert_close(run(graph, feeds), references, 1e-5)
        assert_close(run_reference(graph, feeds), references, 1e-5)


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
@pytest.mark.parametrize(("ids", "past"), [(1, 0), (7, 0), (1, 1), (3, 13)])
def test_results_are_those_before(name: str, ids: int, past: int) -> None:
    before, feeds = model(name), language_model_feeds(ids, past)
    after = optimize(before, logical)
    expected = run(before, feeds)
    assert_close(run(after, feeds), expected, 1e-5)
    assert_close(run_reference(after, feeds), expected, 1e-5)


@pytest.mark.parametrize("name", EXPORTS)
def test_masked_tokens_stay_masked(name: str) -> None:
    """A row that sees nothing at all is 0, by IsNaN before and by the operator after."""
    before, feeds = model(name), language_model_feeds(5, 3)
    feeds["attention_mask"][0, :5] = 0
    expected = run(before, feeds)
    assert all(np.isfinite(a).all() for a in expected.values())
    assert_close(run(optimize(before, logical), feeds), expected, 1e-5)


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_plan_is_the_fused_one(name: str) -> None:
    graph = optimize(model(name), logical)
    found = operators(graph)
    assert found["Attention"] == LAYERS
    assert found["RotaryEmbedding"] == 2 * LAYERS
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["Swish"] == LAYERS
    assert found["MatMul"] == 7 * LAYERS + 1
    for gone in ("Softmax", "Transpose", "Pow", "ReduceMean", "Sigmoid", "Neg", "IsNaN"):
        assert gone not in found
    assert graph.opset[""] == 24


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_layers_hold_no_shape_arithmetic(name: str) -> None:
    graph = optimize(model(name), logical)
    starts = [i for i, n in enumerate(graph.nodes) if n.op_type == "Attention"]
    between = operators(graph.with_(nodes=graph.nodes[starts[0] : starts[1]]))
    assert between == {
        "Attention": 1, "Add": 2, "MatMul": 7, "RMSNormalization": 2, "RotaryEmbedding": 2,
        "Swish": 1, "Mul": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_attention_takes_over_the_cache(name: str) -> None:
    graph = optimize(model(name), logical)
    for layer, node in enumerate(n for n in graph.nodes if n.op_type == "Attention"):
        key, value = 2 * layer, 2 * layer + 1
        assert node.inputs[4:6] == (f"pkv{key}", f"pkv{value}")
        assert node.outputs[1:3] == (f"opkv{key}", f"opkv{value}")
        assert (node.attributes["q_num_heads"], node.attributes["kv_num_heads"]) == (4, 2)
        assert node.attributes["scale"] == pytest.approx(0.25)


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_cache_is_found_before_and_after(name: str) -> None:
    before = model(name)
    pairs = find_cache(before)
    assert [(p.past_input, p.present_output, p.kind) for p in pairs] == [
        (f"pkv{i}", f"opkv{i}", "value" if i % 2 else "key") for i in range(2 * LAYERS)
    ]
    assert find_cache(optimize(before, logical)) == pairs


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
@pytest.mark.parametrize("rows", [[-1], [5], [0, 3, 4], [-2, -1, 0, 0], []])
def test_logits_of_rows_are_those_of_all(name: str, rows: list[int]) -> None:
    graph, feeds = optimize(model(name), logical), language_model_feeds(6, 2)
    expected = run(graph, feeds)
    expected["logits"] = expected["logits"][:, rows]
    picked = rewrite_logit_rows(graph)
    onnx.checker.check_model(to_model_proto(picked, logical), full_check=True)
    assert picked.inputs[-1].name == "logit_rows" and picked.inputs[-1].shape == ("rows",)
    assert picked.outputs[0].shape is not None and picked.outputs[0].shape[1] == "rows"
    feeds["logit_rows"] = np.array(rows, np.int64)
    assert_close(run(picked, feeds), expected, 1e-5)
    assert rewrite_logit_rows(picked) is picked


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_optimizing_twice_changes_nothing(name: str) -> None:
    graph = optimize(model(name), logical)
    assert optimize(graph, logical).nodes == graph.nodes


@pytest.mark.parametrize("name", [*EXPORTS, TEXT])
def test_no_weight_matrix_is_read(name: str) -> None:
    sizes: list[int] = []

    def read(ref: Any) -> Any:
        sizes.append(int(np.prod(ref.shape)))
        return logical(ref)

    optimize(model(name), read)
    assert max(sizes) <= (2048 * 16 if name == TEXT else 128)
