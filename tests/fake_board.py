"""A board over the GPU of fake_device.py: what kernels that work for whole mode ask of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cuda_arrays import Array
from fake_device import FakeDevice


class FakeArray:
    """An array in the memory of a FakeBoard."""

    def __init__(self, board: FakeBoard, shape: tuple[int, ...], dtype: Any) -> None:
        self.board, self.shape, self.dtype = board, shape, np.dtype(dtype)
        self.ndim, self.size = len(shape), int(np.prod(shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.address = board.device.allocate(self.nbytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        self.board.fetched.append(self.nbytes)
        found = np.empty(self.shape, self.dtype)
        self.board.device.download(found, self.address, self.board.stream)
        self.board.device.synchronize(self.board.stream)
        return found


class FakeBoard:
    """See gpu/board.py. `fetched` has the bytes of each download; nothing is ever given back."""

    def __init__(self, order: str = "forwards") -> None:
        self.device = FakeDevice(order=order)
        self.stream = self.device.stream()
        self.fetched: list[int] = []

    def room(self, shape: tuple[int, ...], dtype: Any = np.float32) -> FakeArray:
        return FakeArray(self, shape, dtype)

    def put(self, array: Array) -> FakeArray:
        found = self.room(array.shape, array.dtype)
        self.device.upload(found.address, np.ascontiguousarray(array), self.stream)
        return found

    def launch(self, kernel: Any, grid: Any, block: Any, arguments: Sequence[Any]) -> None:
        self.device.launch(kernel, grid, block, arguments, self.stream)

    def fetch(self, array: FakeArray) -> Array:
        return np.asarray(array)
