"""`--cuda`: a GPU with a budget, if there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..device import format_size, parse_size
from ..errors import UnsupportedError, UsageError
from ..graph import WeightRef
from ..weights import WeightsProvider
from .device import Device, DeviceError, DeviceMemoryError
from .provider import RESERVE, WORK, CudaProvider, chosen

log = logging.getLogger("onnxstream_nb")


@dataclass(frozen=True)
class Gpu:
    """A device, and the bytes of its memory that matrices may take."""

    device: Device
    budget: int

    def choose(self, refs: Sequence[WeightRef]) -> list[WeightRef]:
        """The matrices that are placed on it, in the order of their use."""
        placed = {ref.matrix for ref in chosen(refs, self.budget)}
        return [ref for ref in refs if ref.matrix in placed]

    def provider(
        self,
        host: WeightsProvider,
        refs: Sequence[WeightRef],
        progress: Callable[[str, float | None], None] | None,
    ) -> CudaProvider:
        """The provider that has them there."""
        made = CudaProvider(host, self.device, refs, log.warning, progress)
        size = format_size(made.nbytes)
        log.info("%d matrices, %s, are on %s", len(refs), size, self.device.name)
        return made


def open_gpu(cuda: int | str, device: Callable[[], Device] | None = None) -> Gpu | None:
    """The first GPU with its budget; None, and a line in the log, when there is none.

    `cuda` is bytes, a text such as "4GB", or "auto" or "all": what is free, less a reserve for
    others and for the work; with 0 no GPU is looked for. Raises UsageError for anything else.
    """
    wanted = _budget(cuda)
    if wanted == 0:
        return None
    found: Device | None = None
    try:
        found = _first() if device is None else device()
        most = found.free() - RESERVE - WORK
        if most <= 0:
            raise DeviceMemoryError(f"{found.name}: too little memory is free")
    except (UnsupportedError, DeviceError) as error:  # a driver without a GPU refuses to begin
        log.warning("--cuda: %s; the CPU is used", error)
        if found is not None:
            with suppress(DeviceError):  # which would tell the same once more
                found.close()
        return None
    return Gpu(found, most if wanted is None else min(wanted, most))


def _budget(cuda: int | str) -> int | None:
    if cuda in ("auto", "all"):
        return None
    budget = parse_size(cuda, "--cuda") if isinstance(cuda, str) else cuda
    if budget < 0:
        raise UsageError(f"--cuda {cuda}: it is a size of memory, auto or all")
    return budget


def _first() -> Device:
    from .driver import CudaDevice

    return CudaDevice()
