"""How `load` and `ram` choose where weights come from, and how long a pass over a prompt is."""

from __future__ import annotations

import gc
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from budget_models import BYTES, PIECE, WORK, runs, summed
from onnx import helper
from onnx_models import make, refusal, value
from weight_files import pieces_of, until

from onnxstream_nb import device, loading
from onnxstream_nb.errors import MemoryBudgetError, UsageError
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.loading import (
    BASE,
    CHUNK,
    LEAST_CHUNK,
    logit_chunk,
    prompt_chunk,
    work_bytes,
)  # fmt: skip
from onnxstream_nb.session import Session
from onnxstream_nb.streaming import MOST_PIECES, READERS, StreamProvider
from onnxstream_nb.weights import MmapProvider, RamProvider


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pieces_of(monkeypatch, PIECE)
    # A pass's arrays count by a formula here, as when their sizes cannot be told.
    monkeypatch.setattr(loading, "bound_for_tokens", lambda plan, tokens: None)
    return summed(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("load", "kind"),
    [("stream", StreamProvider), ("mmap", MmapProvider), ("ram", RamProvider)],
)
def test_by_name(load: str, kind: type[Any], model: Path) -> None:
    with Session(model, load=load) as session:
        assert type(session.provider) is kind
        runs(session, model)


def test_bytes_read_by_each_kind(model: Path) -> None:
    with Session(model, load="ram") as session:
        runs(session, model, times=3)
        assert session.provider.bytes_read == sum(BYTES)  # type: ignore[attr-defined]
    with Session(model, load="stream") as session:
        provider: Any = session.provider
        assert provider.bytes_a_pass == sum(BYTES)
        for passes in (1, 2, 3):
            runs(session, model, times=1)
            ahead = provider.bytes_read - passes * sum(BYTES)
            assert 0 <= ahead <= MOST_PIECES * PIECE


def test_unknown_kind(model: Path) -> None:
    message = refusal(lambda: Session(model, load="disk"), UsageError)
    assert "'disk'" in message and "stream" in message and "mmap" in message


def test_budget_and_mmap(model: Path) -> None:
    message = refusal(lambda: Session(model, load="mmap", ram=10**12), UsageError)
    assert "--ram" in message and "mmap" in message


def test_auto_keeps_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_available", lambda: 10**11)
    with Session(model) as session:
        assert isinstance(session.provider, RamProvider)
        runs(session, model)


