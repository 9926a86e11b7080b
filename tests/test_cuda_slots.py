"""A cache's slots on a GPU, and those beside them."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import Array
from whole_models import CountingDevice

from onnxstream_nb.errors import DeviceMemoryError, UsageError
from onnxstream_nb.gpu.board import Board
from onnxstream_nb.gpu.slots import DeviceSlot, DeviceSlots
from onnxstream_nb.kvslot import KVSlot, Slot


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def board(device: CountingDevice) -> Board:
    return Board(device, 1 << 20, pytest.fail)


def ramp(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1


def test_a_slot_is_filled_and_set_back(board: Board) -> None:
    place = DeviceSlots(board)
    slot = place(Slot("key", 2, 16, np.dtype(np.float16), positions=40))
    assert isinstance(slot, DeviceSlot) and slot.shape == (1, 2, 0, 16)
    assert np.asarray(slot).shape == (1, 2, 0, 16)
    rows = ramp(1, 2, 5, 16) / 8
    slot.write(rows[:, :, :3])
    slot.length = 3
    slot.write(rows[:, :, 3:])
    present = slot.advanced(5)
    np.testing.assert_array_equal(np.asarray(present), rows)
    assert np.asarray(slot).dtype == np.float16 and slot.shape[2] == 3
    slot.length = 1
    np.testing.assert_array_equal(np.asarray(slot), rows[:, :, :1])
    with pytest.raises(UsageError, match="do not fit"):
        slot.write(np.zeros((1, 2, slot.capacity, 16)))


def test_how_long_the_slots_of_a_sequence_are_goes_up_once(
    board: Board, device: CountingDevice
) -> None:
    place = DeviceSlots(board)
    keys, values = (place(Slot(kind, 1, 16, positions=40)) for kind in ("key", "value"))
    for length in (0, 7, 7, 0):
        keys.length = values.length = length
        address = keys.past()
        assert address == values.past()
        assert board.download(address, 8).view(np.int64)[0] == length
    assert device.up == 3 * 8


@pytest.mark.parametrize("size", [16, 24, 40])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_slot_of_the_cpu_is_written_alike(kind: str, size: int) -> None:
    """Of a layer whose others lie on a GPU: within blocks, and over their ends."""
    slot, rows = KVSlot(kind, 2, size, positions=70), ramp(1, 2, 40, size) / 64
    for start, stop in ((0, 3), (3, 3), (3, 33), (33, 40)):
        slot.write(rows[:, :, start:stop])
        slot.length = stop
    np.testing.assert_array_equal(np.asarray(slot), rows.astype(np.float16))
    with pytest.raises(UsageError, match="do not fit"):
        slot.write(np.zeros((1, 2, slot.capacity, size)))


def test_where_slots_lie(board: Board, device: CountingDevice) -> None:
    """Those of eight bits, and of sizes that no kernel reads, in memory."""
    place = DeviceSlots(board)
    assert isinstance(place(Slot("key", 2, 16, encoding="q8")), KVSlot)
    assert isinstance(place(Slot("key", 2, 24)), KVSlot)
    assert isinstance(place(Slot("value", 2, 48)), DeviceSlot)
    device.refused = {device.allocations}
    with pytest.raises(DeviceMemoryError, match="64 positions: a smaller --context takes less"):
        place(Slot("key", 2, 16, positions=50))
