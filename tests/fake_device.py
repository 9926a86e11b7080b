"""A GPU in this process: it does nothing until it is waited for, and may fail at any time.

Kernels run in the simulator. What is downloaded is NaN, and what is allocated is poison, until the
stream that fills it is waited for; arrays that are uploaded are read only then, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda_arrays import Array

from onnxstream_nb.gpu.device import ALIGNMENT, DeviceError, DeviceMemoryError
from onnxstream_nb.kernels.cuda_simulator import simulate

Queue = list[Callable[[], None]]


class FakeDevice:
    """See gpu/device.py. `fail_after` so many calls every one of them raises DeviceError; for the
    allocations whose numbers are `refused` (pinned memory counts, too) there is no memory."""

    name = "a GPU of the tests"

    def __init__(
        self, memory: int = 1 << 28, capability: tuple[int, int] = (8, 0),
        fail_after: int | None = None, order: str = "forwards",
    ) -> None:  # fmt: skip
        self.memory, self.capability, self.order = memory, capability, order
        self.held: dict[int, Array] = {}
        self.calls, self.fail_after = 0, fail_after
        self.allocations, self.refused = 0, set[int]()
        self.launched: list[str] = []
        self.closed = False
        self._capturing: tuple[int, Queue] | None = None
        self._queues: dict[int, Queue] = {}
        self.graphs: list[Queue] = []  # that were captured, and not forgotten

    def _enter(self) -> None:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise DeviceError(f"{self.name}: it fell off the bus")

    def _later(self, stream: int, what: Callable[[], None]) -> None:
        self._enter()
        if self._capturing is not None and self._capturing[0] == stream:
            self._capturing[1].append(what)
        else:
            self._queues[stream].append(what)

    def free(self) -> int:
        return self.memory - sum(array.nbytes - ALIGNMENT for array in self.held.values())

    def _take(self, has_room: bool) -> None:
        self._enter()
        self.allocations += 1
        if not has_room or self.allocations - 1 in self.refused:
            raise DeviceMemoryError(f"{self.name}: out of memory")

    def allocate(self, nbytes: int) -> int:
        self._take(nbytes <= self.free())
        room = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)
        address = room.ctypes.data + -room.ctypes.data % ALIGNMENT
        self.held[address] = room
        return int(address)

    def release(self, address: int) -> None:
        self._enter()
        del self.held[address]

    def pinned(self, nbytes: int) -> Array:
        self._take(True)
        return np.full(nbytes, 0xFF, np.uint8)

    def stream(self) -> int:
        self._enter()
        self._queues[len(self._queues)] = []
        return len(self._queues) - 1

    def bytes_at(self, address: int, nbytes: int) -> Array:
        """So many bytes of what is allocated."""
        for start, room in self.held.items():
            first = address - start
            if first >= 0 and first + nbytes <= room.nbytes - ALIGNMENT:
                skipped = start - room.ctypes.data
                return room[skipped + first : skipped + first + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address} are not allocated")

    def upload(self, address: int, array: Array, stream: int) -> None:
        assert array.flags.c_contiguous
        place = self.bytes_at(address, array.nbytes)
        self._later(stream, lambda: np.copyto(place, array.reshape(-1).view(np.uint8)))

    def download(self, array: Array, address: int, stream: int) -> None:
        assert array.flags.c_contiguous
        source = self.bytes_at(address, array.nbytes)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        self._later(stream, lambda: np.copyto(array.reshape(-1).view(np.uint8), source))

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        place = self.bytes_at(address, nbytes)
        self._later(stream, lambda: place.fill(0))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        place, data = self.bytes_at(to, nbytes), self.bytes_at(source, nbytes)
        self._later(stream, lambda: np.copyto(place, data))

    def launch(
        self, kernel: Any, grid: Any, block: Any, arguments: Sequence[int | float], stream: int
    ) -> None:
        assert kernel.since <= self.capability
        given = list(arguments)

        def run() -> None:
            self.launched.append(kernel.name)
            arrays = [self.bytes_at(a, r.nbytes - ALIGNMENT) for a, r in self.held.items()]
            simulate(kernel, tuple(grid), tuple(block), given, arrays, order=self.order)

        self._later(stream, run)

    def synchronize(self, stream: int) -> None:
        self._enter()
        queue = self._queues[stream]
        while queue:
            queue.pop(0)()

    def capture(self, stream: int, work: Callable[[], None]) -> Queue:
        self._enter()
        found: Queue = []
        self._capturing = (stream, found)
        try:
            work()
        finally:
            self._capturing = None
        self.graphs.append(found)
        return found

    def forget(self, graph: Queue) -> None:
        self._enter()
        self.graphs = [each for each in self.graphs if each is not graph]

    def replay(self, graph: Queue, stream: int) -> None:
        self._enter()
        self._queues[stream] += graph

    def close(self) -> None:
        self.closed = True
        self.held.clear()
        self.graphs.clear()
        self._enter()
