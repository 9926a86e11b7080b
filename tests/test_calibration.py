"""What a model computes on a text, captured piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_llm import BOS, FakeTokenizer
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb import formats
from onnxstream_nb.convert.draft import Draft, placeholder
from onnxstream_nb.convert.quantisation import calibration
from onnxstream_nb.convert.quantisation.calibration import Walk, captured, feeds_of_text
from onnxstream_nb.errors import UnsupportedError, UsageError
from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.session import Session

TINY = Tiny(hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, vocab=300)
TEXT = "It was the best of times, it was the worst of times. " * 4

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Draft:
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, TINY)
    return Draft(formats.load(path))


def test_windows_are_spread_over_the_text(draft: Draft) -> None:
    feeds = list(feeds_of_text(draft.graph, FakeTokenizer(), TEXT, 16, 3))
    ids = list(TEXT.encode())
    step = len(ids) // 16 // 3 * 16
    assert [feed["input_ids"].tolist() for feed in feeds] == [
        [ids[start : start + 16]] for start in (0, step, 2 * step)
    ]
    first = feeds[0]
    assert first.keys() == {value.name for value in draft.graph.inputs}
    np.testing.assert_array_equal(first["position_ids"], [range(16)])
    assert first["past_key_values.0.key"].shape == (1, TINY.kv_heads, 0, TINY.head_dim)


def test_every_window_begins_as_the_models_texts_do(draft: Draft) -> None:
    feeds = feeds_of_text(draft.graph, FakeTokenizer(add_bos=True), TEXT, 8, 2)
    assert [feed["input_ids"][0, 0] for feed in feeds] == [BOS, BOS]


def test_a_text_that_is_too_short_is_refused(draft: Draft) -> None:
    feeds = feeds_of_text(draft.graph, FakeTokenizer(), "short", 16, 3, "notes.txt")
    with pytest.raises(UsageError, match=r"notes\.txt.* 48 tokens .*this text has 5"):
        next(feeds)


def test_an_input_that_no_text_feeds_is_named() -> None:
    graph = Graph((), (Value("pixel_values", "float32", (1, 3)),), (), {}, {"": 21})
    with pytest.raises(UnsupportedError, match="pixel_values"):
        next(feeds_of_text(graph, FakeTokenizer(), TEXT, 4, 1))


def names_of(graph: Graph) -> list[str]:
    return [node.inputs[0] for node in graph.nodes if node.op_type == "MatMul"]


@pytest.mark.parametrize("held", [1, 1 << 30])
def test_captured_values_are_those_of_a_whole_run(
    draft: Draft, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "HELD", held)
    feeds = list(feeds_of_text(draft.graph, FakeTokenizer(), TEXT, 12, 2))
    names = list(dict.fromkeys([*names_of(draft.graph), "logits"]))
    outputs = tuple(Value(name, "", None) for name in names)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for mapping in captured(draft, reversed(names), feeds):
        for name, array in mapping.items():
            found[name].append(array)
    with Session(draft.graph.with_(outputs=outputs), optimize=False) as session:
        wanted = [session.run(feed) for feed in feeds]
    for name in names:
        for got, whole in zip(found[name], wanted, strict=True):
            np.testing.assert_allclose(got, whole[name], rtol=1e-5, atol=1e-6)


def test_a_value_that_the_graph_lacks_is_named(draft: Draft) -> None:
    with pytest.raises(UsageError, match="nothing_like_it"):
        list(captured(draft, ["nothing_like_it"], []))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "float32"])
def test_weights_that_are_made_are_run_with(dtype: str) -> None:
    import ml_dtypes

    values = np.array([[1, 2, 7], [3, 0, 5]])
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    made = values.astype(kind) - (4 if dtype in ("int4", "int8") else 0)
    graph = Graph(
        (Node("Cast", ("w",), ("c",), {"to": 1}), Node("Add", ("x", "c"), ("y",))),
        (Value("x", "float32", (2, 3)),),
        (Value("y", "float32", (2, 3)),),
        {"w": placeholder("w", dtype, (2, 3))},
        {"": 21},
    )
    draft = Draft(graph, {"w": lambda: made})
    (found,) = captured(draft, ["y"], [{"x": np.ones((2, 3), np.float32)}])
    np.testing.assert_array_equal(found["y"], made.astype(np.float32) + 1)


def test_a_walk_goes_on_with_a_changed_draft() -> None:
    def draft(factor: float) -> Draft:
        nodes = tuple(Node("Mul", (f"v{i}", "w"), (f"v{i + 1}",)) for i in range(3))
        graph = Graph(
            nodes, (Value("v0", "float32", (1,)),), (Value("v3", "float32", (1,)),),
            {"w": placeholder("w", "float32", (1,))}, {"": 21},
        )  # fmt: skip
        return Draft(graph, {"w": lambda: np.array([factor], np.float32)})

    walk = Walk(draft(2), [{"v0": np.ones(1, np.float32)}], ["v1", "v3"])
    (first,) = walk.run_to(["v1"])
    (last,) = walk.run_to(["v3"], draft(10))
    assert first["v1"] == 2 and last["v3"] == 200
