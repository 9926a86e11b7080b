"""Sliding windows: told to Attention by a pass, and followed by tokens that are replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny, close, dense, logits, run_in_steps

from onnxstream_nb.formats.gguf import read
from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.kernels.attention_calls import window_mask
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.lowering import _Host
from onnxstream_nb.passes import optimize, rewrite_windows

IDS = [3, 17, 5, 40, 2, 9, 11]
TINY = Tiny(window=5, context=512)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", TINY)
    return tmp_path / "tiny.gguf"


def attentions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op_type == "Attention"]


def rewritten(graph: Graph) -> Graph:
    return rewrite_windows(optimize(graph, dense), dense)


# -- the pass


def test_mask_becomes_a_window(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf", TINY)
    graph = rewritten(read(tmp_path / "tiny.gguf"))
    assert [(n.inputs[3], n.attributes["is_causal"], n.attributes["left_window_size"])
            for n in attentions(graph)] == [("", 1, 4)] * 2  # fmt: skip
    assert graph.opset[""] == 25
    assert not {n.op_type for n in graph.nodes} & {"Range", "And", "Less", "Shape"}
    ids = [*IDS, *range(20, 26)]
    close(run_in_steps(graph, ids, [7, 1, 5]), logits(TINY, weights, ids))


def test_graph_without_windows_stays_as_it_is(path: Path) -> None:
    write_gguf(path, Tiny())
    graph = optimize(read(path), dense)
    assert rewrite_windows(graph, dense) is graph


def constant(graph: Graph, name: str, value: int) -> Graph:
    data = np.int64(value).tobytes()
    ref = WeightRef(name, (), "int64", data, nbytes=len(data))
    return graph.with_(initializers={**graph.initializers, name: ref})


def swapped(graph: Graph, output: str, **changes: object) -> Graph:
    nodes = (replace(n, **changes) if n.outputs[0] == output else n for n in graph.nodes)
    return graph.with_(nodes=tuple(nodes))


def test_other_masks_stay(path: Path) -> None:
    """Each differs from a window in one place."""
    graph = optimize(read(path), dense)
    others = [
        constant(graph, "mask.zero", 1),
        constant(graph, "mask.one", 2),
        constant(graph, "mask.window_5", 0),
        swapped(graph, "mask.causal", op_type="Greater"),
        swapped(graph, "mask.near_5", op_type="LessOrEqual"),
        swapped(graph, "mask.sliding_5", op_type="Or"),
        swapped(graph, "mask.queries", inputs=("mask.zero", "mask.total", "mask.one")),
        swapped(graph, "mask.keys", inputs=("mask.past", "mask.total", "mask.one")),
        swapped(graph, "mask.distance", inputs=("mask.keys", "mask.column")),
    ]
    for other in others:
        assert rewrite_windows(other, dense) is other


# -- the mask of many tokens


@pytest.mark.parametrize(
    ("before", "queries", "left"), [(0, 1, 0), (0, 6, 2), (9, 4, 3), (2, 5, 99)]
)
def test_band_is_the_mask(before: int, queries: int, left: int) -> None:
    keys = before + queries
    back = np.arange(before, keys)[:, None] - np.arange(keys)
    wanted = np.where((back >= 0) & (back <= left), np.float32(0), np.float32(-np.inf))
    np.testing.assert_array_equal(window_mask(before, queries, keys, left)[0, 0], wanted)


# -- tokens


@pytest.mark.parametrize("kv_cache", ["f16", "q8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_replayed_tokens_equal_plain_ones(path: Path, threads: int, kv_cache: str) -> None:
    fast = LanguageModel(path, load="mmap", threads=threads, kv_cache=kv_cache)
    slow = LanguageModel(path, load="stream", threads=threads, kv_cache=kv_cache)
    slow.session._recordings_left = 0
    fast.feed([1])
    recorded = fast.session._replay
    assert recorded is not None
    hosts = [part.step.node.op_type for part in recorded._parts if isinstance(part, _Host)]
    assert "Attention" not in hosts
    fast.rewind(0)
    for model in (fast, slow):
        model.feed(IDS)
    for i in range(300):  # until whole blocks of keys are hidden
        np.testing.assert_array_equal(fast.feed([i % 60]), slow.feed([i % 60]))
    for model in (fast, slow):
        model.rewind(3)
    np.testing.assert_array_equal(fast.feed([8]), slow.feed([8]))
    assert fast.session._replay is recorded
    for model in (fast, slow):
        model.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_far_behind_the_window(tmp_path: Path, threads: int) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf", TINY)
    ids = [7 * i % 60 for i in range(300)]
    model = LanguageModel(tmp_path / "tiny.gguf", threads=threads, precision="exact")
    model.feed(ids[:290])
    rows = np.stack([model.feed([token]).copy() for token in ids[290:]])
    wanted = logits(TINY, weights, ids)[290:]
    assert np.abs(rows - wanted).max() <= 2e-3 * np.abs(wanted).max()  # the cache has 11 bits
    model.close()


def test_tokens_forget_what_the_window_has_left(path: Path) -> None:
    """With two layers a token depends on the 8 before it and on nothing else."""
    model = LanguageModel(path, threads=1)
    rows = []
    for first in (1, 60):
        model.rewind(0)
        model.feed([first])
        rows.append([model.feed([token]).copy() for token in range(2, 14)])
    changed = [bool((a != b).any()) for a, b in zip(*rows, strict=True)]
    assert changed == [True] * 8 + [False] * 4
    model.close()
