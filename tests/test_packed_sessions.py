"""Sessions whose weights are packed: what they compute, hold and let go.

The kernels of panels run on every host; here they are taken to pay on this one.
"""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from kernel_oracles import BLOCKED, assert_product, decoded
from onnx_models import refusal
from packing_models import TiedModel, assert_within, feeds, graph_of, matrix, one_product, stored
from panel_oracles import row_bytes
from weight_files import Reads, pieces_of

from onnxstream_nb import device, loading
from onnxstream_nb import session as session_module
from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.graph import Node
from onnxstream_nb.loading import CHUNK, LEAST_CHUNK, Holding, work_bytes
from onnxstream_nb.packing import PackedProvider
from onnxstream_nb.plan import make_plan
from onnxstream_nb.registry import kernels
from onnxstream_nb.session import Session, decode_constant
from onnxstream_nb.streaming import StreamProvider
from onnxstream_nb.weights import MmapProvider

IDS = [3, 0, 82, 3, 41]

exact = partial(Session, precision="exact")

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


KINDS = {"auto": PackedProvider, "ram": PackedProvider, "mmap": MmapProvider,
         "stream": StreamProvider}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_every_way_of_loading_gives_the_same_logits(
    encoding: str, threads: int, tmp_path: Path
) -> None:
    model = TiedModel(tmp_path, encoding)
    for ids in (IDS, IDS[:1], list(range(83))):
        found, bounds = {}, {}
        for load, kind in KINDS.items():
            with exact(model.graph, load=load, threads=threads) as session:
                assert type(session.provider) is kind
                known = model.logits(np.array(ids), packed=kind is PackedProvider)
                found[load], bounds[load] = session.run(feeds(ids))["logits"], known[1]
                assert_within(found[load], known)
                again = session.run(feeds(ids))["logits"]
                assert np.array_equal(again, found[load])
        assert np.array_equal(found["auto"], found["ram"])
        assert np.array_equal(found["mmap"], found["stream"])
        apart = np.abs(found["ram"].astype(np.float64) - found["mmap"])
        assert (apart <= bounds["ram"] + bounds["mmap"]).all()
        # The bound says something: it is far below the logits.
        assert bounds["ram"].max() < 0.05 * np.abs(found["ram"]).max()


@pytest.mark.parametrize("load", ["ram", "auto"])
def test_a_tied_table_is_looked_up_and_multiplied_and_not_held_twice(
    load: str, tmp_path: Path, reads: Reads
) -> None:
    model = TiedModel(tmp_path, "q8_0")
    with exact(model.graph, load=load) as session:
        provider: Any = session.provider
        head, rows = provider.get(model.graph.initializers["head"]), provider.get(model.embedding)
        assert head.order == "panels" and rows.order == "columns" and not rows.packed
        assert provider.bytes_read == model.bytes
        del rows
        for _ in range(3):
            assert_within(session.run(feeds(IDS))["logits"], model.logits(np.array(IDS), True))
        each = row_bytes("q8_0", model.width)
        assert provider.bytes_read <= model.bytes + 3 * len(IDS) * each
        gc.collect()
        assert reads.alive <= len(IDS) * each  # of a table of 83 rows


def test_indices_from_the_end_and_none(tmp_path: Path) -> None:
    model = TiedModel(tmp_path, "q6_k")
    with exact(model.graph, load="ram") as session:
        wanted = session.run(feeds([82, 0, 81]))["logits"]
        assert np.array_equal(session.run(feeds([-1, -83, -2]))["logits"], wanted)
        assert session.run(feeds([]))["logits"].shape == (0, 83)


def test_a_budget_that_holds_all_packs_all(tmp_path: Path) -> None:
    model = TiedModel(tmp_path, "q4_k")
    with exact(model.graph, load="ram") as session:
        wanted = session.run(feeds(IDS))["logits"]
    with exact(model.graph, load="ram", ram=10**11) as session:
        provider: Any = session.provider
        assert type(provider) is StreamProvider and provider.bytes_a_pass == 0
        assert np.array_equal(session.run(feeds(IDS))["logits"], wanted)
        a = provider.get(model.graph.initializers["a"])
        assert a.order == "panels" and a.lasting


