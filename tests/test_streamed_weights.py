"""Operators whose weights are streamed: looked up by rows, gathered whole, in parts, in any place.

Each runs several times, in pieces far smaller than the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_oracles import BLOCKED, PLAIN, Array, assert_product, random_weight
from onnx_models import refusal, saved
from quantised_models import Quantised, activations, dequantised, nbits
from weight_files import Reads, pieces_of

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.session import Session
from onnxstream_nb.streaming import StreamProvider

LOADS = ("stream", "ram", "mmap")

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces_of(monkeypatch, 4096)


def in_file(path: Path, *refs: WeightRef) -> list[WeightRef]:
    """The same weights with their bytes in a file, at odd offsets."""
    data, moved = b"\x5a" * 3, []
    for ref in refs:
        assert isinstance(ref.source, bytes)
        moved.append(replace(ref, source=path, offset=len(data)))
        data += ref.source[ref.offset : ref.offset + ref.nbytes] + b"\x5a" * 5
    path.write_bytes(data)
    return moved


def array_ref(name: str, array: Array, encoding: str = "raw") -> WeightRef:
    """An array as a weight: as it is, or stored in another plain encoding."""
    dtype = array.dtype.name
    stored = array if encoding == "raw" else array.astype(encoding)
    return WeightRef(name, array.shape, dtype, stored.tobytes(), 0, stored.nbytes, encoding)


def graph_of(
    nodes: Sequence[Node], refs: Sequence[WeightRef], dtype: str = "float32", *outputs: str
) -> Graph:
    values = tuple(Value(name, "", None) for name in outputs or ("y",))
    inputs = (Value("x", dtype, None),)
    return Graph(tuple(nodes), inputs, values, {r.name: r for r in refs}, {"": 21})


def outputs_of(graph: Graph, x: Array, load: str = "stream", times: int = 3) -> dict[str, Any]:
    with Session(graph, load=load, optimize=False) as session:
        if load == "stream":
            assert type(session.provider) is StreamProvider
        first = session.run({"x": x})
        for _ in range(times - 1):
            again = session.run({"x": x})
            assert all(np.array_equal(again[name], first[name]) for name in first)
    return first


# -- tables: only the rows that are looked up are read

INDICES = [
    np.array([5, 0, 36], np.int64), np.array([7, 7, 7, 2, 7], np.int64),
    np.array([-1, -37, 3], np.int64), np.array([], np.int64), np.zeros((2, 0, 3), np.int64),
    np.array(36, np.int64), np.array([[1, -2], [3, 1]], np.int64),
]  # fmt: skip


def table(encoding: str, tmp_path: Path) -> tuple[WeightRef, Array]:
    """(37, 256) in an encoding, and its values; those of "float16 itself" are float16."""
    if encoding == "float16 itself":
        values = np.random.default_rng(0).standard_normal((37, 256)).astype(np.float16)
        return in_file(tmp_path / "t.bin", array_ref("t", values))[0], values
    if encoding == "int64":
        values = np.arange(37 * 256).reshape(37, 256)
        return in_file(tmp_path / "t.bin", array_ref("t", values))[0], values
    weight, dense = random_weight(encoding, 256, 37, np.random.default_rng(0), True)
    ref = replace(weight.ref, name="t", source=bytes(weight.buffer), shape=(37, 256),
                  transposed=False)  # fmt: skip
    return in_file(tmp_path / "t.bin", ref)[0], dense.T


@pytest.mark.parametrize("encoding", ["float16 itself", "int64", "uint8", *PLAIN, *BLOCKED])
def test_rows_of_a_table(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, dense = table(encoding, tmp_path)
    graph = graph_of([Node("Gather", ("t", "x"), ("y",))], [ref], "int64")
    reads = Reads(monkeypatch)
    with Session(graph, load="stream") as session:
        provider: Any = session.provider
        for ids in INDICES * 2:
            before = provider.bytes_read
            y = session.run({"x": ids})["y"]
            assert y.shape == (*ids.shape, 256) and y.dtype == dense.dtype
            assert np.allclose(y, dense[ids], rtol=1e-6 if encoding == "uint8" else 0, atol=0)
            rows = np.unique(ids % 37).size  # a row that is wanted twice is read once
            assert provider.bytes_read - before == rows * ref.nbytes // 37
        assert provider.bytes_a_pass == 0 and not reads.slots
        for wrong in (37, -38):
            message = refusal(lambda i=wrong: session.run({"x": np.array([i])}), ShapeError)
            assert str(wrong) in message and "Gather" in message


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("encoding", ["float32", "float16", "q8_0", "q4_k"])
def test_other_lookups_of_a_table(encoding: str, load: str, tmp_path: Path) -> None:
    """Along another axis, of a table that is stored the other way round, of one of more axes."""
    ref, dense = table(encoding, tmp_path)
    ids = np.array([3, -1, 0], np.int64)
    deep = replace(ref, shape=(37, 1, 256))
    turned = replace(ref, shape=(256, 37), transposed=True)
    cases: list[tuple[WeightRef, int, Array]] = [
        (ref, 1, dense[:, ids]), (ref, -1, dense[:, ids]), (turned, 0, dense.T[ids]),
        (turned, 1, dense.T[:, ids]), (deep, 0, dense[ids][:, None]),
        (deep, 2, dense[:, None][:, :, ids]),
    ]  # fmt: skip
    for seen, axis, wanted in cases:
        node = Node("Gather", ("t", "x"), ("y",), {"axis": axis})
        assert np.array_equal(outputs_of(graph_of([node], [seen], "int64"), ids, load)["y"], wanted)


@pytest.mark.parametrize("load", LOADS)
def test_a_table_of_one_axis(load: str, tmp_path: Path) -> None:
    values = np.arange(20_000, dtype=np.float32)
    (ref,) = in_file(tmp_path / "t.bin", array_ref("t", values))
    graph = graph_of([Node("Gather", ("t", "x"), ("y",))], [ref], "int64")
    ids = np.array([[19_999, -1], [0, 5]])
    assert np.array_equal(outputs_of(graph, ids, load)["y"], values[ids])


def test_a_table_that_is_multiplied_too(tmp_path: Path) -> None:
    """The same matrix: it comes whole. Its transposed view, an embedding's head: by itself."""
    weight, dense = random_weight("float16", 64, 83, np.random.default_rng(0), True)
    head = replace(weight.ref, name="h", source=bytes(weight.buffer))
    (head,) = in_file(tmp_path / "w.bin", head)
    rows = replace(head, name="t", shape=(83, 64), transposed=False)
    ids = np.array([3, 80, 3])
    for refs, node, wanted in (
        ([rows, head], Node("MatMul", ("e", "h"), ("y",)), dense.T[ids] @ dense),
        ([rows], Node("MatMul", ("e", "u"), ("y",)), dense.T[ids] @ dense.T[:64]),
    ):  # fmt: skip
        start, stop, axis = (
            array_ref(n, np.array([v])) for n, v in (("i", 0), ("j", 64), ("k", 0))
        )
        nodes = [Node("Gather", ("t", "x"), ("e",)), node]
        if len(refs) == 1:
            nodes.insert(1, Node("Slice", ("t", "i", "j", "k"), ("u",)))
            refs = [*refs, start, stop, axis]
        y = outputs_of(graph_of(nodes, refs, "int64"), ids)["y"]
        assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()


