"""Choosing where weights are: by name, or by what memory there is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from . import device
from .errors import MemoryBudgetError, UsageError
from .graph import Graph, WeightRef
from .kvcache import CHUNK
from .liveness import bound_for_tokens
from .packing import PackedProvider, Packer, panels_bytes
from .plan import Form, Plan
from .streaming import LEAST_PIECES, MOST_PIECES, PIECE, StreamProvider, by_rows, cut
from .weights import MmapProvider, RamProvider, WeightsProvider

MARGIN = 0.1  # of the free memory, left to the rest of the machine
BASE = 24_000_000  # what a run takes beside arrays: loaded kernels, scratch of threads, the heap's
GAPS = 1.15  # what the arena of activations was seen to take of the bound on them, and more
ARRAYS = 5  # a pass's widest moment, in inputs and outputs of its largest product (gate * up: 4)
LEAST_CHUNK = 32
SMALLEST_CHUNK = 8  # of a pass that streams: more passes, when memory is that short
SMALL = PIECE // 4  # bytes of a weight that is not worth reads of its own
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


def logit_chunk(graph: Graph) -> int:
    """How many positions' logits one pass gives: their product with the head takes no longer than
    the largest of a prompt may, and they no more memory than a prompt's pass at its widest."""
    most = ARRAYS * prompt_chunk(graph) * _widest(graph)
    chunk = prompt_chunk(graph)
    for head in _heads(graph):
        while chunk > LEAST_CHUNK and (
            2 * chunk * math.prod(head.shape) > OPERATIONS or 2 * chunk * sum(head.shape) > most
        ):
            chunk //= 2
    return chunk


def prompt_precision(graph: Graph) -> str:
    """What `auto` means: "fast" when a prompt meets plain floats, which bfloat16 rounds; "exact"
    for block encodings, whose fast products round activations to 8 bits instead of 15."""
    plain = ("raw", "float32", "float16", "bfloat16")
    return "fast" if all(r.encoding in plain for r in _prompt_matrices(graph)) else "exact"


def work_bytes(plan: Plan, chunk: int, streams: bool = False) -> int:
    """Bytes that a run takes beside weights and cache, roughly: a chunk's activations, and the
    largest weights that an operator gets decoded, or gathered from the pieces of a stream."""
    refs, packable = plan.graph.initializers, {ref.matrix for ref in plan.packable}
    tables = {ref.matrix for ref in plan.tables}
    made = max(
        (
            sum(
                _made_of(refs[name], form, refs[name].matrix in packable, streams)
                for name, form in step.inputs
                if name in refs and name not in plan.constants and refs[name].matrix not in tables
            )
            for step in plan.steps
        ),
        default=0,
    )
    return BASE + _activations(plan, chunk) + made


def _widest(graph: Graph) -> int:
    """Elements of input and output of the largest product, for each token of a prompt."""
    return max((sum(ref.shape) for ref in _prompt_matrices(graph)), default=0)


def _activations(plan: Plan, chunk: int) -> int:
    """Bytes of a pass's arrays, and what the arena that they are in loses in gaps."""
    known = bound_for_tokens(plan, chunk)
    if known is not None:
        return int(GAPS * known)
    return ARRAYS * 4 * chunk * _widest(plan.graph)


def _made_of(ref: WeightRef, form: Form, packable: bool, streams: bool) -> int:
    """Bytes that an operator's turn makes of a stored weight: all of it, its floats, or panels."""
    gathered = ref.nbytes if streams and (form is not Form.TILES or not by_rows(ref)) else 0
    if ref.parts and form:
        if not packable:
            return gathered + 9 * math.prod(ref.shape)
        packed = min(2 * PIECE, 2 * ref.nbytes) if streams and not gathered else 2 * ref.nbytes
        return gathered + packed
    if (form and len(ref.shape) == 2) or ref.encoding in ("raw", ref.dtype):
        return gathered
    return gathered + 4 * math.prod(ref.shape)


def _prompt_matrices(graph: Graph) -> Iterator[WeightRef]:
    """The weights (K, N) that are multiplied with every token of a prompt; not a head's."""
    return (ref for ref, is_head in _matrices(graph) if not is_head)


def _heads(graph: Graph) -> Iterator[WeightRef]:
    """The weights (K, N) that are multiplied with the positions that were picked for them."""
    return (ref for ref, is_head in _matrices(graph) if is_head)


