"""Products on a GPU that overlap: each has a stream, and its own room for what goes and comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..registry import internal
from .device import Array, Device, DeviceError, DeviceMemoryError, Stream

LANES = 4  # q, k and v at once, or gate and up
FLOAT = 4


class Pending:
    """An array (float32) that a GPU is computing; whoever makes an array of it waits."""

    dtype = np.dtype(np.float32)

    def __init__(self, lane: _Lane, rows: Array, matrix: Any, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim = shape, len(shape)
        self._lane: _Lane | None = lane
        self._rows, self._matrix = rows, matrix
        self._result: Array | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        result = self.wait()
        return result if dtype is None else result.astype(dtype, copy=False)

    def wait(self) -> Array:
        """The result. What the GPU could not do, the CPU does now."""
        if self._result is None:
            lane = self._lane
            assert lane is not None
            self._result = lane.collect(self).reshape(self.shape)
            self._lane = self._rows = self._matrix = None  # type: ignore[assignment]
        return self._result

    def on_host(self) -> Array:
        """The product by the CPU."""
        found: Array = self._matrix.on_host(self._rows)
        return found


class Lanes:
    """Runs products with matrices on a device, one stream after the other.

    `tell` is given one line when the device fails, and the CPU goes on in its place. `nbytes` is
    what the lanes have taken of the device's memory, at most `most`.
    """

    def __init__(
        self, device: Device, most: int, tell: Callable[[str], None], count: int = LANES
    ) -> None:
        self.device, self.most, self.tell = device, most, tell
        self.broken = False
        self._told_memory = False
        self._lanes = [_Lane(self) for _ in range(count)]
        self._next = 0

    @property
    def nbytes(self) -> int:
        return sum(lane.nbytes for lane in self._lanes)

    def run(self, matrix: Any, rows: Array, shape: tuple[int, ...]) -> Any:
        """rows (M, K) float32 times a DeviceMatrix: something that becomes an array of `shape`."""
        lane = self._lanes[self._next]
        self._next = (self._next + 1) % len(self._lanes)
        pending = Pending(lane, rows, matrix, shape)
        lane.begin(pending, rows, matrix)
        return pending

    def failed(self, error: DeviceError) -> None:
        """Say once what happened; after anything but a lack of memory the device is not used."""
        if isinstance(error, DeviceMemoryError):
            if not self._told_memory:
                self.tell(f"{error}; the CPU computes what does not fit")
            self._told_memory = True
        elif not self.broken:
            self.broken = True
            self.tell(f"{error}; the CPU goes on alone")


class _Lane:
    """A stream, its buffers, and the product that is under way."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes, self._device = lanes, lanes.device
        self._stream: Stream = None  # begun by the first product
        self._rooms: dict[str, tuple[int, int]] = {}  # what for -> address, bytes
        self._pinned: dict[str, Array] = {}
        self._waited: Pending | None = None
        self._begun = False

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._rooms.values())

    def begin(self, pending: Pending, rows: Array, matrix: Any) -> None:
        """Give the stream a product; what was under way is collected first."""
        if self._waited is not None:
            self._waited.wait()
        self._waited, self._begun = pending, False
        if self._lanes.broken or not rows.size or not matrix.shape[1]:
            return
        try:
            if self._stream is None:
                self._stream = self._device.stream()
            self._enqueue(rows, matrix)
            self._begun = True
        except DeviceError as error:
            self._lanes.failed(error)
            self._settle()

    def _settle(self) -> None:
        """Wait for what was begun before something was refused: its room may be given back."""
        try:
            if self._stream is not None:
                self._device.synchronize(self._stream)
        except DeviceError as error:
            self._lanes.failed(error)

    def _enqueue(self, rows: Array, matrix: Any) -> None:
        (m, k), n, device = rows.shape, matrix.shape[1], self._device
        wide = internal("DevicePadding")(k)
        scratch = matrix.scratch(m)
        self._grow({"x": FLOAT * m * wide, "half": 2 * m * wide, "y": FLOAT * m * n})
        self._grow({"scratch": scratch})
        x = self._host("x", FLOAT * m * wide).view(np.float32).reshape(m, wide)
        y = self._host("y", FLOAT * m * n)
        x[:, :k], x[:, k:] = rows, 0
        where = {what: address for what, (address, _) in self._rooms.items()}
        device.upload(where["x"], x, self._stream)
        for kernel, grid, block, arguments in matrix.launches(
            where["x"], where["y"], where["half"], m, device.capability, where.get("scratch", 0)
        ):
            device.launch(kernel, grid, block, arguments, self._stream)
        device.download(y, where["y"], self._stream)

    def _grow(self, wanted: dict[str, int]) -> None:
        """Room on the device for each; a larger one takes the place of what was there."""
        for what, size in wanted.items():
            address, had = self._rooms.get(what, (0, 0))
            if size <= had:
                continue
            if self._lanes.nbytes - had + size > self._lanes.most:
                raise DeviceMemoryError(
                    f"{self._device.name}: products of so many rows take more than the memory "
                    "that is set aside for them"
                )
            if had:
                del self._rooms[what]
                self._device.release(address)
            self._rooms[what] = self._device.allocate(size), size

    def _host(self, what: str, size: int) -> Array:
        """So many bytes of host memory to copy from or to."""
        if what not in self._pinned or self._pinned[what].nbytes < size:
            self._pinned[what] = self._device.pinned(size)
        return self._pinned[what][:size]

    def collect(self, pending: Pending) -> Array:
        """The result of the product under way, waited for."""
        assert self._waited is pending
        self._waited = None
        if self._begun:
            try:
                self._device.synchronize(self._stream)
                size = FLOAT * int(np.prod(pending.shape))
                return self._host("y", size).view(np.float32).copy()
            except DeviceError as error:
                self._lanes.failed(error)
        return pending.on_host()
