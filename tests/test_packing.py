"""Weights that are packed when a model is loaded: which, from where, and what is held for it.

The kernels of panels run on every host; here they are taken to pay on this one.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from kernel_oracles import BLOCKED, Array, assert_product, decoded
from packing_models import graph_of, matrix, one_product, stored, table
from panel_oracles import row_bytes, unpacked
from weight_files import Reads, closing

from onnxstream_nb import packing
from onnxstream_nb.graph import Graph, Node, WeightRef
from onnxstream_nb.kernels import packing as kernel_packing
from onnxstream_nb.packing import PackedProvider
from onnxstream_nb.plan import make_plan
from onnxstream_nb.session import Session, decode_constant, internal
from onnxstream_nb.weights import RamProvider, Weight

SIZES = ((96, 37), (256, 16), (64, 1), (512, 50))

exact = partial(Session, precision="exact")

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def panels_of(weight: Weight) -> Array:
    """(P, bytes a panel) of a packed weight."""
    assert weight.packed and weight.order == "panels"
    count = -(-weight.ref.shape[1] // 16)
    return weight.buffer[: count * weight.row_bytes].reshape(count, weight.row_bytes)


def assert_holds(weight: Weight, raw: Array) -> None:
    assert weight.address % 64 == 0
    rows = unpacked(weight.encoding, panels_of(weight))
    assert np.array_equal(rows[: len(raw), : raw.shape[1]], raw)


def cut(folder: Path, encoding: str) -> dict[str, tuple[WeightRef, Array]]:
    """Matrices of several sizes in one file, by name, each with its rows."""
    path, offset, found, data = folder / "w.bin", 5, {}, b"\0" * 5
    for i, (k, n) in enumerate(SIZES):
        k = max(k, 256) if "_k" in encoding else k
        raw = stored(encoding, n, k, i)
        found[f"w{i}"] = matrix(f"w{i}", encoding, raw, k, path, offset), raw
        data += raw.tobytes() + b"\0"
        offset = len(data)
    path.write_bytes(data)
    return found


# -- filling panels ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 16 * 70, 5000, 10**9])
@pytest.mark.parametrize("encoding", BLOCKED)
def test_panels_are_the_same_whatever_is_read_at_a_time(
    encoding: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Reads
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
    found = cut(tmp_path, encoding)
    refs = [ref for ref, _ in found.values()]
    with closing(PackedProvider(RamProvider(), refs, internal("Panels")())) as provider:
        for ref, raw in found.values():
            assert_holds(provider.get(ref), raw)
        assert provider.bytes_read == sum(ref.nbytes for ref in refs)
        longest = max(16 * row_bytes(encoding, ref.shape[0]) for ref in refs)
        assert reads.alive == 0  # at most what is being packed and what is being read:
        assert 0 < reads.most <= 2 * max(chunk, longest)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_panels_are_the_same_by_any_number_of_threads(threads: int, tmp_path: Path) -> None:
    from onnxstream_nb.kernels.threads import set_threads

    set_threads(threads)
    found = cut(tmp_path, "q4_k")
    provider = PackedProvider(RamProvider(), [r for r, _ in found.values()], internal("Panels")())
    for ref, raw in found.values():
        assert_holds(provider.get(ref), raw)
    provider.close()


class CountingPacker:
    """A packer of its own kind: a panel is the sum of each of its rows' bytes, an int64 each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def panel_bytes(self, ref: WeightRef) -> int:
        return 16 * 8

    def memory(self, size: int) -> Array:
        return np.zeros(size, np.uint8)

    def pack(self, ref: WeightRef, rows: Array, out: int, count: int) -> None:
        self.calls.append((ref.name, count))
        sums = rows.reshape(count, -1).astype(np.int64).sum(axis=1)
        ctypes.memmove(out, sums.ctypes.data, sums.nbytes)


