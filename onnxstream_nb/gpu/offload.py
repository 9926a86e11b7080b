"""`--cuda`: a GPU with a budget, if there is one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..device import format_size, parse_size
from ..errors import UnsupportedError, UsageError
from ..graph import WeightRef
from ..plan import Plan, factors
from ..weights import WeightsProvider
from .device import Device, DeviceError, DeviceMemoryError
from .provider import RESERVE, WORK, CudaProvider, chosen
from .whole import Placement, WholeProvider, placement_of

log = logging.getLogger("onnxstream_nb")


@dataclass
class Gpu:
    """A device, and the bytes of its memory that weights may take; `whole`: the model is to lie
    there with all that is computed, if it fits."""

    device: Device
    budget: int
    whole: bool = False
    placement: Placement | None = None

    def plan(self, make: Callable[[str], Plan], cache: int) -> tuple[Plan, Sequence[WeightRef]]:
        """The plan that `make` gives for what it can do, and the weights that are placed on it,
        beside so many bytes of `cache`."""
        if self.whole:
            plan = make("cuda")
            placement = placement_of(plan)
            if placement.nbytes + cache <= self.budget:
                self.placement = placement
                return plan, placement.refs
            log.warning(
                "--cuda all: the weights take %s and a full context %s, but %s has %s for them; "
                "the matrices that fit are put there, and the CPU does the rest (a smaller "
                "--context takes less)",
                *(format_size(placement.nbytes), format_size(cache)),
                *(self.device.name, format_size(self.budget)),
            )
        plan = make("offload")
        return plan, self.choose(factors(plan))

    def choose(self, refs: Sequence[WeightRef]) -> list[WeightRef]:
        """The matrices that are placed on it, in the order of their use."""
        placed = {ref.matrix for ref in chosen(refs, self.budget)}
        return [ref for ref in refs if ref.matrix in placed]

    def provider(
        self,
        host: WeightsProvider,
        refs: Sequence[WeightRef],
        progress: Callable[[str, float | None], None] | None,
    ) -> CudaProvider | WholeProvider:
        """The provider that has them there."""
        if self.placement is not None:
            return WholeProvider(host, self.device, self.placement, WORK, log.warning, progress)
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
    return Gpu(found, most if wanted is None else min(wanted, most), whole=cuda == "all")


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