@pytest.mark.parametrize("encoding", BLOCKED)
@pytest.mark.parametrize("held", [0, 32, 256, 512])
def test_the_rows_that_a_budget_holds_are_packed(
    held: int, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are multiplied as they come: each as it is by itself. The head stays in pieces, or
    is held but for its table's rows."""
    pieces_of(monkeypatch, 40 * row_bytes(encoding, 512))
    model = TiedModel(tmp_path, encoding)
    a, head = (model.graph.initializers[name] for name in ("a", "head"))
    rows = {a.matrix: held, head.matrix: 83 if held == 256 else 0}
    holding = Holding("stream", 512, held={m: n for m, n in rows.items() if n}, slots=3)
    monkeypatch.setattr(session_module, "choose", lambda *_: holding)
    with exact(model.graph, threads=2) as session:
        provider: Any = session.provider
        assert provider.bytes_a_pass == (512 - held) * row_bytes(encoding, 512) + (
            0 if held == 256 else head.nbytes
        )
        orders = [tile.order for tile in provider.get(a).tiles()]
        assert orders == ["panels"] * (held > 0) + ["rows"] * -(-(512 - held) // 32)
        for ids in (IDS, IDS[:1], list(range(40))):
            known = model.logits(np.array(ids), packed=held > 0)
            assert_within(session.run(feeds(ids))["logits"], known)


def test_auto_packs_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, then all with shorter passes over a prompt, then some rows of each matrix."""
    pieces_of(monkeypatch, 4096)
    refs = [matrix(f"w{i}", "q4_k", stored("q4_k", 256, 256, i), 256) for i in range(4)]
    path = tmp_path / "w.bin"
    path.write_bytes(b"".join(cast(bytes, ref.source) for ref in refs))
    refs = [replace(r, source=path, offset=i * r.nbytes) for i, r in enumerate(refs)]
    names = [f"y{i}" for i in range(4)]
    nodes = [
        Node("MatMul", ("x", ref.name), (name,)) for ref, name in zip(refs, names, strict=True)
    ]
    graph = graph_of(nodes, refs, names)
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    plan = make_plan(graph, decode_constant)
    monkeypatch.setattr(device, "current_rss", lambda: 10**9)
    most, least = work_bytes(plan, CHUNK), work_bytes(plan, LEAST_CHUNK)
    for needed, kind, tiles in (
        (most, PackedProvider, {1}), (most - 20, StreamProvider, {1}),
        (least - 50_000, StreamProvider, {7, 8, 9}),
    ):  # fmt: skip
        monkeypatch.setattr(loading, "CHUNK", CHUNK if needed > least else LEAST_CHUNK)
        free = (plan.weight_bytes + needed + 10) / 0.9
        monkeypatch.setattr(device, "memory_available", lambda free=free: int(free))
        with exact(graph) as session:
            provider: Any = session.provider
            assert type(provider) is kind
            found = session.run({"x": x})
            orders = [[tile.order for tile in provider.get(ref).tiles()] for ref in refs]
            assert all(order[0] == "panels" and len(order) in tiles for order in orders)
        for i, name in enumerate(names):
            dense = decoded("q4_k", stored("q4_k", 256, 256, i)).T
            assert_product(found[name], x, dense, packed=True)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    model = TiedModel(tmp_path, "q4_0")
    whole = model.path.stat().st_size
    for size in (whole - 4, whole // 2, 7, 0):
        os.truncate(model.path, size)
        for load in ("ram", "auto"):
            message = refusal(lambda load=load: exact(model.graph, load=load), ModelError)
            assert str(model.path) in message and "truncated" in message
    model.path.unlink()
    message = refusal(lambda: exact(model.graph, load="ram"), ModelError)
    assert str(model.path) in message


def test_a_file_truncated_behind_a_session_is_named(tmp_path: Path) -> None:
    """The panels need it no longer, the tied table does."""
    model = TiedModel(tmp_path, "q4_0")
    with exact(model.graph, load="ram") as session:
        session.run(feeds(IDS))
        os.truncate(model.path, 7)
        message = refusal(lambda: session.run(feeds([1])), ModelError)
        assert str(model.path) in message and "truncated" in message


@pytest.mark.parametrize("how", ["close", "drop"])
def test_panels_are_let_go(how: str, tmp_path: Path) -> None:
    model = TiedModel(tmp_path, "q5_k")
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    session: Any = exact(model.graph, load="ram")
    for _ in range(2):
        session.run(feeds(IDS[:1]))
    found = [session.provider.get(model.graph.initializers[name]).buffer for name in ("a", "head")]
    root: Any = found[0]
    while isinstance(root.base, np.ndarray):
        root = root.base
    watched = [weakref.ref(root), *map(weakref.ref, found)]
    del root, found
    if how == "close":
        session.close()
        assert "closed" in refusal(lambda: session.run(feeds(IDS)), UsageError)
    else:
        del session
    gc.collect()
    assert [w() for w in watched] == [None] * 3
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_that_of_the_panels(tmp_path: Path) -> None:
    model = TiedModel(tmp_path, "q4_k")
    with exact(model.graph, load="ram") as session:
        provider: Any = session.provider
        weights = [provider.get(model.graph.initializers[name]) for name in ("a", "head")]
        held = sum(weight.buffer.nbytes for weight in weights)
        assert held == row_bytes("q4_k", 256) * 16 * (32 * 2 + 6 * 2)
        ends = sorted((w.address, w.address + w.buffer.nbytes) for w in weights)
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))


def test_kernels_are_compiled_before_the_first_run(tmp_path: Path) -> None:
    with exact(TiedModel(tmp_path, "q4_1").graph, load="ram") as session:
        plan = session.plan
    packed, as_stored = (
        {kernels()[name].name for name in names if name in kernels()}
        for names in (plan.panel_kernels, plan.kernels)
    )
    panels = {"gemv_panels_q4_1", "gemm_panels_q4_1", "pack_q4_1", "quantize_rows"}
    rows = {"gemv_rows_q4_1", "gemm_rows_q4_1", "gemm_pack"}
    assert packed >= panels | {"decode_q4_1"} and "gemm_rows_q4_1" not in packed
    assert as_stored >= rows | {"decode_q4_1"} and not panels & as_stored


def test_fast_kernels_are_compiled_beside_those_of_a_few_rows(tmp_path: Path) -> None:
    graph = TiedModel(tmp_path, "q4_1").graph
    names = {"gemm_exact_panels_q4_1", "quantize_rows"}
    fast = {"gemm_fast_panels_q4_1", "quantize_bytes"}
    with Session(graph, load="ram", precision="fast") as session:
        assert names | fast <= set(session.plan.panel_kernels)
        assert not (names | fast) & set(session.plan.kernels)
    with exact(graph, load="ram") as session:
        assert names <= set(session.plan.panel_kernels)
        assert not fast & set(session.plan.panel_kernels)


def test_bytes_in_memory_are_packed_too() -> None:
    graph, dense = one_product("q5_k", 256, 35)
    x = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    with exact(graph, load="ram") as session:
        assert isinstance(session.provider, PackedProvider)
        assert session.provider.get(graph.initializers["w"]).order == "panels"
        assert_product(session.run({"x": x})["y"], x, dense, packed=True)
        assert session.provider.bytes_read == 0


def test_weights_without_elements() -> None:
    for k, n in ((0, 5), (64, 0), (0, 0)):
        ref = matrix("w", "q8_0", np.zeros((n, row_bytes("q8_0", k)), np.uint8), k)
        graph = graph_of([Node("MatMul", ("x", "w"), ("y",))], [ref])
        for load in ("ram", "auto", "mmap", "stream"):
            with exact(graph, load=load) as session:
                y = session.run({"x": np.ones((3, k), np.float32)})["y"]
                assert y.shape == (3, n) and not y.any()