def test_every_row_goes_to_the_packer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the packer, and that nothing lies across a panel's border."""
    found, packer = cut(tmp_path, "q8_0"), CountingPacker()
    monkeypatch.setattr(packing, "CHUNK_BYTES", 16 * 102 + 1)  # 16 rows of 96 elements
    provider = PackedProvider(RamProvider(), [r for r, _ in found.values()], packer)
    assert [c for name, c in packer.calls if name == "w0"] == [16, 16, 5]
    for name, (ref, raw) in found.items():
        assert sum(c for called, c in packer.calls if called == name) == len(raw)
        sums = panels_of(provider.get(ref)).reshape(-1).view(np.int64)
        assert np.array_equal(sums[: len(raw)], raw.sum(axis=1, dtype=np.int64))
        assert not sums[len(raw) :].any()
    provider.close()


def test_progress_is_told(tmp_path: Path) -> None:
    found, told = cut(tmp_path, "q4_0"), []
    refs = [ref for ref, _ in found.values()]
    provider = PackedProvider(
        RamProvider(), refs, internal("Panels")(), lambda text, done: told.append((text, done))
    )
    provider.close()
    assert [text for text, _ in told] == ["packing weights"] * len(refs)
    fractions = [done for _, done in told]
    assert fractions == sorted(set(fractions)) and fractions[0] == 0 and fractions[-1] < 1


# -- which weights -------------------------------------------------------------------------------


def packable(graph: Graph) -> set[str]:
    plan = make_plan(graph, decode_constant, internal("Panels")().panel_bytes)
    return {ref.name for ref in plan.packable}


def product(w: str = "w", x: str = "x", y: str = "y") -> Node:
    return Node("MatMul", (x, w), (y,))


SIDE = 384
ROWS = stored("q8_0", SIDE, SIDE)
SQUARE = matrix("w", "q8_0", ROWS, SIDE)
"""Square, so that every operator takes it, and too large to be a constant of the plan."""
INDEX = (
    np.array([5, 0, SIDE - 1], np.int64),
    WeightRef("i", (3,), "int64", np.array([5, 0, SIDE - 1], np.int64).tobytes(), 0, 24),
)
OTHERS = {
    "Gemm": Node("Gemm", ("y", "w"), ("z",)),
    "Add": Node("Add", ("y", "w"), ("z",)),
    "Gather": Node("Gather", ("w", "i"), ("z",)),
    "left of MatMul": Node("MatMul", ("w", "y"), ("z",)),
}


