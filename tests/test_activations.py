"""What the engine holds while it runs: the liveness bound, in an arena that stays near it."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from pass_graphs import Step, build
from weight_bytes import logical

from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.kernels import buffers
from onnxstream_nb.kernels.buffers import PAGE, SLACK, SMALL, Usage, arena
from onnxstream_nb.liveness import Bound, Lives, bound_for_tokens, cache_slots, token_bound
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import Session
from onnxstream_nb.shapes import Shapes

Array = np.ndarray[Any, Any]


def constants_of(graph: Graph) -> dict[str, Array]:
    return {name: logical(ref) for name, ref in graph.initializers.items()}


def used_by(session: Session, feeds: dict[str, Array]) -> Usage:
    """The arena's peaks in a run, beyond what others hold."""
    session.run(feeds)  # what is made once is made
    gc.collect()
    arena().trim()
    before = arena().usage().live
    arena().reset_peaks()
    session.run(feeds)
    after = arena().usage()
    return Usage(0, after.peak_live - before, 0, after.peak_touched - before)


def without_inputs(graph: Graph, sizes: dict[str, int]) -> int:
    """The bound of what the engine itself holds: feeds are the caller's."""
    lives = Lives(graph, Shapes(graph, sizes, constants_of(graph)))
    inputs = {v.name for v in graph.inputs}
    return max(
        sum(m.nbytes for m in lives.at(step) if m.name not in inputs)
        for step in range(len(graph.nodes))
    )


OPERATORS: list[tuple[str, int, dict[str, Any]]] = [
    ("Add", 2, {}), ("Mul", 2, {}), ("Sub", 2, {}), ("Neg", 1, {}), ("Exp", 1, {}),
    ("Sigmoid", 1, {}), ("Identity", 1, {}), ("Softmax", 1, {}),
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9), st.integers(0, 9)), min_size=1,
                max_size=25), st.integers(1, 3))  # fmt: skip
def test_the_bound_is_what_the_engine_holds(
    picks: list[tuple[int, int, int]], outputs: int
) -> None:
    """Any graph of branches: to the byte, for operators that need nothing beside their results."""
    nodes, names = [], ["x"]
    for i, (which, *sources) in enumerate(picks):
        op_type, count, attributes = OPERATORS[which]
        inputs = tuple(names[-1 - s % len(names)] for s in sources[:count])
        nodes.append(Node(op_type, inputs, (f"v{i}",), attributes))
        names.append(f"v{i}")
    x = Value("x", "float32", (64, 512))
    ends = tuple(Value(name, "float32", None) for name in dict.fromkeys(names[-outputs:]))
    graph = Graph(tuple(nodes), (x,), ends, {}, {"": 18})
    with Session(graph, optimize=False, threads=2) as session:
        used = used_by(session, {"x": np.zeros((64, 512), np.float32)})
    wanted = without_inputs(graph, {})
    assert used.peak_live == wanted
    assert used.peak_touched <= wanted + wanted // SLACK + 2 * PAGE * len(nodes)


def branched(rows: int) -> tuple[Graph, dict[str, Array]]:
    """Two branches of different width over a common input, a split, a concat, and products."""

    def matrix(seed: int, k: int, n: int) -> Array:
        weights = np.random.default_rng(seed).standard_normal((k, n)) / math.sqrt(k)
        return weights.astype(np.float32)

    steps: list[Step] = [
        ("MatMul", "x a", "p"), ("Relu", "p", "q"), ("MatMul", "q b", "r"),
        ("Sigmoid", "x", "s"), ("Mul", "s x", "t"), ("Add", "r t", "u"),
        ("Split", "u", "left right", {"axis": 1}), ("Mul", "left right", "g"),
        ("Concat", "g u", "c", {"axis": 1}), ("MatMul", "c d", "e"), ("Add", "e x", "y"),
    ]  # fmt: skip
    weights = {"a": matrix(0, 256, 1024), "b": matrix(1, 1024, 256), "d": matrix(2, 384, 256)}
    graph = build(steps, {"x": ("n", 256)}, weights=weights)
    return graph, {"x": np.random.default_rng(3).standard_normal((rows, 256)).astype(np.float32)}


