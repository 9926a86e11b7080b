"""Weights of which some lie in a GPU's memory: which, and how they get there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..graph import WeightRef
from ..registry import internal
from ..weights import DiskProvider, WeightsProvider
from .device import ALIGNMENT, Array, Device, DeviceError, DeviceMemoryError, Stream
from .lanes import Lanes

RESERVE = 256 << 20  # bytes of the GPU's free memory that are left to its driver and to others
LARGE = 2 << 20  # bytes of which a driver gives whole multiples, to who asks for that much
WORK = 1 << 28  # bytes for what goes to products and comes back from them


def chosen(refs: Iterable[WeightRef], budget: int) -> list[WeightRef]:
    """The matrices to place within so many bytes: the largest first, for a product with a small one
    is hardly worth the way; one that does not fit leaves its place to smaller ones."""
    sizes = {ref.matrix: (internal("DeviceMatrixBytes")(ref), ref) for ref in refs}
    placed, left = [], budget
    for size, ref in sorted(sizes.values(), key=lambda each: -each[0]):
        taken = size + 2 * (ALIGNMENT if size < LARGE else LARGE)  # rows, and scales
        if taken <= left:
            placed.append(ref)
            left -= taken
    return placed


class CudaProvider:
    """Gives matrices on the device as what products there take; all others come from `host`.

    `refs` are placed when this is made, each read from its file once. Those that the device turns
    out to have no memory for are the host's, which then reads them as they are stored; all are when
    the device fails. `tell` is given a line then, and one when it fails later.
    """

    def __init__(
        self,
        host: WeightsProvider,
        device: Device,
        refs: Sequence[WeightRef],
        tell: Callable[[str], None],
        progress: Callable[[str, float | None], None] | None = None,
    ) -> None:
        self.host, self.device = host, device
        self.lanes = Lanes(device, WORK, tell)
        self._tell = tell
        self._disk = DiskProvider()
        self._placed: dict[tuple[object, ...], Any] = {}
        self._stream: Stream = None
        self._open = True
        self.nbytes = 0
        try:
            self._place_all(refs, progress)
        except DeviceError as error:
            self.lanes.failed(error)
            self._placed.clear()
            self._close_device()
        except BaseException:
            self._close_device()
            raise

    def _place_all(
        self, refs: Sequence[WeightRef], progress: Callable[[str, float | None], None] | None
    ) -> None:
        whole, done = sum(ref.nbytes for ref in refs) or 1, 0
        refused: list[DeviceMemoryError] = []
        for ref in refs:
            try:
                self._place(ref)
            except DeviceMemoryError as error:  # a smaller one may find room
                refused.append(error)
            done += ref.nbytes
            if progress is not None:
                progress(f"copying weights to {self.device.name}", done / whole)
        if refused:
            many = f"{len(refused)} of {len(refs)} matrices"
            self._tell(f"{refused[0]}; {many} that were to lie there stay with the CPU")

    def _place(self, ref: WeightRef) -> None:
        taken: dict[int, int] = {}  # address -> bytes

        def allocate(array: Array) -> int:
            if self._stream is None:
                self._stream = self.device.stream()
            address = self.device.allocate(array.nbytes)
            taken[address] = array.nbytes
            self.device.upload(address, array, self._stream)
            self.device.synchronize(self._stream)  # the array is not kept
            return address

        try:
            self._placed[ref.matrix] = internal("DeviceMatrix")(
                ref, self._disk.get(ref), self.lanes, lambda: self._disk.get(ref), allocate
            )
        except DeviceMemoryError:
            for address in taken:
                self.device.release(address)
            raise
        self.nbytes += sum(taken.values())

    def get(self, ref: WeightRef) -> Any:
        placed = self._placed.get(ref.matrix)
        return self.host.get(ref) if placed is None else placed

    @property
    def bytes_in_use(self) -> int:
        """Bytes of matrices that products take from the device; 0 once it has failed."""
        return 0 if self.lanes.broken else self.nbytes

    def stop_on(self, stop: threading.Event | None) -> None:
        """What of the host's waits for the disk may be given up when this is set."""
        getattr(self.host, "stop_on", lambda stop: None)(stop)

    def prefetch(self, refs: Sequence[WeightRef]) -> None:
        """Only what is not on the device has to be read."""
        self.host.prefetch([ref for ref in refs if ref.matrix not in self._placed])

    def release(self, ref: WeightRef) -> None:
        if ref.matrix not in self._placed:
            self.host.release(ref)

    def close(self) -> None:
        """Let go of everything. What the device says to that takes nobody's results away."""
        self._placed.clear()
        self._close_device()
        self._disk.close()
        getattr(self.host, "close", lambda: None)()

    def _close_device(self) -> None:
        if not self._open:
            return
        self._open = False
        try:
            self.device.close()
        except DeviceError as error:
            if not self.lanes.broken:  # or it has told why
                self._tell(f"{error}, when it was closed")