@pytest.mark.parametrize("load", ["ram", "auto"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_weight_that_others_read_is_not_packed(other: str, load: str) -> None:
    i, index = INDEX
    graph = graph_of([product(), OTHERS[other]], [SQUARE, index], ("y", "z"))
    assert packable(graph) == set()
    w = decoded("q8_0", ROWS).T.astype(np.float64)
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    with exact(graph, load=load, optimize=False) as session:
        found = session.run({"x": x})
    y, size = x @ w, np.abs(x) @ np.abs(w)
    wanted = {
        "Gemm": (y @ w, size @ np.abs(w)),
        "Add": (y + w, size + np.abs(w)),
        "Gather": (w[i], np.abs(w[i])),
        "left of MatMul": (w @ y, np.abs(w) @ size),
    }[other]
    assert_product(found["y"], x, w)
    assert (np.abs(found["z"] - wanted[0]) <= 3e-6 * wanted[1]).all()


def assert_as_streamed(nodes: list[Node], refs: list[WeightRef], packed: set[str]) -> None:
    """What is packed, and that y and z are within 2e-3 of a session's that packs nothing: the
    weights are around 1 / sqrt(SIDE), so that y and z are around one, rounded to 1 / 16256 or so
    of that at most."""
    graph = graph_of(nodes, refs, ("y", "z"))
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    with exact(graph, load="stream", optimize=False) as session:
        wanted = session.run({"x": x})
    for load in ("ram", "auto"):
        with exact(graph, load=load, optimize=False) as session:
            assert {ref.name for ref in session.plan.packable} == packed
            found = session.run({"x": x})
        for name in ("y", "z"):
            assert found[name].shape == wanted[name].shape
            assert np.abs(found[name] - wanted[name]).max() <= 2e-3


@pytest.mark.parametrize("other", OTHERS)
def test_other_names_of_the_same_matrix_are_read_as_stored(other: str) -> None:
    """Two initializers over the same bytes: one is multiplied, one read otherwise."""
    node = OTHERS[other]
    inputs = tuple("v" if name == "w" else name for name in node.inputs)
    refs = [SQUARE, replace(SQUARE, name="v"), INDEX[1]]
    assert_as_streamed([product(), replace(node, inputs=inputs)], refs, set())


VIEWS = {
    "transposed Gemm": Node("Gemm", ("y", "v"), ("z",), {"transB": 1}),
    "Add": Node("Add", ("y", "v"), ("z",)),
    "left of MatMul": Node("MatMul", ("v", "y"), ("z",)),
    "Gather": Node("Gather", ("v", "i"), ("z",)),
    "Gather of columns": Node("Gather", ("v", "i"), ("z",), {"axis": 1}),
}
"""Operators that read the rows as they are stored, (N, K)."""


@pytest.mark.parametrize("view", VIEWS)
def test_the_transposed_view_of_a_product_s_matrix(view: str) -> None:
    refs = [SQUARE, table(SQUARE, "v"), INDEX[1]]
    assert_as_streamed([product(), VIEWS[view]], refs, {"w"})


def test_a_view_of_more_axes() -> None:
    """The same rows as (2, N / 2, K)."""
    view = replace(table(SQUARE, "v"), shape=(2, SIDE // 2, SIDE))
    i = np.array([1], np.int64)
    index = WeightRef("i", (1,), "int64", i.tobytes(), 0, 8)
    node = Node("Gather", ("v", "i"), ("z",))
    assert_as_streamed([product(), node], [SQUARE, view, index], {"w"})


def test_a_weight_that_is_an_output_is_not_packed() -> None:
    graph = graph_of([product()], [SQUARE], ("y", "w"))
    assert packable(graph) == set()
    w = decoded("q8_0", ROWS).T
    with exact(graph, load="ram") as session:
        found = session.run({"x": np.eye(SIDE, dtype=np.float32)})
    assert np.array_equal(found["w"], w)
    assert_product(found["y"], np.eye(SIDE, dtype=np.float32), w)


def test_a_weight_of_two_products_is_packed_once(reads: Reads, tmp_path: Path) -> None:
    ((ref, raw), *_) = cut(tmp_path, "q8_0").values()
    square = matrix("w", "q8_0", stored("q8_0", 96, 96), 96, tmp_path / "square", 3)
    square_raw = stored("q8_0", 96, 96)
    (tmp_path / "square").write_bytes(b"abc" + square_raw.tobytes())
    graph = graph_of([product(), product("w", "y", "z"), product("w0", "z", "u")], [square, ref],
                     ("y", "z", "u"))  # fmt: skip
    assert packable(graph) == {"w", "w0"}
    w = decoded("q8_0", square_raw).T
    x = np.random.default_rng(0).standard_normal((3, 96), np.float32)
    with exact(graph, load="ram") as session:
        found = session.run({"x": x})
        assert session.provider.bytes_read == square_raw.nbytes + raw.nbytes
        assert sorted(reads.names) == ["w", "w0"]
    assert_product(found["y"], x, w, packed=True)
    assert_product(found["z"], found["y"], w, packed=True)
    assert_product(found["u"], found["z"], decoded("q8_0", raw).T, packed=True)


def test_what_has_no_panels_is_not_packed() -> None:
    raw = np.zeros((64, 64), np.float16)
    for ref in (
        WeightRef("w", (64, 64), "float32", raw.tobytes(), 0, raw.nbytes, "float16", True),
        table(SQUARE, "w"),  # columns of blocks
        WeightRef("w", (2, 32, 64), "float32", b"", 0, 4352, "q8_0", True),
    ):
        assert packable(graph_of([product()], [ref])) == set()


def test_a_host_without_the_instruction_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_packing, "SUPPORTED", False)
    graph, dense = one_product("q4_1", 96, 35)
    x = np.random.default_rng(0).standard_normal((4, 96), np.float32)
    with exact(graph, load="ram") as session:
        assert type(session.provider) is RamProvider
        assert not any("panels" in name or "pack_q" in name for name in session.plan.panel_kernels)
        assert_product(session.run({"x": x})["y"], x, dense)
