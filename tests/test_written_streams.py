"""Matrices in parts that are streamed: cut between rows, packed a tile at a time, or held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import saved
from quantised_models import Quantised, activations, dequantised, nbits, parts_of, rewritten
from weight_files import pieces_of
from written_models import half_scaled, tied_integers

from onnxstream_nb import loading, streaming
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.loading import Holding, make_provider, work_bytes
from onnxstream_nb.session import Session, internal
from onnxstream_nb.weights import DiskProvider, in_memory

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

CUT = {
    "int4": half_scaled("int4", 352, 50, 32),
    "uint4, odd": half_scaled("uint4", 352, 34, 64, zeros=True),
    "int8, long blocks": half_scaled("int8", 416, 33, 128, zeros=True),
    "a scale a column": half_scaled("int8", 352, 33, per="row"),
    "one scale": half_scaled("int4", 352, 33, per="tensor", zeros=True),
    "by rows": half_scaled("int8", 352, 70, 32, turned=True),
    "by rows, a scale each": half_scaled("uint8", 352, 70, per="row", turned=True, zeros=True),
    "nibbles by rows": half_scaled("uint4", 352, 75, 32, turned=True, zeros=True),
    "4 bits": nbits(4, 352, 70, 32, zeros="packed"),
    "8 bits": nbits(8, 352, 53, 32),
    "short blocks": half_scaled("uint4", 352, 50, 16, zeros=True),
    "short blocks by rows": nbits(4, 352, 53, 16, zeros="packed"),
    "blocks of three groups": half_scaled("int8", 416, 34, 96),
}
WHOLE = {
    "no groups": dequantised("int8", 100, 37, 32),
    "odd rows of nibbles": dequantised("uint4", 352, 33, 64, zeros=True),
    "blocks of half a group more": dequantised("int8", 192, 48, 48),
    "zero points of floats": nbits(4, 352, 53, 32, zeros="float"),
}


def part_bytes(ref: WeightRef) -> list[bytes]:
    return [bytes(_stored(part)) for part in ref.parts]


def _stored(part: WeightRef) -> Any:
    return in_memory(part) if isinstance(part.source, bytes) else DiskProvider().get(part).buffer


@pytest.mark.parametrize("name", CUT)
def test_rows_are_a_weight_of_their_own(name: str) -> None:
    """Whatever the cut: decoded, they are the rows, and no byte of a part is left out."""
    ref = parts_of(rewritten(CUT[name].model))
    assert ref.cut_by_rows
    together, nbytes = ref.unit
    total = ref.stored_shape[0]
    dense = CUT[name].dense.T if ref.transposed else CUT[name].dense
    for first in range(0, total, together):
        for last in {min(total, first + together), total}:
            rows = ref.rows(first, last)
            w = internal("Decode")(DiskProvider().get(rows))
            w = w.T if ref.transposed else w
            assert np.allclose(w, dense[first:last], rtol=3e-7, atol=0)
            assert rows.nbytes == sum(part.nbytes for part in rows.parts)
            assert last - first > together or rows.nbytes <= nbytes


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_no_panels_comes_whole(name: str) -> None:
    assert not parts_of(rewritten(WHOLE[name].model)).cut_by_rows


@pytest.mark.parametrize("size", [7000, 20_000])
@pytest.mark.parametrize("name", CUT)
def test_tiles_give_what_memory_does(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, however much of it is held; a tile at a time is packed."""
    path = saved(CUT[name].model, tmp_path / "model.onnx")
    pieces_of(monkeypatch, size)
    xs = [activations(m, CUT[name].k) for m in (1, 7, 40)]
    with Session(path, load="ram") as session:
        wanted = [session.run({"x": x})["y"] for x in xs]
    ref, step = parts_of(session.graph), 0
    assert loading.by_rows(ref)
    rows, step = ref.stored_shape[0], max(32, ref.unit[0])
    for threads in (1, 2):
        with Session(path, load="stream", threads=threads) as session:
            for held in (0, step, rows // step * step, rows):
                holding = Holding("stream", 64, {ref.matrix: held} if held else {}, 8)
                session.provider = make_provider(session.plan, holding, internal("Panels")())
                for x, y in zip(xs, wanted, strict=True):
                    assert np.array_equal(session.run({"x": x})["y"], y)
                left = ref.nbytes - ref.rows(0, held).nbytes if held else ref.nbytes
                assert session.provider.bytes_a_pass >= left - ref.nbytes // 20
                session.provider.close()


def test_pieces_are_no_longer_than_they_may_be(tmp_path: Path) -> None:
    for found in CUT.values():
        path = saved(found.model, tmp_path / "model.onnx")
        ref = parts_of(Session(path).graph)
        for size in (7000, 10**6):
            pieces = streaming.cut(ref, 0, size)
            assert all(piece.nbytes <= size <= piece.room for piece in pieces[:-1])
            firsts = [piece.first for piece in pieces]
            ends = [p.first + p.ref.stored_shape[0] for p in pieces]
            assert firsts == [0, *ends[:-1]] and ends[-1] == ref.stored_shape[0]


def test_a_head_is_streamed_and_its_table_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tied_integers("int8", 517, 96, 32)
    path = saved(found.model, tmp_path / "model.onnx")
    ids = np.array([[5, 516, 0]])
    with Session(path, load="ram") as session:
        wanted = session.run({"ids": ids})
    pieces_of(monkeypatch, 8000)
    with Session(path, load="stream") as session:
        for _ in range(2):
            result = session.run({"ids": ids})
            assert all(np.array_equal(result[name], wanted[name]) for name in wanted)
        assert session.provider.bytes_a_pass == found.nbytes  # type: ignore[attr-defined]


def test_what_a_pass_makes_of_a_streamed_matrix_is_a_tile(tmp_path: Path) -> None:
    """Not all of it: panels of one piece, of which there is no other copy."""
    found: Quantised = half_scaled("int4", 4096, 2048, 32)
    graph = Session(saved(found.model, tmp_path / "model.onnx"))
    assert found.nbytes > 2 * streaming.PIECE
    streamed, held = (work_bytes(graph.plan, 1, streams) for streams in (True, False))
    assert streamed - held <= 2 * streaming.PIECE
