"""Products, tables and attention on a GPU, of a weight and a cache that lie there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice
from test_cuda_offload import affine, weight
from test_cuda_ops import NEWEST, function, random

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.gpu.board import Board, DeviceArray
from onnxstream_nb.gpu.slots import DeviceSlot, DeviceSlots
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.kvslot import KVSlot, Slot, SlotGroup
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


# -- attention

Sizes = tuple[int, int, int]  # heads of queries, of keys and values, and their size
GQA = (4, 2, 16)


def slots(board: Board | None, sizes: Sizes, filled: int, seed: int = 9, **about: Any) -> list[Any]:
    """Keys and values of so many positions, on the GPU or the CPU."""
    found = []
    for i, kind in enumerate(("key", "value")):
        like = Slot(kind, sizes[1], sizes[2], positions=200)
        place = DeviceSlots(board) if board is not None else Slot.in_memory
        slot = place(like)
        assert isinstance(slot, DeviceSlot if board is not None else KVSlot)
        slot.write(random(1, sizes[1], filled, sizes[2], seed=seed + i))
        slot.length = filled
        found.append(slot)
    return found


def attended(
    board: Board, tokens: int, sizes: Sizes = GQA, filled: int = 19, mask: Array | None = None,
    there: bool = True, pasts: Any = None, **options: Any,
) -> None:  # fmt: skip
    """Attention of new tokens over either cache: what it gives, and what it appends."""
    heads, kv, size = sizes
    widths = heads * size, kv * size, kv * size
    new = [random(1, tokens, width, seed=i) for i, width in enumerate(widths)]
    options = {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv, "n_outputs": 3, **options}
    ours, theirs = pasts or (slots(board, sizes, filled), slots(None, sizes, filled))
    y, *wanted = function("Attention", "cpu")(*new, mask, *theirs, **options)
    moved = [board.put(x) for x in new]
    found, *presents = function("Attention", "cuda")(*moved, mask, *ours, **options)
    close(found, y, HALVES, there)
    for slot, present, other in zip(ours, presents, wanted, strict=True):
        if isinstance(slot, DeviceSlot):
            assert slot.length == filled and present.length == filled + tokens
            np.testing.assert_array_equal(np.asarray(present), np.asarray(other))


@pytest.mark.parametrize("tokens", [1, 4, 5, 70])
def test_attention(tokens: int, board: Board) -> None:
    attended(board, tokens)
    attended(board, tokens, filled=0)


@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_attention_in_a_window_with_a_softcap(tokens: int, board: Board) -> None:
    attended(board, tokens, left_window_size=4)
    attended(board, tokens, left_window_size=0, softcap=2.0, scale=0.7)


@pytest.mark.parametrize("sizes", [(3, 1, 32), (2, 2, 48), (6, 1, 16)])
def test_attention_of_other_sizes(sizes: Sizes, board: Board) -> None:
    attended(board, 1, sizes)
    attended(board, 6, sizes, filled=3)


def test_a_single_token_that_is_not_told_to_look_back(board: Board) -> None:
    attended(board, 1, is_causal=0)
    attended(board, 1, is_causal=0, left_window_size=3)
    attended(board, 3, is_causal=0, there=False)


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_mask_is_the_cpu_s_and_the_cache_the_gpu_s(tokens: int, board: Board) -> None:
    mask = random(1, 1, tokens, 19 + tokens)
    attended(board, tokens, mask=mask, there=False)
    attended(board, tokens, mask=mask > 0, filled=19, is_causal=0, there=False)
    attended(board, tokens, right_window_size=0, there=False)


@pytest.mark.parametrize(("keys", "values"), [(16, 32), (16, 24), (24, 24), (24, 16)])
def test_heads_that_no_kernel_is_for(keys: int, values: int, board: Board) -> None:
    """Of values that are larger than keys, or of odd sizes, which stay with the CPU."""
    for past in (0, 5):
        pairs = []
        for place in (DeviceSlots(board), Slot.in_memory):
            made = [place(Slot("key", 2, keys)), place(Slot("value", 2, values))]
            for slot, size in zip(made, (keys, values), strict=True):
                slot.write(random(1, 2, past, size))
                slot.length = past
            pairs.append(made)
        new = [random(1, 3, 2 * size) for size in (keys, keys, values)]
        options = {"is_causal": 1, "q_num_heads": 2, "kv_num_heads": 2, "n_outputs": 3}
        y, *wanted = function("Attention", "cpu")(*new, None, *pairs[1], **options)
        moved = [board.put(x) for x in new]
        found, *presents = function("Attention", "cuda")(*moved, None, *pairs[0], **options)
        close(found, y, HALVES, there=False)
        for ours, theirs in zip(presents, wanted, strict=True):
            assert ours.shape == theirs.shape and ours.length == past + 3
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 7, 1)])
def test_several_sequences(counts: tuple[int, ...], board: Board) -> None:
    filled = (0, 20, 33)
    pairs = [[slots(where, GQA, n, seed=n) for n in filled] for where in (board, None)]
    groups = [
        [SlotGroup([(pair[i], n) for pair, n in zip(many, counts, strict=True)]) for i in (0, 1)]
        for many in pairs
    ]
    tokens = sum(counts)
    new = [random(1, tokens, width, seed=i) for i, width in enumerate((64, 32, 32))]
    options = {"is_causal": 1, "q_num_heads": 4, "kv_num_heads": 2, "n_outputs": 1}
    y = function("Attention", "cpu")(*new, None, *groups[1], **options)
    moved = [board.put(x) for x in new]
    close(function("Attention", "cuda")(*moved, None, *groups[0], **options), y, HALVES)
    advance(pairs, counts)
    later = function("Attention", "cpu")(*new, None, *groups[1], **options)
    board._most = 0  # no room for what it computes: the CPU does it
    board._free.clear()
    told: list[str] = []
    board._tell = told.append
    found = function("Attention", "cuda")(*moved, None, *groups[0], **options)
    close(found, later, HALVES, there=False)
    assert len(told) == 1
    advance(pairs, counts)
    for ours, theirs in zip(*pairs, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def advance(pairs: Any, counts: tuple[int, ...]) -> None:
    """What was written counts."""
    for many in pairs:
        for pair, count in zip(many, counts, strict=True):
            for slot in pair:
                slot.length += count


def test_no_more_than_there_is_room_for(board: Board) -> None:
    keys, values = slots(board, GQA, 200)
    new = [board.put(random(1, keys.capacity - 199, n)) for n in (64, 32, 32)]
    with pytest.raises(Exception, match="do not fit a cache"):
        function("Attention", "cuda", NEWEST)(
            *new, None, keys, values, is_causal=1, q_num_heads=4, kv_num_heads=2
        )
