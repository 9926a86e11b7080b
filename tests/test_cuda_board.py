"""A board: memory that comes and goes in the order of a stream, and what is copied when."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice
from whole_models import CountingDevice

from onnxstream_nb.errors import DeviceError, DeviceMemoryError, UsageError
from onnxstream_nb.gpu import board as boards
from onnxstream_nb.gpu.board import Board
from onnxstream_nb.kernels.cuda_elementwise import UNARY

MOST = 1 << 16


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def board(device: CountingDevice, told: list[str]) -> Board:
    return Board(device, MOST, told.append)


def ramp(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1


def negated(board: Board, x: Any) -> Any:
    """What a kernel makes of an array there."""
    y = board.room(x.shape)
    kernel = UNARY["negative"]
    arguments = x.address, y.address, x.size, 0.0
    board.launch(kernel, (-(-x.size // kernel.threads),), (kernel.threads,), arguments)
    return y


# -- memory


def test_memory_is_taken_again_before_the_stream_has_come_to_it(
    board: Board, device: CountingDevice
) -> None:
    """What reads it was given to the stream before what writes it."""
    x = board.put(ramp(9))
    first, place = negated(board, x), x.address
    board.begin()
    del x
    other = board.put(-7 * ramp(9))
    assert other.address == place and device.allocations == 2
    np.testing.assert_array_equal(board.fetch(first), -ramp(9))
    np.testing.assert_array_equal(board.fetch(other), -7 * ramp(9))


def test_views_keep_the_memory_that_they_look_at(board: Board, device: CountingDevice) -> None:
    x = board.put(ramp(2, 3, 4))
    views = x.as_shape((6, -1)), x[1], x.as_type(np.float16), x.as_shape((3, 8))[-1]
    board.begin()
    del x
    assert board.room((24,)).address != views[0].address
    wanted = ramp(2, 3, 4)
    for view, array in zip(
        views, (wanted.reshape(6, 4), wanted[1], wanted, wanted.reshape(3, 8)[2]), strict=True
    ):
        assert view.shape == array.shape and view.ndim == array.ndim and view.size == array.size
        np.testing.assert_array_equal(np.asarray(view), array)
    assert views[2].dtype == np.asarray(views[2]).dtype == np.float16
    assert views[2].nbytes == 4 * 24  # as it lies there
    assert [row.shape for row in views[0]] == 6 * [(4,)]  # an IndexError ends it


def test_memory_is_bounded_by_most(board: Board, device: CountingDevice) -> None:
    kept = board.room((MOST // 8,))
    with pytest.raises(DeviceMemoryError, match="set aside"):
        board.room((MOST // 4,))
    assert sum(a.nbytes - 256 for a in device.held.values()) <= MOST
    del kept
    board.room((MOST // 4,))  # what was free was given back for it
    assert len(device.held) <= 1


def test_sizes_are_rounded_by_an_eighth_at_most() -> None:
    for nbytes in [*range(1, 3000, 7), 10**5, 10**6 + 1, 10**9 + 7]:
        size = boards._rounded(nbytes)
        assert size % 256 == 0 and nbytes <= size <= max(nbytes * 9 / 8 + 256, 256)
        assert boards._rounded(size) == size
    assert boards._rounded(0) == 256


def test_what_is_free_is_given_back_for_what_the_device_refuses() -> None:
    """Of other sizes, while the bound has not been reached."""
    device = FakeDevice(memory=40_000)
    board = Board(device, 1 << 20, pytest.fail)
    board.room((6000,))
    wanted = board.room((9000,))
    assert list(device.held) == [wanted.address]


def test_memory_put_back_while_memory_is_given_back(board: Board, device: CountingDevice) -> None:
    """The collector may let go of arrays at any time."""
    arrays = [board.room((n,)) for n in (10, 1000, 3000)]
    late = [board.room((5000,))]
    arrays.clear()
    release = device.release

    def releasing(address: int) -> None:
        late.clear()
        release(address)

    device.release = releasing  # type: ignore[method-assign]
    board.room((16000,))
    device.release = release  # type: ignore[method-assign]
    board._trim()
    assert not device.held


@pytest.mark.parametrize("order", ["close first", "arrays first"])
def test_after_it_was_closed_nothing_touches_the_device(
    board: Board, device: CountingDevice, order: str
) -> None:
    arrays = [board.put(ramp(4)), board.room((7,)), board.hold(100)]
    if order == "arrays first":
        arrays.clear()
    board.close()
    device.close()
    calls = device.calls
    found = arrays[0] if arrays else None
    arrays.clear()
    gc.collect()
    if found is not None:
        with pytest.raises(UsageError, match="closed"):
            np.asarray(found)
    del found
    with pytest.raises(UsageError, match="closed"):
        board.put(ramp(5))
    assert device.calls == calls and not device.held


def test_what_is_held_is_let_go_of_between_two_passes(board: Board, device: CountingDevice) -> None:
    """Not when the collector comes: that may be in another thread, amid a capture, or when the
    device has failed, where nobody could be told."""
    held = board.hold(1000)
    assert len(device.held) == 1
    del held
    gc.collect()
    board.begin()
    assert not device.held
    held, device.fail_after = board.hold(50), device.calls
    del held
    gc.collect()
    with pytest.raises(DeviceError):
        board.begin()


# -- what goes there


def test_an_array_is_uploaded_once_a_pass(board: Board, device: CountingDevice) -> None:
    x, constant = ramp(5), ramp(6)
    constant.flags.writeable = False
    for i in range(3):
        board.begin()
        x[0] = 100 + i
        assert board.put(x) is board.put(x)
        np.testing.assert_array_equal(board.fetch(board.put(x)), x)
        np.testing.assert_array_equal(board.fetch(board.put(constant)), constant)
    assert device.up == 3 * x.nbytes + constant.nbytes


def test_one_that_changes_while_it_is_under_way(board: Board) -> None:
    """What goes up is what it was when it was put."""
    x = ramp(5)
    found = negated(board, board.put(x))
    x[:] = 0
    np.testing.assert_array_equal(board.fetch(found), -ramp(5))


def test_a_look_that_is_read_only_is_no_constant(board: Board) -> None:
    """Its array changes, and there is a new look in every pass."""
    x = ramp(3)
    for i in range(3):
        board.begin()
        x[0] = i
        look = np.broadcast_to(x, (2, 3))
        known = weakref.ref(look)
        np.testing.assert_array_equal(board.fetch(board.put(look)), look)
    del look
    board.begin()
    gc.collect()
    assert known() is None


def test_one_array_as_two_types(board: Board) -> None:
    x = np.array([3, -1], np.int32)
    whole, floats = board.put(x, np.int64), board.put(x, np.float32)
    assert whole.stored == np.int64 and floats.stored == np.float32
    assert board.fetch(whole).tolist() == board.fetch(floats).tolist() == [3, -1]


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, np.int64, np.int32, ml_dtypes.bfloat16]
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (4, 0, 2)])
def test_there_and_back(shape: tuple[int, ...], dtype: Any, board: Board) -> None:
    x = np.asarray(ramp(*shape)).astype(dtype)
    there = board.put(x)
    found = np.asarray(there)
    assert found.dtype == x.dtype == there.dtype and found.shape == x.shape == there.shape
    np.testing.assert_array_equal(found, x)
    assert found.flags.writeable and np.asarray(there, np.float64).dtype == np.float64


def test_arrays_in_any_order(board: Board) -> None:
    x = ramp(4, 6)
    for look in (x.T, x[::2], x[:, 1:4], np.asfortranarray(x)):
        np.testing.assert_array_equal(board.fetch(board.put(look)), look)


def test_what_no_half_holds_comes_back_infinite(board: Board) -> None:
    """Without a warning: as an operator of the CPU has it."""
    found = np.asarray(board.put(np.array([70000, -70000, 2], np.float32)).as_type(np.float16))
    assert found.tolist() == [np.inf, -np.inf, 2]


# -- what comes back


@pytest.mark.parametrize("staged", [0, 8, 1 << 20])
def test_with_and_without_pinned_memory(
    staged: int, board: Board, device: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "STAGED", staged)
    there = board.put(ramp(30))
    found = [board.fetch(there), board.fetch(there[4])]
    for each in found:  # none is looked at through another
        np.testing.assert_array_equal(each, ramp(30) if each.ndim else 5)
    found[0][:] = 0
    np.testing.assert_array_equal(board.fetch(there), ramp(30))


def test_without_memory_that_is_pinned(board: Board, device: CountingDevice) -> None:
    there = board.put(ramp(30))
    device.refused = {device.allocations}
    np.testing.assert_array_equal(board.fetch(there), ramp(30))


def test_a_lack_of_memory_is_told_once(board: Board, told: list[str]) -> None:
    for _ in range(2):
        board.failed(DeviceMemoryError("no room"))
    assert told == ["no room; the CPU computes what does not fit"]


# -- graphs


def test_a_graph_lives_as_long_as_who_replays_it(board: Board, device: CountingDevice) -> None:
    class Owner:
        """Who replays it."""

    owner, x, y = Owner(), board.put(ramp(5)), board.room((5,))
    kernel = UNARY["negative"]
    graph = board.capture(
        lambda: board.launch(kernel, (1,), (kernel.threads,), (x.address, y.address, 5, 0.0)),
        owner,
    )
    for sign in (1, -1):
        board.send(sign * ramp(5), x)
        board.replay(graph)
        np.testing.assert_array_equal(board.fetch(y), -sign * ramp(5))
    assert len(device.graphs) == 1
    del owner
    gc.collect()
    board.begin()
    assert device.graphs == []