# -- gathered whole


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("encoding", ["raw", "float16"])
@pytest.mark.parametrize("shape", [(40_001,), (3, 41, 251), (2, 5, 31, 200), (1, 33_000), (200, 1)])
def test_arrays_of_any_axes(
    shape: tuple[int, ...], encoding: str, load: str, tmp_path: Path
) -> None:
    """Rows longer than a buffer, and shorter ones; elements that are stored in two bytes."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float16).astype(np.float32)
    (ref,) = in_file(tmp_path / "w.bin", array_ref("w", values, encoding))
    graph = graph_of([Node("Add", ("x", "w"), ("y",)), Node("Mul", ("y", "w"), ("z",))], [ref],
                     "float32", "z")  # fmt: skip
    x = np.float32(2)
    assert np.array_equal(outputs_of(graph, x, load)["z"], (values + x) * values)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    ("x", "w"),
    [((3, 5, 40), (3, 40, 200)), ((5, 40), (3, 40, 200)), ((2, 1, 5, 40), (3, 40, 200)),
     ((5, 20_000), (20_000,)), ((20_000,), (20_000,)), ((5, 40), (40,)), ((1, 1, 40), (2, 40, 3))],
)  # fmt: skip
def test_products_with_weights_that_are_no_matrices(
    x: tuple[int, ...], w: tuple[int, ...], load: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal(x, np.float32), rng.standard_normal(w, np.float32)
    (ref,) = in_file(tmp_path / "w.bin", array_ref("w", right))
    y = outputs_of(graph_of([Node("MatMul", ("x", "w"), ("y",))], [ref]), left, load)["y"]
    wanted = np.matmul(left.astype(np.float64), right)
    assert y.shape == wanted.shape and y.dtype == np.float32
    assert np.abs(y - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("transposed", [True, False])
def test_rows_that_no_buffer_has_room_for(transposed: bool, load: str, tmp_path: Path) -> None:
    """Such a matrix is no stream of rows: a product gets it whole."""
    k, n = (2000, 9) if transposed else (9, 2000)
    weight, dense = random_weight("float32", k, n, np.random.default_rng(0), transposed)
    (ref,) = in_file(tmp_path / "w.bin", replace(weight.ref, source=bytes(weight.buffer)))
    for m in (1, 3, 20):
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        y = outputs_of(graph_of([Node("MatMul", ("x", "w"), ("y",))], [ref]), x, load)["y"]
        assert_product(y, x, dense)


def test_one_weight_in_many_places(tmp_path: Path) -> None:
    """Twice in a node, by several nodes in several ways, and as an output of the graph."""
    values = np.random.default_rng(0).standard_normal((140, 140)).astype(np.float32) / 12
    (ref,) = in_file(tmp_path / "w.bin", array_ref("w", values))
    nodes = [
        Node("MatMul", ("w", "w"), ("a",)), Node("MatMul", ("x", "w"), ("b",)),
        Node("Gemm", ("b", "w", "w"), ("c",), {"transB": 1}), Node("Add", ("a", "w"), ("d",)),
        Node("Add", ("c", "d"), ("y",)),
    ]  # fmt: skip
    x = np.random.default_rng(1).standard_normal((140, 140)).astype(np.float32)
    w = values.astype(np.float64)
    wanted = x @ w @ w.T + w + w @ w + w
    for load in LOADS:
        found = outputs_of(graph_of(nodes, [ref], "float32", "y", "w"), x, load)
        assert np.array_equal(found["w"], values)
        assert np.abs(found["y"] - wanted).max() <= 1e-5 * np.abs(wanted).max()


# -- in parts

PARTS = {
    "columns of nibbles": dequantised("int4", 320, 48, 64, zeros=True),
    "rows of nibbles": dequantised("uint4", 320, 33, 32, zeros=True, turned=True),
    "columns of bytes": dequantised("int8", 320, 50, per="row", zeros=True),
    "rows of bytes": dequantised("uint8", 320, 50, 128, turned=True),
    "blocks that no panel has": dequantised("int8", 192, 9, 48, zeros=True),
    "a bias": dequantised("int4", 320, 48, 64, turned=True, gemm=True),
    "4 bits": nbits(4, 320, 50, 64, zeros="packed"),
    "8 bits": nbits(8, 320, 33, 32),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_weights_in_parts(name: str, threads: int, tmp_path: Path) -> None:
    """Of a file of its own: every part in pieces, the same as when all is in memory."""
    found: Quantised = PARTS[name]
    path = saved(found.model, tmp_path / "model.onnx")
    results = []
    for load in ("ram", "stream"):
        with Session(path, load=load, threads=threads) as session:
            if load == "stream":
                assert session.provider.bytes_a_pass > 0  # type: ignore[attr-defined]
            for m in (1, 3, 20, 3, 1):
                x = activations(m, found.k)
                y = session.run({"x": x})["y"] - (0 if found.bias is None else found.bias)
                assert_product(y, x, found.dense, packed=True)
                results.append(y)
    for a, b in zip(results[:5], results[5:], strict=True):
        assert np.array_equal(a, b)
