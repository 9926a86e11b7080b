"""Operators on a GPU against those of the CPU, also where they leave it to those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.gpu.board import Board, DeviceArray
from onnxstream_nb.registry import lookup

NEWEST = 25
FUSED = ("AddRMSNormalization", "SwishMul", "MatMuls", "RotaryAttention")


@pytest.fixture
def board() -> Board:
    return Board(FakeDevice(), 1 << 26, pytest.fail)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def function(op_type: str, device: str, opset: int = NEWEST) -> Any:
    domain = "onnxstream_nb" if op_type in FUSED else ""
    found = lookup(op_type, domain, opset, device)
    assert found is not None and found.device == device, op_type
    return found.function


def compare(
    board: Board, op_type: str, arguments: Sequence[Any], *, at: Sequence[int] = (0,),
    there: bool = True, opset: int = NEWEST, tolerance: float = 2e-6, **attributes: Any,
) -> None:  # fmt: skip
    """The operator with the arguments `at` some places on the GPU: its result, which lies `there`
    too, is the CPU's."""
    wanted = function(op_type, "cpu", opset)(*arguments, **attributes)
    moved = [board.put(a) if i in at else a for i, a in enumerate(arguments)]
    found = function(op_type, "cuda", opset)(*moved, **attributes)
    many = isinstance(wanted, tuple)
    for ours, theirs in zip(found if many else [found], wanted if many else [wanted], strict=True):
        assert isinstance(ours, DeviceArray) == there
        ours = np.asarray(ours)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        most = np.abs(theirs[np.isfinite(theirs)]).max(initial=1e-3)
        error = 2e-3 if theirs.dtype == np.float16 else tolerance
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=error * most)


def refused(board: Board, op_type: str, arguments: Sequence[Any], at: Sequence[int] = (0,),
            opset: int = NEWEST, **attributes: Any) -> None:  # fmt: skip
    """Both raise the same error."""
    moved = [board.put(a) if i in at else a for i, a in enumerate(arguments)]
    said = []
    for given, device in ((arguments, "cpu"), (moved, "cuda")):
        with pytest.raises(ShapeError) as caught:
            function(op_type, device, opset)(*given, **attributes)
        said.append(str(caught.value))
    assert said[0] == said[1]


# -- each element by itself

UNARY = ("Exp", "Neg", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Erf", "Sin", "Cos", "Swish",
         "Gelu")  # fmt: skip


@pytest.mark.parametrize("op_type", UNARY)
def test_of_one_input(op_type: str, board: Board) -> None:
    for shape in [(3, 5, 7), (), (0, 4), (257,)]:
        for dtype in (np.float32, np.float16):
            compare(board, op_type, [np.array(3 * random(*shape), dtype)])


def test_of_one_input_and_attributes(board: Board) -> None:
    compare(board, "Swish", [random(9)], alpha=1.7)
    compare(board, "Gelu", [random(9)], approximate="tanh")
    compare(board, "Sqrt", [np.array([0, 2, -1, np.inf], np.float32)])


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 5), (3, 5)), ((3, 5), ()), ((3, 5), (1,)), ((3, 5), (5,)), ((3, 5), (1, 1, 1)),
     ((2, 3, 5), (3, 5)), ((3, 1), (3, 5)), ((1, 5), (3, 1)), ((2, 3, 1), (1, 1, 5)),
     ((), ()), ((1,), (0,)), ((0, 5), (5,)), ((0, 5), (0, 1))],
)  # fmt: skip
def test_broadcasts(a: tuple[int, ...], b: tuple[int, ...], op_type: str, board: Board) -> None:
    x, y = np.asarray(random(*a)), np.asarray(random(*b, seed=1))
    for at in ((0,), (1,), (0, 1)):
        compare(board, op_type, [x, y], at=at)
        compare(board, op_type, [y, x], at=at)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3, 5), (3, 1)), ((2, 1, 5), (1, 3, 1)), ((2, 3, 4, 5), (2, 1, 4, 1))]
)
def test_broadcasts_that_are_left_to_the_cpu(
    a: tuple[int, ...], b: tuple[int, ...], board: Board
) -> None:
    compare(board, "Add", [random(*a), random(*b)], there=False)
    compare(board, "Sub", [random(*b), random(*a)], at=(0, 1), there=False)


