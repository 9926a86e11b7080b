"""What the engine asks of a GPU. `driver.py` has the real one; tests have one that is slow to act.

Everything that takes a stream is done later, in the order of that stream: arrays that are copied
from or to stay untouched until `synchronize`. Addresses are integers, as kernels take them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import DeviceError, DeviceMemoryError

__all__ = [
    "ALIGNMENT",
    "Array",
    "Device",
    "DeviceError",
    "DeviceMemoryError",
    "Graph",
    "Grid",
    "Stream",
]

Array = np.ndarray[Any, Any]
Grid = Sequence[int]
Stream = Any
Graph = Any

ALIGNMENT = 256  # of what is allocated


class Device(Protocol):
    """One GPU. `capability` is its compute capability, `memory` what it has in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    def free(self) -> int:
        """Bytes of memory that nobody uses."""

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes. Raises DeviceMemoryError."""

    def release(self, address: int) -> None:
        """What was allocated there is no longer needed, once all streams are done with it."""

    def pinned(self, nbytes: int) -> Array:
        """(nbytes,) uint8 of host memory that copies are fast from and to."""

    def stream(self) -> Stream:
        """A queue of its own."""

    def upload(self, address: int, array: Array, stream: Stream) -> None:
        """Copy a contiguous array to the GPU."""

    def download(self, array: Array, address: int, stream: Stream) -> None:
        """Fill a contiguous array from the GPU."""

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        """Make bytes zero."""

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy bytes from one place of the GPU's memory to another."""

    def launch(
        self, kernel: Any, grid: Grid, block: Grid, arguments: Sequence[int | float], stream: Stream
    ) -> None:
        """Run a CudaKernel over `grid` blocks of `block` threads, each one to three sizes."""

    def synchronize(self, stream: Stream) -> None:
        """Wait until all that the stream was given is done. Raises DeviceError if it failed."""

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """What `work` gives the stream, which is not done now, to be replayed."""

    def replay(self, graph: Graph, stream: Stream) -> None:
        """Do again what was captured."""

    def forget(self, graph: Graph) -> None:
        """What was captured is no longer needed."""

    def close(self) -> None:
        """Give everything back."""