def _matrices(graph: Graph) -> Iterator[tuple[WeightRef, bool]]:
    """The weights (K, N) of products, and whether that is with some positions only: those of one
    constant index, or of an input. (A table's rows are no positions.)"""
    producers, inputs = graph.producers(), {value.name for value in graph.inputs}
    for node in graph.nodes:
        ref = graph.initializers.get(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") else None
        if ref is None or len(ref.shape) != 2:
            continue
        before, picked = producers.get(node.inputs[0]), False
        if before is not None and before.op_type == "Gather":
            index = graph.initializers.get(before.inputs[1])
            one = index is not None and math.prod(index.shape) == 1
            from_table = before.inputs[0] in graph.initializers
            picked = one or (before.inputs[1] in inputs and not from_table)
        yield ref, picked


@dataclass(frozen=True, slots=True)
class Holding:
    """Where the weights of a plan are. `kind` "mmap" maps them, "ram" keeps them, "stream" keeps
    `held` stored rows of each matrix (by `WeightRef.matrix`) and reads the others in every pass,
    through `slots` buffers. What is kept is packed into panels where it can be; `chunk` is how many
    tokens of a prompt a pass takes.
    """

    kind: str
    chunk: int
    held: Mapping[tuple[object, ...], int] = field(default_factory=dict)
    slots: int = 0


def choose_reserve(
    choice: Callable[[int], Holding], reserves: Sequence[int]
) -> tuple[Holding, int]:
    """What `choose` says for one of several reserves, and which: the first, which is the most, if
    that can be and a prompt's passes do not become too short for it; else of the others the most
    that costs the weights nothing. Raises as `choose` does for the last."""
    first, *others = reserves
    try:
        holding = choice(first)
        if not others or holding.chunk >= LEAST_CHUNK:
            return holding, first
    except MemoryBudgetError:
        if not others:
            raise
    best = choice(others[-1])
    for reserve in others[:-1]:
        with suppress(MemoryBudgetError):
            if choice(reserve) == best:
                return best, reserve
    return best, others[-1]


def choose(
    plan: Plan,
    load: str,
    ram: int | None,
    panel_bytes: Callable[[WeightRef], int],
    reached: int,
    reserve: int,
) -> Holding:
    """What `--load` and `--ram` mean for a plan; `reserve` bytes are set aside for a cache, and
    `reached` is what the process took for a moment when it began.

    Raises UsageError for a combination that means nothing, MemoryBudgetError when the budget
    cannot be kept, naming the least that would do.
    """
    if load not in KINDS:
        raise UsageError(f"load must be one of {', '.join(KINDS)}, not {load!r}")
    if ram is not None and load == "mmap":
        raise UsageError("--ram: a budget cannot be kept with --load mmap; leave one of them out")
    chunk = prompt_chunk(plan.graph)
    if load == "mmap" or (load == "ram" and ram is None):
        return Holding(load, chunk)
    if load == "stream" and ram is None:
        return Holding("stream", CHUNK, slots=MOST_PIECES)
    if ram is None:
        free = int(device.memory_available() * (1 - MARGIN))
        if plan.weight_bytes + reserve + work_bytes(plan, chunk) <= free:
            return Holding("ram", chunk)
        ram = device.current_rss() + free
    packable = {ref.matrix for ref in plan.packable}
    sizes = {
        ref: panels_bytes(ref, panel_bytes(ref)) if ref.matrix in packable else ref.nbytes
        for ref in _streamable(plan)
    }
    used = device.current_rss() + reserve
    whole = {ref.matrix: _rows(ref) for ref in sizes}
    while chunk >= LEAST_CHUNK:
        if max(used + work_bytes(plan, chunk) + sum(sizes.values()), reached) <= ram:
            return Holding("stream", chunk, held=whole)
        chunk //= 2
    return _budget(plan, sizes, ram, used, reserve, reached)


def _streamable(plan: Plan) -> list[WeightRef]:
    """The distinct matrices in order of use, without those of which only rows are looked up."""
    tables = {ref.matrix for ref in plan.tables}
    return [r for m, r in {ref.matrix: ref for ref in plan.weights}.items() if m not in tables]


def _rows(ref: WeightRef) -> int:
    return ref.stored_shape[0] if by_rows(ref) else 1


def _budget(
    plan: Plan, sizes: Mapping[WeightRef, int], ram: int, used: int, reserve: int, reached: int
) -> Holding:
    """A ring of buffers, then the longest passes over a prompt, then as many weights as fit."""
    slot = max((piece.room for ref in sizes for piece in cut(ref)), default=0)
    least = used + LEAST_PIECES * slot
    chunk = CHUNK
    while chunk > SMALLEST_CHUNK and least + work_bytes(plan, chunk, True) > ram:
        chunk //= 2
    left = ram - max(least + work_bytes(plan, chunk, True), reached)
    if left < 0:
        whole = max(used + work_bytes(plan, LEAST_CHUNK) + sum(sizes.values()), reached)
        used += work_bytes(plan, chunk, True)
        raise _too_little(ram, min(ram - left, whole), used, reserve)
    more = min(MOST_PIECES - LEAST_PIECES, left // 2 // slot) if slot else 0
    held = _shares(plan, sizes, left - more * slot)
    return Holding("stream", chunk, held=held, slots=LEAST_PIECES + more)


def _shares(plan: Plan, sizes: Mapping[WeightRef, int], left: int) -> dict[tuple[object, ...], int]:
    """How many rows of each matrix to hold in `left` bytes.

    First what a pass reads more than once, and what is small. Of the others an equal part each, so
    that the reads are spread evenly over a pass and the disk never waits for a buffer.
    """
    uses = Counter(ref.matrix for ref in plan.weights)
    held: dict[tuple[object, ...], int] = {}
    for ref in sorted(sizes, key=lambda ref: (-uses[ref.matrix], sizes[ref] > SMALL, sizes[ref])):
        if (uses[ref.matrix] > 1 or sizes[ref] <= SMALL) and sizes[ref] <= left:
            held[ref.matrix] = _rows(ref)
            left -= sizes[ref]
    shared = [ref for ref in sizes if ref.matrix not in held]  # in the order of their use
    part = left / max(1, sum(sizes[ref] for ref in shared))
    wanted = 0.0  # bytes that were due and not given
    for ref in shared:
        wanted += part * sizes[ref]
        more = _beside_rows(ref)
        rows = int(_rows(ref) * min(1.0, max(0.0, wanted - more) / sizes[ref]))
        step = max(32, ref.unit[0]) if by_rows(ref) else 1  # kernels take 32 rows at a time
        rows = rows if rows == _rows(ref) else rows // step * step
        if rows:
            held[ref.matrix] = rows
            wanted -= sizes[ref] * rows / _rows(ref) + more
    return held


def _beside_rows(ref: WeightRef) -> int:
    """Bytes of the panels of some rows of K alone that do not become fewer with the rows: of each
    a head, and what its end is filled up with."""
    return 128 * -(-ref.shape[1] // 16) if ref.parts and not ref.transposed and by_rows(ref) else 0


def make_provider(
    plan: Plan,
    holding: Holding,
    packer: Packer,
    progress: Callable[[str, float | None], None] | None = None,
) -> WeightsProvider:
    """The provider that does what was chosen; what is kept is read now."""
    if holding.kind == "mmap":
        return MmapProvider()
    rows = {ref.matrix: _rows(ref) for ref in _streamable(plan)}
    held = rows if holding.kind != "stream" else holding.held
    kept = {
        ref.matrix: ref if held[ref.matrix] == rows[ref.matrix] else ref.rows(0, held[ref.matrix])
        for ref in _streamable(plan)
        if held.get(ref.matrix)
    }
    packable = {ref.matrix for ref in plan.packable}
    plain = [ref for matrix, ref in kept.items() if matrix not in packable]
    provider: WeightsProvider = RamProvider(plain, progress, tables=plan.tables)
    to_pack = [ref for matrix, ref in kept.items() if matrix in packable]
    if to_pack:
        provider = PackedProvider(provider, to_pack, packer, progress)
    if holding.kind != "stream":
        return provider
    return StreamProvider(
        plan.weights, memory=provider, held=holding.held, tables=plan.tables, slots=holding.slots
    )


def _too_little(ram: int, least: int, used: int, reserve: int) -> MemoryBudgetError:
    size = device.format_size
    parts = f"{size(used)} without weights"
    if reserve and least - reserve <= ram:
        parts += f", {size(reserve)} of it for a full context: a smaller --context takes less"
    return MemoryBudgetError(
        f"--ram {size(ram)} is too little for this model: at least {size(1.01 * least)} is needed "
        f"({parts})"
    )