def test_shapes_that_do_not_broadcast(board: Board) -> None:
    refused(board, "Add", [random(3, 5), random(4)])
    refused(board, "Mul", [random(3, 5), random(3)], at=(0, 1))


def test_the_form_before_opset_7(board: Board) -> None:
    given = [random(2, 3, 4), random(3)]
    compare(board, "Add", given, opset=6, there=False, broadcast=1, axis=1)
    compare(board, "Mul", [given[0], random(4)], opset=6)


# -- rows


@pytest.mark.parametrize("shape", [(2, 3, 37), (1, 300), (0, 37)])
def test_normalised_rows(shape: tuple[int, ...], board: Board) -> None:
    x, scale, bias = random(*shape), random(shape[-1], seed=1), random(shape[-1], seed=2)
    compare(board, "Softmax", [x])
    compare(board, "RMSNormalization", [x, scale], at=(0, 1))
    compare(board, "RMSNormalization", [x, scale], axis=x.ndim - 1, epsilon=1e-2)
    compare(board, "LayerNormalization", [x, scale, bias], epsilon=1e-2, n_outputs=1)
    compare(board, "LayerNormalization", [x, scale], at=(1,), n_outputs=1)
    half = x.astype(np.float16)
    compare(board, "Softmax", [half])
    compare(board, "RMSNormalization", [half, scale.astype(np.float16)])


def test_no_columns(board: Board) -> None:
    compare(board, "Softmax", [random(3, 0)], there=False)
    compare(board, "RMSNormalization", [random(3, 0), random(0)], at=(0, 1), there=False)
    compare(board, "LayerNormalization", [random(3, 0), random(0)], there=False, n_outputs=1)


def test_rows_that_are_left_to_the_cpu(board: Board) -> None:
    x = random(2, 3, 5)
    compare(board, "Softmax", [x], axis=1, there=False)
    compare(board, "Softmax", [x], axis=0, there=False)
    compare(board, "RMSNormalization", [x, random(3, 5)], axis=1, there=False)
    compare(board, "RMSNormalization", [x, random(1)], there=False)
    compare(board, "LayerNormalization", [x, random(3, 5)], axis=1, there=False, n_outputs=1)
    compare(board, "LayerNormalization", [x, random(5), random(1)], there=False, n_outputs=1)
    compare(board, "LayerNormalization", [x, random(5)], there=False, n_outputs=3)


def test_several_as_one(board: Board) -> None:
    scale = random(37, seed=1)
    for shape in ((2, 3, 37), (0, 37), (1, 37)):
        a, b = random(*shape), random(*shape, seed=2)
        compare(board, "AddRMSNormalization", [a, b, scale], at=(1, 2), epsilon=1e-2)
        compare(board, "SwishMul", [a, b], at=(1,))
    halves = [x.astype(np.float16) for x in (random(2, 37), random(2, 37, seed=2), scale)]
    compare(board, "AddRMSNormalization", halves)
    compare(board, "SwishMul", halves[:2])
    for other in ((37,), (3, 1)):
        compare(board, "AddRMSNormalization", [random(3, 37), random(*other), scale], there=False)
        compare(board, "SwishMul", [random(3, 37), random(*other)], there=False)
    compare(board, "AddRMSNormalization", [random(3, 0), random(3, 0), random(0)], there=False)
    refused(board, "SwishMul", [random(3, 5), random(4)])


def test_softmax_before_opset_13(board: Board) -> None:
    """All axes from one on are taken for one, and by default that is the second."""
    x = random(2, 3, 5)
    compare(board, "Softmax", [x], opset=11, there=False)
    compare(board, "Softmax", [x], opset=11, there=False, axis=1)
    compare(board, "Softmax", [x], opset=11, axis=2)
    compare(board, "Softmax", [random(4, 7)], opset=11)


# -- positions, rows of tables, types and shapes