@pytest.mark.parametrize("reserve", [0, 123_456])
def test_auto_streams_what_does_not_fit(
    reserve: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in shorter passes, with all weights held; then in buffers."""
    monkeypatch.setattr(device, "current_rss", lambda: 10**9)
    more = WORK + (CHUNK // LEAST_CHUNK - 1) * (WORK - BASE) + reserve + sum(BYTES)
    monkeypatch.setattr(device, "memory_available", lambda: int(more / 0.9) + 2)
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, RamProvider) and session.chunk == CHUNK
    monkeypatch.setattr(device, "memory_available", lambda: int((more - 10) / 0.9))
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, StreamProvider) and not session.provider.bytes_a_pass
        assert session.chunk == CHUNK // 2
        runs(session, model)
    needed = WORK + reserve + sum(BYTES)
    monkeypatch.setattr(device, "memory_available", lambda: int((needed - 10) / 0.9))
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, StreamProvider) and session.provider.bytes_a_pass
        runs(session, model)


def test_a_model_without_weights() -> None:
    proto = make([helper.make_node("Neg", ["x"], ["y"])], [value("x")], [value("y")])
    for load in ("auto", "stream", "mmap", "ram"):
        with Session(proto, load=load) as session:
            np.testing.assert_array_equal(session.run({"x": np.ones(3, "f4")})["y"], -np.ones(3))
    assert "at least" in refusal(lambda: Session(proto, ram=1), MemoryBudgetError)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_session_that_ends_ends_its_threads(how: str, model: Path) -> None:
    before = threading.active_count()
    session: Any = Session(model, load="stream", threads=1)
    assert threading.active_count() == before
    runs(session, model, times=1)
    assert threading.active_count() == before + READERS
    if how == "close":
        session.close()
        assert threading.active_count() == before
    del session
    gc.collect()
    until(lambda: threading.active_count() == before)


# -- prompts


def _products(*shapes: tuple[int, int], last: int = 0, rows: str = "constant") -> Graph:
    """Products of a prompt with matrices (K, N), of some positions with a head (8, `last`)."""

    def ref(name: str, *shape: int, dtype: str = "float32") -> WeightRef:
        return WeightRef(name, shape, dtype, b"", 0, 4 * math.prod(shape))

    refs = {f"W{i}": ref(f"W{i}", *shape) for i, shape in enumerate(shapes)}
    nodes = [Node("MatMul", ("x", name), (f"y{name}",)) for name in refs]
    if last:
        refs |= {"head": ref("head", 8, last), "constant": ref("constant", 1, dtype="int64")}
        nodes.append(Node("Gather", ("x", rows), ("hidden",), {"axis": 1}))
        nodes.append(Node("MatMul", ("hidden", "head"), ("logits",)))
    outputs = tuple(Value(n.outputs[0], "float32", None) for n in nodes)
    inputs = (Value("x", "float32", (1, "t", "k")), Value("rows", "int64", ("r",)))
    return Graph(tuple(nodes), inputs, outputs, refs, {"": 23})


@pytest.mark.parametrize(
    ("shapes", "chunk"),
    [([], 512), ([(576, 1536)], 512), ([(2048, 5632), (5632, 2048)], 512),
     ([(4096, 4096), (4096, 14336)], 128), ([(8192, 28672)], 32), ([(65536, 65536)], 32)],
)  # fmt: skip
def test_a_prompt_is_read_in_pieces_that_a_stop_can_wait_for(
    shapes: list[tuple[int, int]], chunk: int
) -> None:
    """At most 16e9 operations between two looks; the head's matrix sees some positions only."""
    assert prompt_chunk(_products(*shapes)) == chunk
    assert prompt_chunk(_products(*shapes, last=10**9)) == chunk
    assert prompt_chunk(_products(*shapes, last=10**9, rows="rows")) == chunk
    operations = max((2 * chunk * k * n for k, n in shapes), default=0)
    assert chunk == 32 or operations <= 16e9
    assert chunk == 512 or 2 * operations > 16e9


@pytest.mark.parametrize("rows", ["constant", "rows"])
@pytest.mark.parametrize(
    ("vocabulary", "chunk"),
    [(1000, 512), (19192, 512), (19193, 256), (38393, 128), (10**9, 32)],
)
def test_logits_take_no_more_memory_than_a_prompt(vocabulary: int, chunk: int, rows: str) -> None:
    """Twice what the head gives, within five times what the largest product takes and gives."""
    assert logit_chunk(_products((2048, 5632), last=vocabulary, rows=rows)) == chunk


def test_logits_take_no_longer_than_a_prompt() -> None:
    wide = _products((8, 10**9), last=10**9)
    assert (prompt_chunk(wide), logit_chunk(wide)) == (32, 32)
    narrow = _products((2 * 10**6, 1), last=3 * 10**6)
    assert (prompt_chunk(narrow), logit_chunk(narrow)) == (512, 256)
    assert logit_chunk(_products((64, 64))) == 512


def test_a_product_with_rows_of_a_table_is_no_head() -> None:
    graph = _products((8192, 28672), last=1)
    lookup = Node("Gather", ("W0", "rows"), ("x",), {"axis": 0})
    embedded = graph.with_(nodes=(lookup, *graph.nodes), inputs=graph.inputs[1:])
    assert prompt_chunk(embedded) == prompt_chunk(graph) == 32


# -- what a run takes beside its weights


@pytest.mark.parametrize("streams", [False, True])
def test_work_grows_with_what_is_made_for_an_operator(streams: bool) -> None:
    """Softmax takes arrays only: a weight in float16 becomes one of float32 for the call. A stream
    gathers it first; a product takes it in tiles, if its rows fit a buffer."""
    x = Value("x", "float32", (1, 300))
    sizes = {}
    for encoding, each in (("raw", 4), ("float16", 2)):
        ref = WeightRef("W", (300, 300), "float32", b"", 0, each * 90_000, encoding)
        for operator, shape in (("Softmax", ref.shape), ("MatMul", ref.shape),
                                ("MatMul", (3, 100, 300)), ("MatMul", (1, 90_000))):  # fmt: skip
            names = ("W",) if operator == "Softmax" else ("x", "W")
            y = Value("y", "float32", None)
            refs = {"W": WeightRef("W", shape, "float32", bytes(ref.nbytes), 0, ref.nbytes,
                                   encoding)}  # fmt: skip
            graph = Graph((Node(operator, names, ("y",)),), (x,), (y,), refs, {"": 13})
            with Session(graph, optimize=False) as session, pytest.MonkeyPatch.context() as patch:
                pieces_of(patch, 4096)
                patch.setattr(loading, "_activations", lambda plan, chunk: 0)
                sizes[encoding, operator, shape] = work_bytes(session.plan, 0, streams) - BASE
    gathered, floats = (360_000, 180_000) if streams else (0, 0), 360_000
    matrix, deep, long = (300, 300), (3, 100, 300), (1, 90_000)
    assert sizes == {
        ("raw", "Softmax", matrix): gathered[0],
        ("float16", "Softmax", matrix): gathered[1] + floats,
        ("raw", "MatMul", matrix): 0, ("float16", "MatMul", matrix): 0,
        ("raw", "MatMul", deep): gathered[0], ("float16", "MatMul", deep): gathered[1] + floats,
        ("raw", "MatMul", long): gathered[0], ("float16", "MatMul", long): gathered[1],
    }  # fmt: skip
