"""Products on a GPU, and rows of tables, of weights that lie there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice
from test_cuda_offload import affine, weight
from test_cuda_ops import function, random

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.gpu.board import Board, DeviceArray
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.registry import lookup
from onnxstream_nb.weights import DiskProvider

HALVES = 1e-3  # of the largest: what is rounded to float16 on the way


@pytest.fixture
def board() -> Board:
    return Board(FakeDevice(), 1 << 26, pytest.fail)


def placed(board: Board, ref: WeightRef) -> Any:
    """The weight as a DeviceMatrix."""
    operator, disk = lookup("DeviceMatrix", "onnxstream_nb", 1), DiskProvider()
    assert operator is not None

    def hold(array: Array) -> int:
        memory = board.hold(array.nbytes)
        board.upload(memory.address, array)
        kept.append(memory)
        return memory.address

    kept: list[Any] = []
    made = operator.function(ref, disk.get(ref), None, lambda: disk.get(ref), hold, board)
    made.kept = kept
    return made


def close(found: Any, wanted: Array, error: float, there: bool = True) -> None:
    assert isinstance(found, DeviceArray) == there
    found = np.asarray(found)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    most = np.abs(wanted).max(initial=1e-3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=error * most)


# -- products


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (1, 4, 64), (2, 9, 64), (0, 64)])
@pytest.mark.parametrize("encoding", ["float16", "q8_0", "q4_0", "q4_1"])
def test_products(encoding: str, shape: tuple[int, ...], board: Board) -> None:
    ref, w = weight(encoding, 64, 21)
    x, matrix = random(*shape), placed(board, ref)
    rows = x.size // 64
    error = HALVES if rows > 8 else 5e-6
    close(function("MatMul", "cuda")(board.put(x), matrix), x @ w, error)
    if rows < 3:
        close(function("MatMul", "cuda")(x, matrix), x @ w, error)
        half = x.astype(np.float16)
        wanted = (half.astype(np.float32) @ w).astype(np.float16)
        close(function("MatMul", "cuda")(board.put(half), matrix), wanted, 2e-3)


@pytest.mark.parametrize("rows", [70, 130])
def test_products_of_many_rows_with_integers(rows: int, board: Board) -> None:
    ref, w = affine("uint4", "float16", 64, 40, 32, True)
    x = random(rows, 64)
    close(function("MatMul", "cuda")(board.put(x), placed(board, ref)), x @ w, HALVES)


@pytest.mark.parametrize("rows", [1, 2, 5, 11])
def test_products_with_several_matrices(rows: int, board: Board) -> None:
    """Of one encoding and of two, and one that no product takes."""
    made = [weight(*each) for each in (("q8_0", 64, 21), ("q8_0", 64, 6), ("float16", 64, 13))]
    x, wanted = random(rows, 64), [random(rows, 64) @ w for _, w in made]
    found = function("MatMuls", "cuda")(board.put(x), *(placed(board, ref) for ref, _ in made))
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs, HALVES if rows > 8 else 5e-6)
    elsewhere = DiskProvider().get(made[1][0])
    found = function("MatMuls", "cuda")(board.put(x), placed(board, made[0][0]), elsewhere)
    for ours, theirs in zip(found, wanted[:2], strict=True):
        close(ours, theirs, 2e-2, there=False)


def test_products_that_are_left_to_the_cpu(board: Board) -> None:
    ref, w = weight("float16", 40, 6)  # no multiple of 32
    x = random(2, 40)
    close(function("MatMul", "cuda")(board.put(x), placed(board, ref)), x @ w, 5e-6, there=False)
    a, b = random(2, 3, 5), random(2, 5, 4)
    for given in ((board.put(a), b), (a, board.put(b)), (board.put(a), board.put(b))):
        close(function("MatMul", "cuda")(*given), a @ b, 5e-6, there=False)


def test_products_of_shapes_that_do_not_fit(board: Board) -> None:
    """Also where there are as many elements as of other rows."""
    matrix = placed(board, weight("float16", 64, 6)[0])
    for shape in ((2, 32), (64, 2), (64, 1)):
        with pytest.raises(ShapeError):
            function("MatMul", "cuda")(board.put(random(*shape)), matrix)


# -- tables


@pytest.mark.parametrize("encoding", ["float16", "q8_0", "q4_0", "q4_1"])
def test_rows_of_a_table(encoding: str, board: Board) -> None:
    """As a matrix has them; where no kernel looks them up, they are the CPU's."""
    ref, w = weight(encoding, 64, 9)
    table = WeightRef("t", (9, 64), "float32", ref.source, 0, ref.nbytes, encoding)
    operator, disk = lookup("DeviceLookup", "onnxstream_nb", 1), DiskProvider()
    assert operator is not None
    made = operator.function(
        table, placed(board, ref), lambda: disk.get(table), np.dtype(np.float32)
    )
    if encoding == "q4_1":
        assert made is None
        return
    for ids in ([[0, 8, -9], [-1, 3, 3]], [], 4):
        wanted = w.T[np.array(ids, np.int64)]
        close(function("Gather", "cuda")(made, np.array(ids, np.int64)), wanted, 1e-6)
        close(function("Gather", "cuda")(made, np.array(ids, np.int32), axis=-2), wanted, 1e-6)
    with pytest.raises(ShapeError, match="Gather: index 9 is out of range for axis 0 of size 9"):
        function("Gather", "cuda")(made, np.array([9]))
    columns = function("Gather", "cuda")(made, np.array([63, 0]), axis=1)
    close(columns, w.T[:, [63, 0]], 1e-6, there=False)