@pytest.mark.parametrize("rows", [512, 777])
def test_a_graph_with_branches_stays_near_its_bound(rows: int) -> None:
    graph, feeds = branched(rows)
    with Session(graph, optimize=False, threads=2) as session:
        used = used_by(session, feeds)
        plan = session.plan
    bound = token_bound(plan.graph, plan.constants, rows)
    assert bound.unknown == () and bound.op_type == "Relu"
    assert bound.nbytes == 4 * rows * (256 + 2 * 1024)
    assert used.peak_live <= bound.working == bound_for_tokens(plan, rows)
    assert used.peak_touched <= 1.25 * bound.nbytes


# -- language models

LLAMA = Tiny(hidden=128, intermediate=448, heads=4, kv_heads=2, head_dim=32, layers=3, context=2048)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("liveness") / "m.gguf"
    write_gguf(path, LLAMA, "F16")
    return path


def language_bound(model: LanguageModel, tokens: int, past: int = 0) -> Bound:
    plan = model.session.plan
    return token_bound(plan.graph, plan.constants, tokens, past)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_prompt_stays_near_the_bound(precision: str, llama: Path) -> None:
    """512 tokens: the widest step is the gated feed-forward's, and all that lives is in the arena.
    Working memory of products is in it, too, but not where most is alive."""
    model = LanguageModel(llama, threads=2, precision=precision)
    ids = [i % LLAMA.vocab for i in range(512)]
    model.feed(ids)
    model.rewind(0)
    gc.collect()
    arena().trim()
    before = arena().usage().live
    arena().reset_peaks()
    model.feed(ids)
    used = arena().usage()
    bound = language_bound(model, 512)
    model.close()
    floats = 512 * (3 * LLAMA.intermediate + LLAMA.hidden + 2 * LLAMA.head_dim // 2)
    assert (bound.nbytes, bound.unknown) == (4 * floats + 8, ())  # 8: logit_rows
    small = sum(m.nbytes for m in bound.alive if m.nbytes < SMALL)
    assert used.peak_live - before == bound.nbytes - small
    assert used.peak_touched - before <= 1.25 * bound.nbytes


def test_the_cache_is_not_counted(llama: Path) -> None:
    model = LanguageModel(llama, threads=1)
    slots = cache_slots(model.graph)
    assert slots >= {"past_key_values.0.key", "present.2.value"} and len(slots) == 4 * LLAMA.layers
    assert language_bound(model, 64) == language_bound(model, 64, past=1000)
    model.close()


def test_a_mask_grows_with_what_was_read_before(tmp_path: Path) -> None:
    """A sliding window's distances are (T, P + T) of eight bytes, where a graph runs as it is; a
    language model's attention knows the window by itself."""
    path = tmp_path / "m.gguf"
    write_gguf(path, Tiny(architecture="mistral", window=64, context=4096), "F32")
    with Session(path, threads=1) as session:
        plan = session.plan
        first, later = (
            token_bound(plan.graph, plan.constants, 128, past).nbytes for past in (0, 2000)
        )
    assert later - first >= 8 * 128 * 2000
    model = LanguageModel(path, threads=1)
    assert language_bound(model, 128, 0) == language_bound(model, 128, 2000)
    model.close()


# -- giving back


def test_a_budget_keeps_little_behind_a_prompt(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "SPARE", 64 << 10)
    model = LanguageModel(llama, ram="2GB", context=2048, threads=1)
    arena().trim()
    before = arena().usage().live
    model.feed([i % LLAMA.vocab for i in range(512 + 512 + 476)])
    held = arena().usage()
    assert held.touched - before > 3_000_000
    for i in range(3):
        model.feed([i])
    assert arena().usage().touched - arena().usage().live <= 100_000
    model.close()


def test_a_closed_session_gives_everything_back(llama: Path) -> None:
    model = LanguageModel(llama, threads=1)
    model.feed([i % LLAMA.vocab for i in range(300)])
    model.close()
    del model
    gc.collect()
    arena().trim()
    assert arena().usage().touched == arena().usage().live
    with Session(branched(256)[0]) as session:
        session.run(branched(256)[1])
        assert arena().usage().touched > arena().usage().live
    assert arena().usage().touched <= arena().usage().live + 2 * PAGE