def rotary(t: int, r: int, seed: int = 3) -> list[Array]:
    """cos and sin (1, T, R / 2) of any angles."""
    angles = random(1, t, r // 2, seed=seed)
    return [np.cos(angles), np.sin(angles)]


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("dim", [0, 8])
def test_rotary_embedding(dim: int, interleaved: int, board: Board) -> None:
    caches = rotary(5, dim or 16)
    options = {"num_heads": 3, "interleaved": interleaved, "rotary_embedding_dim": dim}
    for at in ((0,), (0, 1, 2)):
        compare(board, "RotaryEmbedding", [random(1, 5, 48), *caches], at=at, **options)
    halves = [x.astype(np.float16) for x in (random(1, 5, 48), *caches)]
    compare(board, "RotaryEmbedding", halves, **options)
    del options["num_heads"]
    one = [c[:, :1] for c in caches]
    compare(board, "RotaryEmbedding", [random(1, 3, 1, 16), *one], **options)
    compare(board, "RotaryEmbedding", [random(1, 3, 5, 16), *caches], there=False, **options)


def test_rotary_embedding_by_position(board: Board) -> None:
    caches = [c[0] for c in rotary(9, 16)]
    for ids in ([[0, 8, 3], [4, 4, -1]], [[2, 2, 7], [0, 1, 8]]):
        given = [random(2, 3, 48), *caches, np.array(ids)]
        compare(board, "RotaryEmbedding", given, at=(0, 1), num_heads=3)
        given[3] = given[3].astype(np.int32)
        compare(board, "RotaryEmbedding", given, num_heads=3)
    for wrong in (9, -10):
        given[3] = np.array([[0, 1, 2], [3, wrong, 4]])
        refused(board, "RotaryEmbedding", given, num_heads=3)


def test_rotary_embedding_of_other_shapes(board: Board) -> None:
    shared = rotary(5, 16)  # one for all of a batch
    compare(board, "RotaryEmbedding", [random(2, 5, 48), *shared], there=False, num_heads=3)
    refused(board, "RotaryEmbedding", [random(1, 5, 48), *rotary(5, 8)], num_heads=3)
    given = [random(1, 5, 48), *rotary(5, 8)]
    refused(board, "RotaryEmbedding", given, num_heads=3, rotary_embedding_dim=16)


@pytest.mark.parametrize("indices", [[0, 6, 3], [[-1, -7], [2, 2]], 5, [], [[]], [[[4]]]], ids=str)
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_gather(indices: Any, dtype: Any, board: Board) -> None:
    ids = np.array(indices, dtype)
    compare(board, "Gather", [random(7, 33), ids])
    compare(board, "Gather", [random(7, 33), ids], axis=-2)
    compare(board, "Gather", [random(1, 7, 5), ids], axis=1)
    compare(board, "Gather", [random(1, 7, 5).astype(np.float16), ids], axis=-2)


def test_gather_of_others(board: Board) -> None:
    ids = np.array([1, 0])
    compare(board, "Gather", [random(7, 33), ids], axis=1, there=False)
    compare(board, "Gather", [random(2, 7, 5), ids], axis=1, there=False)
    compare(board, "Gather", [random(7), ids], there=False)
    for wrong in (7, -8):
        refused(board, "Gather", [random(7, 33), np.array([0, wrong])])
        refused(board, "Gather", [random(1, 7, 33), np.array([0, wrong])], axis=1)
        refused(board, "Gather", [random(7, 33), np.array([0, 33])], axis=1)


def test_types(board: Board) -> None:
    x = random(3, 5)
    compare(board, "Cast", [x], to=10)
    compare(board, "Cast", [x.astype(np.float16)], to=1)
    compare(board, "Cast", [3 * x], to=7, there=False)
    compare(board, "Cast", [x], to=9, there=False)


def test_shapes(board: Board) -> None:
    x = random(2, 1, 6)
    for shape in ([3, 4], [0, -1], [-1], [2, 6, 1, 1]):
        compare(board, "Reshape", [x, np.array(shape)])
    compare(board, "Reshape", [random(0, 4), np.array([4, 0])], allowzero=1)
    compare(board, "Reshape", [x], opset=1, shape=[4, 3])
    compare(board, "Unsqueeze", [x, np.array([0, -1])])
    compare(board, "Squeeze", [x])
    compare(board, "Squeeze", [x, np.array([1])])
    compare(board, "Flatten", [x], axis=2)
    compare(board, "Flatten", [random(0, 3)])
    compare(board, "Identity", [x.astype(np.float16)])
    for wrong in ([5], [-1, 7], [0, 0, 0, 0]):
        refused(board, "Reshape", [x, np.array(wrong)])
