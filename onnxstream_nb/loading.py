"""Choosing a weights provider: by name, or by what memory there is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from . import device
from .errors import MemoryBudgetError, UsageError
from .graph import Graph, WeightRef
from .plan import Plan
from .weights import (
    BudgetProvider,
    MmapProvider,
    PrefetchProvider,
    RamProvider,
    WeightsProvider,
)

MARGIN = 0.1  # of the free memory, left to the rest of the machine
BASE = 24_000_000  # what a run takes beside arrays: loaded kernels, scratch of threads, the heap's
ARRAYS = 5  # a pass's widest moment, in inputs and outputs of its largest product (gate * up: 4)
CHUNK = 512  # prompt tokens a pass: large enough for the matrix kernels, small in activations
LEAST_CHUNK = 32
OPERATIONS = 16e9  # of one product: some 100 ms, so that a stop between two is soon noticed
KINDS = ("auto", "stream", "mmap", "ram")


def prompt_chunk(graph: Graph) -> int:
    """How many tokens of a prompt one pass reads: a stop is looked at between operators, so a
    power of two with which the largest product stays within OPERATIONS, where that is possible."""
    largest = max((2 * math.prod(ref.shape) for ref in _prompt_matrices(graph)), default=0)
    chunk = CHUNK
    while chunk > LEAST_CHUNK and chunk * largest > OPERATIONS:
        chunk //= 2
    return chunk


def prompt_precision(graph: Graph) -> str:
    """What `auto` means: "fast" when a prompt meets plain floats, which bfloat16 rounds; "exact"
    for block encodings, whose products are in integers at either precision."""
    plain = ("raw", "float32", "float16", "bfloat16")
    return "fast" if all(r.encoding in plain for r in _prompt_matrices(graph)) else "exact"


def work_bytes(plan: Plan) -> int:
    """Bytes that a run takes beside weights and cache, roughly: a chunk's activations, and the
    largest weights that an operator gets decoded."""
    widest = max((sum(ref.shape) for ref in _prompt_matrices(plan.graph)), default=0)
    refs, packable = plan.graph.initializers, {ref.matrix for ref in plan.packable}
    decoded = max(
        (
            sum(
                _made_of(refs[name], native, refs[name].matrix in packable)
                for name, native in step.inputs
                if name in refs and name not in plan.constants
            )
            for step in plan.steps
        ),
        default=0,
    )
    return BASE + ARRAYS * 4 * prompt_chunk(plan.graph) * widest + decoded


def _made_of(ref: WeightRef, native: bool, packable: bool) -> int:
    """Bytes that an operator's turn makes of a stored weight: its floats, or panels."""
    if ref.parts and native:
        return 2 * ref.nbytes if packable else 9 * math.prod(ref.shape)
    if native or ref.encoding in ("raw", ref.dtype):
        return 0
    return 4 * math.prod(ref.shape)


def _prompt_matrices(graph: Graph) -> Iterator[WeightRef]:
    """The weights (K, N) that are multiplied with every token of a prompt; not a head's, which
    gets the one position that was picked for it."""
    producers = graph.producers()
    for node in graph.nodes:
        ref = graph.initializers.get(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
        if ref is None or len(ref.shape) != 2:
            continue
        before = producers.get(node.inputs[0])
        if before is not None and before.op_type == "Gather":
            index = graph.initializers.get(before.inputs[1])
            if index is not None and math.prod(index.shape) == 1:
                continue
        yield ref


def choose_reserve(
    plan: Plan, load: str, ram: int | None, reserve: int | Sequence[int]
) -> tuple[WeightsProvider, int]:
    """The provider, and which of several reserves it leaves: the first, which is the most, where
    the budget can be kept with it; else of the others the most that lets all weights be kept, or
    the last. Raises as `choose_provider` does for that."""
    first, *others = (reserve,) if isinstance(reserve, int) else reserve
    try:
        return choose_provider(plan, load, ram, first), first
    except MemoryBudgetError:
        if not others or ram is None:
            raise
    provider = choose_provider(plan, load, ram, others[-1])
    kept = device.current_rss() + work_bytes(plan) + plan.weight_bytes
    return provider, next((n for n in others if kept + n <= ram), others[-1])


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
        if plan.weight_bytes + reserve + work_bytes(plan) <= free:
            return MmapProvider()
        return _budget(plan, device.current_rss() + free, reserve)
    if load == "stream":
        return PrefetchProvider()
    return MmapProvider() if load == "mmap" else RamProvider()


def _budget(plan: Plan, ram: int, reserve: int) -> WeightsProvider:
    """Keep as many of the weights as fit beside the stream's two largest buffers."""
    used = device.current_rss() + reserve + work_bytes(plan)
    room = ram - used
    if plan.weight_bytes <= room:
        return RamProvider()
    refs = _by_preference(plan)
    pinned: list[WeightRef] = []
    for ref in refs:
        if _held([*pinned, ref], refs) <= room:
            pinned.append(ref)
    if _held(pinned, refs) > room:
        largest = sorted(refs, key=lambda ref: ref.nbytes)[-1:]
        raise _too_little(ram, used, min(_held([], refs), _held(largest, refs)), reserve)
    return BudgetProvider(pinned, ahead=_window(pinned, refs) // 2)


def _by_preference(plan: Plan) -> list[WeightRef]:
    """The distinct weights, those first whose streaming costs most for a byte kept: a table for
    the sake of some rows, then what a pass reads more than once; the small ones first of equals."""
    uses = Counter(ref.key for ref in plan.weights)
    tables = {ref.matrix for ref in plan.tables}
    multiplied = {ref.key for ref in plan.weights if ref.matrix not in tables}
    refs = {ref.key: ref for ref in plan.weights}.values()
    return sorted(refs, key=lambda ref: (ref.key in multiplied, -uses[ref.key], ref.nbytes))


def _window(pinned: Sequence[WeightRef], refs: Sequence[WeightRef]) -> int:
    """Bytes of the stream beside the pinned weights: one in use and one being read."""
    keys = {ref.key for ref in pinned}
    sizes = [ref.nbytes for ref in refs if ref.key not in keys]
    return min(2 * max(sizes, default=0), sum(sizes))


def _held(pinned: Sequence[WeightRef], refs: Sequence[WeightRef]) -> int:
    return sum(ref.nbytes for ref in pinned) + _window(pinned, refs)


def _too_little(ram: int, used: int, held: int, reserve: int) -> MemoryBudgetError:
    size = device.format_size
    least = size(1.01 * (used + held))  # rounding must not take it below
    parts = f"{size(used)} without weights"
    if reserve and used + held - reserve <= ram:
        parts += f", {size(reserve)} of it for a full context: a smaller --context takes less"
    return MemoryBudgetError(
        f"--ram {size(ram)} is too little for this model: at least {least} is needed ({parts})"
    )
