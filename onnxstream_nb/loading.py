"""Choosing a weights provider: by name, or by what memory there is."""

from __future__ import annotations

from . import device
from .errors import MemoryBudgetError, UsageError
from .graph import WeightRef
from .plan import Plan
from .weights import (
    BudgetProvider,
    MmapProvider,
    PrefetchProvider,
    RamProvider,
    WeightsProvider,
)

MARGIN = 0.1  # of the free memory, left to the rest of the machine
WORK = 64_000_000  # activations and scratch of a language model's step, roughly
KINDS = ("auto", "stream", "mmap", "ram")


def choose_provider(plan: Plan, load: str, ram: int | None, reserve: int) -> WeightsProvider:
    """The provider for `--load` and `--ram`; `reserve` bytes are set aside for a cache.

    Raises UsageError for a combination that means nothing, MemoryBudgetError when the budget
    cannot be kept, naming the least that would do.
    """
    if load not in KINDS:
        raise UsageError(f"load must be one of {', '.join(KINDS)}, not {load!r}")
    if ram is not None:
        if load == "mmap":
            raise UsageError(
                "--ram: a budget cannot be kept with --load mmap; leave one of them out"
            )
        return _budget(plan, ram, reserve)
    if load == "auto":
        free = int(device.memory_available() * (1 - MARGIN))
        if plan.weight_bytes + reserve + WORK <= free:
            return MmapProvider()
        return _budget(plan, device.current_rss() + free, reserve)
    if load == "stream":
        return PrefetchProvider()
    return MmapProvider() if load == "mmap" else RamProvider()


def _budget(plan: Plan, ram: int, reserve: int) -> WeightsProvider:
    """Keep as many of the weights as fit beside the stream's two largest buffers."""
    refs = list({ref.key: ref for ref in plan.weights}.values())
    used = device.current_rss() + reserve + WORK
    room = ram - used
    if plan.weight_bytes <= room:
        return RamProvider()
    window = min(2 * max((ref.nbytes for ref in refs), default=0), plan.weight_bytes)
    if window > room:
        least = device.format_size(1.01 * (used + window))  # rounding must not take it below
        raise MemoryBudgetError(
            f"--ram {device.format_size(ram)} is too little for this model: "
            f"at least {least} is needed ({device.format_size(used)} without weights)"
        )
    pinned: list[WeightRef] = []
    for ref in sorted(refs, key=lambda r: r.nbytes):
        if ref.nbytes <= room - window:
            pinned.append(ref)
            room -= ref.nbytes
    return BudgetProvider(pinned, ahead=window // 2)
