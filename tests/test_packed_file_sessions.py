"""Sessions over files of packed weights: the very results of weights that are packed at a load."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_oracles import BLOCKED, Array
from llama_fixtures import K_QUANT, write_gguf
from llama_oracle import Tiny
from onnx_models import refusal
from packed_models import IDS, SHIPPED, Shipped, Tied, exact, file_of, only_file, packer
from weight_files import Reads, closing, pieces_of, process_of

from onnxstream_nb import device, loading, packed_weights
from onnxstream_nb.device import parse_size
from onnxstream_nb.errors import MemoryBudgetError, ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.kernels.matmul import product
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.plan import make_plan
from onnxstream_nb.session import Session, decode_constant
from onnxstream_nb.streaming import StreamProvider, by_rows, cut
from onnxstream_nb.weights import MmapProvider, RamProvider

KINDS = {"ram": RamProvider, "mmap": MmapProvider, "stream": StreamProvider, "auto": RamProvider}

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")


def never(*_: Any) -> Any:
    pytest.fail("a weight is packed")


# -- every way of loading --------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_every_way_of_loading_gives_the_packed_logits(
    encoding: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied, folder = Tied(tmp_path, encoding), tmp_path / "p"
    tied.logits([0], packed=folder)
    for ids in (IDS, IDS[:1], list(range(83))):
        wanted = tied.logits(ids, load="ram", threads=threads)
        with monkeypatch.context() as patch:
            patch.setattr("onnxstream_nb.kernels.packing.Packer.pack", never)
            for size in (2 << 20, 10_000):
                pieces_of(patch, size)
                for load, kind in KINDS.items():
                    options: dict[str, Any] = {"load": load, "threads": threads, "packed": folder}
                    with exact(tied.model.graph, **options) as session:
                        assert type(session.provider) is kind
                    assert np.array_equal(tied.logits(ids, **options), wanted)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_way_of_loading_parts_gives_the_packed_product(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, folder = Shipped(tmp_path, name), tmp_path / "p"
    wanted = {rows: shipped.y(rows, load="ram") for rows in (1, 5, 131)}
    shipped.y(packed=folder)
    monkeypatch.setattr("onnxstream_nb.kernels.packing.Packer.pack_part", never)
    for size in (2 << 20, 10_000):
        pieces_of(monkeypatch, size)
        for load in KINDS:
            for rows, y in wanted.items():
                assert np.array_equal(shipped.y(rows, load=load, packed=folder), y)


def budgets(call: Any) -> list[int]:
    """Budgets from the least that does to one for everything."""
    message = refusal(lambda: call(1), MemoryBudgetError)
    found = re.search("at least (.*?) is needed", message)
    assert found
    least = parse_size(found[1])
    return [least, least + 20_000, least + 60_000, least + 150_000, least + 10**9]


@pytest.mark.parametrize("encoding", ["q8_0", "q6_k"])
def test_budgets_hold_some_panels_and_stream_the_others(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied, folder = Tied(tmp_path, encoding), tmp_path / "p"
    wanted = {tuple(ids): tied.logits(ids, load="ram") for ids in (IDS, IDS[:1])}
    process_of(monkeypatch, 0)
    pieces_of(monkeypatch, 12_000)
    tied.logits(packed=folder)
    monkeypatch.setattr("onnxstream_nb.kernels.packing.Packer.pack", never)
    held = []
    for ram in budgets(lambda n: exact(tied.model.graph, ram=n, packed=folder)):
        with exact(tied.model.graph, ram=ram, packed=folder) as session:
            provider: Any = session.provider
            held.append(sum(provider._held.values()))
        for ids, logits in wanted.items():
            assert np.array_equal(tied.logits(list(ids), ram=ram, packed=folder), logits)
    rows = 512 + 83
    assert held == sorted(held) and held[-1] == rows and 0 < held[2] < rows


@pytest.mark.parametrize("held", [0, 16, 32, 96, 288, 300])
@pytest.mark.parametrize("size", [9000, 30_000, 70_000, 10**9])
def test_tiles_of_panels(held: int, size: int, tmp_path: Path) -> None:
    """Also of panels that no buffer has room for."""
    ref = panels_in_a_file(tmp_path)
    pieces = cut(ref, held if by_rows(ref, size) else 0, size)
    assert by_rows(ref, size) == (size >= ref.panel)
    if size < ref.panel:
        assert sum(piece.nbytes for piece in pieces) == ref.nbytes
        return
    ends = [piece.first + piece.ref.shape[1] for piece in pieces]
    assert [piece.first for piece in pieces] == [held, *ends[:-1]][: len(pieces)]
    assert all(piece.nbytes <= size and piece.first % 16 == 0 for piece in pieces)
    assert ends[-1:] in ([300], [])


def panels_in_a_file(folder: Path) -> WeightRef:
    from packed_models import matrices

    *_, ref = matrices(folder, "q8_0")  # (768, 300)
    panel_bytes, stamp = packer().panel_bytes, packer().stamp
    file = packed_weights.PackedFile(folder / "p", [ref], panel_bytes, stamp)
    packed_weights.write(file, packer())
    return packed_weights.as_panels(ref, panel_bytes(ref), file.path, file.places[ref.matrix][0])


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200])
@pytest.mark.parametrize("held", [0, 32, 288, 300])
@pytest.mark.parametrize("size", [9000, 40_000, 10**9])
def test_products_with_tiles_are_those_with_the_whole(
    size: int, held: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces_of(monkeypatch, size)
    ref = panels_in_a_file(tmp_path)
    x = np.random.default_rng(rows).standard_normal((rows, 768), np.float32)
    if not by_rows(ref, size):  # a panel has no room: all of it is held, or nothing
        held = 300 * (held == 300)
    memory = RamProvider([ref.rows(0, held)] if 0 < held < 300 else [ref])
    stream = StreamProvider([ref], memory=memory, held={ref.matrix: held}, slots=3)
    with closing(stream), closing(MmapProvider()) as mapped:
        wanted = product(x, mapped.get(ref))
        for _ in range(3):
            stream.prefetch([ref])
            weight = stream.get(ref)
            assert weight.order == "panels" and weight.row_bytes == ref.panel
            assert np.array_equal(product(x, weight), wanted)


# -- what is read, and what is compiled ------------------------------------------------------------


def test_a_stream_reads_panels_and_rows_of_the_table_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied, folder = Tied(tmp_path, "q8_0"), tmp_path / "p"
    tied.logits(packed=folder)
    file = file_of(tied.model.graph, folder)
    panels = sum(nbytes for _, nbytes in file.places.values())
    reads = Reads(monkeypatch)
    with exact(tied.model.graph, load="stream", packed=folder) as session:
        provider: Any = session.provider
        assert provider.bytes_a_pass == panels
        for _ in range(2):
            session.run({"ids": np.array(IDS)})
    assert set(reads.names) == {"embedding", "a", "head"}
    assert reads.names.count("embedding") == 2 * len(set(IDS))


def test_memory_is_that_of_the_panels(tmp_path: Path) -> None:
    tied, folder = Tied(tmp_path, "q4_0"), tmp_path / "p"
    with exact(tied.model.graph, load="ram", packed=folder) as session:
        provider: Any = session.provider
        refs = [session.graph.initializers[name] for name in ("a", "head")]
        weights = [provider.get(ref) for ref in refs]
        assert all(w.address % 64 == 0 and w.lasting for w in weights)
        assert provider.bytes_read == sum(ref.nbytes for ref in refs)
        plan = session.plan
    assert loading.work_bytes(plan, 32, streams=True) == loading.work_bytes(plan, 32)
    assert plan.packable == () and {r.name for r in plan.weights if r.panel} == {"a", "head"}


def test_only_kernels_of_panels_are_prepared(tmp_path: Path) -> None:
    tied, folder = Tied(tmp_path, "q4_1"), tmp_path / "p"
    with exact(tied.model.graph, packed=folder) as session:
        plan = session.plan
    assert plan.kernels == plan.panel_kernels
    products = {"gemv_panels_q4_1", "gemm_exact_panels_q4_1", "quantize_rows"}
    assert products <= set(plan.kernels)
    assert not any(n.startswith("pack_") or "rows_q4" in n for n in plan.kernels)
    as_stored = make_plan(tied.model.graph, decode_constant)
    assert "gemm_exact_rows_q4_1" in as_stored.kernels


# -- language models -------------------------------------------------------------------------------

TINY = Tiny(vocab=300, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, layers=2)


def tokens(path: Path, **options: Any) -> Array:
    """The logits behind a prompt and of 20 tokens, by replayed tables where there are any."""
    model = LanguageModel(path, precision="exact", **options)
    found = [model.feed(list(range(40)))]
    found += [model.feed([i]) for i in range(20)]
    model.close()
    return np.stack(found)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_1", "Q6_K"])
def test_a_language_model_token_by_token(encoding: str, tied: bool, tmp_path: Path) -> None:
    path, folder = tmp_path / "m.gguf", tmp_path / "p"
    tiny = Tiny(**{**vars(TINY), "tied": tied}) if encoding != "Q6_K" else K_QUANT
    write_gguf(path, tiny, encoding)
    wanted = tokens(path, load="ram")
    for load in KINDS:
        assert np.array_equal(tokens(path, load=load, packed=folder), wanted)
    message = refusal(lambda: tokens(path, ram=1, packed=folder), MemoryBudgetError)
    found = re.search("at least (.*?) is needed", message)
    assert found
    least = max(parse_size(found[1]), int(1.01 * device.peak_rss()))
    assert np.array_equal(tokens(path, ram=least, packed=folder), wanted)


# -- a file that goes or shrinks while it is used --------------------------------------------------


def test_a_file_deleted_meanwhile_is_missed_by_nobody(tmp_path: Path) -> None:
    tied, folder = Tied(tmp_path, "q4_0"), tmp_path / "p"
    wanted = tied.logits()
    for load in KINDS:
        with exact(tied.model.graph, load=load, packed=folder) as session:
            session.run({"ids": np.array(IDS)})
            only_file(folder).unlink()
            for _ in range(2):
                assert np.array_equal(session.run({"ids": np.array(IDS)})["logits"], wanted)


@pytest.mark.parametrize("load", ["mmap", "stream"])
def test_a_file_cut_short_meanwhile_is_named(load: str, tmp_path: Path) -> None:
    tied, folder = Tied(tmp_path, "q4_0"), tmp_path / "p"
    with exact(tied.model.graph, load=load, packed=folder) as session:
        path = only_file(folder)
        os.truncate(path, 5000)
        message = refusal(lambda: session.run({"ids": np.array(IDS)}), ModelError)
        assert str(path) in message and "truncated" in message
    assert tied.logits(load=load, packed=folder).shape == (5, 83)


def test_a_session_of_bytes_is_served_too(tmp_path: Path) -> None:
    found = SHIPPED["4 bits"]
    with Session(found.model, packed=tmp_path / "p") as session:
        assert not (tmp_path / "p").exists() and any(session.plan.packable)
