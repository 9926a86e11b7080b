"""Memory that is used again: never while anybody can still see it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.kernels import buffers
from onnxstream_nb.kernels.buffers import SMALL, empty

Array = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    buffers.drop_idle()
    yield
    buffers.drop_idle()


def address(array: Array) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5), (7,), (512, 577), (SMALL // 4,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
def test_shape_type_and_room_for_all_elements(shape: tuple[int, ...], dtype: Any) -> None:
    array = empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    array[...] = 1
    assert (array == 1).all()


def test_memory_is_used_again_for_what_is_about_as_large() -> None:
    first = empty((1000, 100))
    where = address(first)
    del first
    assert address(empty((1000, 99))) == where


def test_a_view_keeps_it() -> None:
    first = empty((1000, 100))
    first[:] = 7
    view = first.reshape(-1)[5::3].T
    del first
    second = empty((1000, 100))
    second[:] = 8
    assert (view == 7).all()
    where = address(second)
    del view
    assert address(empty((1000, 100))) != where


def test_what_lies_idle_is_bounded_and_can_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "KEPT", 3 << 20)
    held = [empty((1 << 20,), np.uint8) for _ in range(5)]
    del held
    assert buffers._bytes == [3 << 20]
    assert sum(map(len, buffers._idle.values())) == 3
    buffers.drop_idle()
    assert buffers._bytes == [0] and not buffers._idle


def test_threads_never_share_memory() -> None:
    wrong: list[int] = []

    def work(mine: int) -> None:
        for i in range(200):
            array = empty((40_000 + 500 * (i % 7),))
            array[:] = mine
            if not (array == mine).all():
                wrong.append(mine)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers._bytes[0] == sum(size * len(blocks) for size, blocks in buffers._idle.items())
