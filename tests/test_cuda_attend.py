"""Attention on a GPU, over a cache that lies there, against that of the CPU over its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice
from test_cuda_ops import NEWEST, function, random, rotary
from test_cuda_products import HALVES, close

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.gpu.board import Board
from onnxstream_nb.gpu.slots import DeviceSlot, DeviceSlots
from onnxstream_nb.kvslot import KVSlot, Slot, SlotGroup


@pytest.fixture
def board() -> Board:
    return Board(FakeDevice(), 1 << 26, pytest.fail)


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
    there: bool = True, caches: Sequence[Array] = (), device: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Attention of new tokens over either cache: what it gives, and what it appends."""
    heads, kv, size = sizes
    widths = heads * size, kv * size, kv * size
    new = [random(1, tokens, width, seed=i) for i, width in enumerate(widths)]
    options = {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv, "n_outputs": 3, **options}
    ours, theirs = slots(board, sizes, filled), slots(None, sizes, filled)
    op_type, middle = ("RotaryAttention", ()) if caches else ("Attention", (mask,))
    y, *wanted = function(op_type, "cpu")(*new, *middle, *theirs, *caches, **options)
    moved = [board.put(x) if device else x for x in new]
    found, *presents = function(op_type, "cuda")(*moved, *middle, *ours, *caches, **options)
    close(found, y, HALVES, there)
    for slot, present, other in zip(ours, presents, wanted, strict=True):
        if isinstance(slot, DeviceSlot):
            assert slot.length == filled and present.length == filled + tokens
            np.testing.assert_allclose(np.asarray(present), np.asarray(other), 1e-3, 1e-3)


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


@pytest.mark.parametrize("tokens", [1, 3, 6])
@pytest.mark.parametrize(("dim", "interleaved"), [(0, 0), (0, 1), (8, 0)])
def test_attention_that_rotates(dim: int, interleaved: int, tokens: int, board: Board) -> None:
    options = {"rotary_embedding_dim": dim, "interleaved": interleaved, "left_window_size": 5}
    caches = rotary(tokens, dim or 16)
    attended(board, tokens, caches=caches, **options)
    told: list[str] = []
    board._tell, board._most = told.append, board._taken
    board._known.clear()
    board._free.clear()  # no room: the CPU does it, and the cache on the GPU gets it
    attended(board, tokens, caches=caches, there=False, device=False, **options)
    assert len(told) == 1


def test_angles_that_do_not_fit(board: Board) -> None:
    for tokens in (1, 6):
        with pytest.raises(ShapeError):
            attended(board, tokens, caches=rotary(tokens, 8))
        with pytest.raises(ShapeError):
            attended(board, tokens, caches=rotary(tokens, 8), device=False)


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
