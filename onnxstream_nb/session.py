"""The executor: a graph is planned once and run many times.

Planning binds operators, constants and the last use of every value; running walks the plan and
frees what is dead. Which provider serves the weights, and what the operators are, it never asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import formats, passes, trace
from .device import parse_size, peak_rss, physical_cores
from .errors import DeviceError, Interrupted, ShapeError, UsageError
from .gpu.offload import Gpu, open_gpu
from .graph import Graph, Value, WeightRef
from .kvslot import Slot
from .loading import choose, choose_reserve, make_provider
from .lowering import Replay
from .packed_weights import with_packed_file
from .plan import Form, Plan, describe, make_plan, without
from .registry import internal as internal
from .streaming import StreamProvider
from .weights import Weight, WeightsProvider, numpy_dtype

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fast", "exact")
DEVICES = ("cpu", "cuda")
PRECISION = "exact"
BATCH_BYTES = 400_000_000  # of weights: of larger models, Python's part of a batch's pass is small
IDLE = 1 << 28  # bytes of activations' memory that are kept for the next run

Progress = Callable[[str, float | None], None]
Array = np.ndarray[Any, Any]


def decode_constant(ref: WeightRef) -> Array:
    """The logical tensor of a reference, read from its source: for constants, not for weights."""
    from .weights import DiskProvider

    provider = DiskProvider()
    try:
        result: Array = np.array(internal("Decode")(provider.get(ref)))
    finally:
        provider.close()
    return result


def load_graph(model: str | Path | bytes | onnx.ModelProto | Graph) -> Graph:
    """A graph from a path, the bytes of a serialized model, an onnx.ModelProto or a Graph."""
    if isinstance(model, Graph):
        return model
    if isinstance(model, (str, Path)):
        return formats.load(model)
    if isinstance(model, (bytes, bytearray, memoryview)):
        return formats.load_bytes(bytes(model))
    return formats.load_bytes(model.SerializeToString())


class Session:
    """A model ready to run.

    `model` is a path, the bytes of a serialized model, an `onnx.ModelProto`, or a `Graph`.
    `load` says how weights are held: "ram", "mmap", "stream", or "auto" (in memory when they and
    the work fit what is free, else a budget with a margin); `ram` is a budget, bytes or a text such
    as "2GB", of which `reserve` bytes are set aside for a cache, one of several where that depends
    on the budget: it becomes the attribute; `cache` is what one takes on a GPU. `threads` defaults
    to the physical cores; `precision` says how products of many rows are computed: "exact" as in
    float32 (block encodings with 15-bit activations; in AMX tiles to 2 ** -15, and an infinity may
    become NaN), "fast" in bfloat16 (block encodings with 8-bit activations) where the processor
    has it. With the `device` "cuda" matrices lie on a GPU, as many as fit the budget `cuda`: bytes,
    a text such as "4GB", or "auto" for what it has; with "all" the whole model and what it computes
    do, if they fit. Where there is no GPU, the CPU is used, and the log says so. `optimize=False`
    runs the graph as it stands. With `packed`, a folder, weights that have panels are kept there
    packed, for the next start and for streaming. `progress(text, fraction)` is told what takes
    long, above all the first compilation of kernels.

    Raises ModelError for a damaged or unsafe file, UnsupportedError naming what is not supported,
    MemoryBudgetError when the budget cannot be kept, UsageError for a bad argument.
    """

    def __init__(
        self,
        model: str | Path | bytes | onnx.ModelProto | Graph,
        *,
        load: str = "auto",
        ram: int | str | None = None,
        threads: int | None = None,
        precision: str = PRECISION,
        device: str = "cpu",
        cuda: int | str = "auto",
        optimize: bool = True,
        reserve: int | Sequence[int] = 0,
        cache: int = 0,
        packed: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        peak = peak_rss()
        graph = load_graph(model)
        self.graph = passes.optimize(graph, decode_constant) if optimize else graph
        self.threads, self.precision = _thread_count(threads), precision
        _check_choices(device, precision)
        packer = internal("Panels")()
        prepare = partial(internal("PrepareKernels"), workers=physical_cores(), progress=progress)
        internal("Threads")(self.threads)
        if packed is not None:
            self.graph = with_packed_file(self.graph, packer, Path(packed), prepare, progress)
        plan_for = partial(_planned, self.graph, packer.panel_bytes, precision)
        as_stored = load == "mmap" or (load == "stream" and ram is None)  # nothing is packed
        budget = parse_size(ram, "--ram") if isinstance(ram, str) else ram
        gpu = open_gpu(cuda) if device == "cuda" else None
        with _closed_on_failure(gpu):
            self.plan: Plan
            self.plan, placed = gpu.plan(plan_for, cache) if gpu else (plan_for("cpu"), ())
            self.graph, rest = self.plan.graph, without(self.plan, placed)
            prepare(self.plan.kernels if as_stored else self.plan.panel_kernels)
            reached = peak_rss() if peak_rss() > peak else 0  # one of earlier days does not count
            holding, self.reserve = choose_reserve(
                partial(choose, rest, load, budget, packer.panel_bytes, reached),
                (reserve,) if isinstance(reserve, int) else reserve,
            )
            if holding.slots:
                prepare(self.plan.kernels)
            self.provider: WeightsProvider = make_provider(rest, holding, packer, progress)
            if gpu:
                self.provider = gpu.provider(self.provider, placed, progress)
        self.chunk, self._has_budget = holding.chunk, ram is not None
        self._lock, self._closed = threading.Lock(), False
        self._produced = {value.name for value in self.graph.outputs}
        self._declared = {value.name: value for value in self.graph.inputs}
        self._bind(None)
        self._recordings_left = 2  # tables whose shapes follow the position never fit again
        self._arena, self._decode = internal("Arena")(), internal("Decode")
        self._set_threads, self._set_precision = internal("Threads"), internal("Precision")

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What `run` is fed: name, element type and shape of each."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        """What `run` can return: name, element type and shape of each."""
        return self.graph.outputs

    @property
    def stream(self) -> StreamProvider | None:
        """The provider, when it reads some weights anew in every run."""
        provider = getattr(self.provider, "host", self.provider)  # beside a GPU, the CPU's
        if isinstance(provider, StreamProvider) and provider.bytes_a_pass:
            return provider
        return None

    def slots(self) -> Callable[[Slot], Any]:
        """What gives the slots of a cache their place."""
        made = getattr(self.provider, "slots", None)
        return Slot.in_memory if made is None else made()

    @property
    def gpu_room(self) -> int | None:
        """Bytes that are free where `slots` puts them, if that is a GPU."""
        board = getattr(self.provider, "board", None)
        return None if board is None else int(board.free())

    @property
    def gpu_bytes(self) -> int:
        """Bytes of weights that lie on a GPU, and are used there."""
        return int(getattr(self.provider, "bytes_in_use", 0))

    def run(
        self,
        feeds: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        stop: threading.Event | None = None,
        stay: bool = False,
    ) -> dict[str, Any]:
        """Run the graph on arrays by input name; the named outputs (all of them by default).

        Outputs that a GPU computed come back from there, unless they are to `stay` until the next
        run: then they are gpu.board.DeviceArray.

        A feed may be a slot of a cache: then what is new is written behind what it holds, and its
        present is the same memory, longer; the slot itself stays as long as it was.
        Raises ShapeError on a wrong feed, Interrupted when `stop` is set meanwhile.
        """
        wanted = [v.name for v in self.outputs] if outputs is None else list(outputs)
        unknown = set(wanted) - self._produced
        if unknown:
            raise UsageError(f"no such output: {', '.join(sorted(unknown))}")
        with self._lock:
            if self._closed:
                raise UsageError("this session is closed; open the model again")
            self._set_threads(self.threads)
            self._set_precision(self.precision)
            checked = _checked_feeds(self._declared, feeds, self._accepted)
            getattr(self.provider, "stop_on", lambda stop: None)(stop)
            self.provider.prefetch(self.plan.weights)
            before = self._replay
            values = self._replayed(checked, wanted, stop)
            if values is None:
                values = {**self.plan.constants, **checked}
                self._walk(values, set(wanted), stop)
            if self._replay is not before or before is None:  # a replay takes no memory
                self._trim()
            return self._results(values, wanted, feeds, stay)

    def _replayed(
        self, feeds: Mapping[str, Any], wanted: Sequence[str], stop: threading.Event | None
    ) -> dict[str, Any] | None:
        """The values after a replay of a token's tables, or None when it is not for these feeds.

        The first run for one token over a cache is recorded, or for one token each of several
        sequences.
        """
        known = self._replay
        if trace.current() is not None:
            return None
        if known is not None and known.fits(feeds, wanted):
            if known.run(feeds, stop):
                return known.values
            self._bind(None)
            self._recordings_left -= 1
        tokens = _next_tokens(feeds)
        if self._recordings_left == 0 or not self._is_recorded(tokens):
            return None
        own = {n: f.copy() if isinstance(f, np.ndarray) else f for n, f in feeds.items()}
        values = {**self.plan.constants, **own}
        replay = Replay(
            self.plan, values, self._argument, internal("Table"), self._is_lasting, stop,
            previous=known.values if known is not None and known.tokens == tokens else None,
        )  # fmt: skip
        self._bind(replay if replay.lowered else None)
        return values

    def _bind(self, replay: Replay | None) -> None:
        """What the next tokens are replayed by, and its slots that may have any length."""
        self._replay, slots = replay, replay.slots if replay is not None else {}
        self._accepted = {
            name: slot
            for name, slot in slots.items()
            if _grows(self._declared[name], getattr(slot, "axis", 2))
        }

    def _trim(self) -> None:
        """Give back the memory that the next runs will not need."""
        if self._has_budget:
            self._arena.trim_unused()
        self._arena.trim(IDLE)

    def _is_recorded(self, tokens: int) -> bool:
        """Whether runs for so many next tokens are recorded. Several take memory for all that is
        computed, which no budget counts, and pay where Python takes long beside the kernels."""
        if tokens > 1:
            return not self._has_budget and self.plan.weight_bytes <= BATCH_BYTES
        return tokens == 1

    def _walk(self, values: dict[str, Any], keep: set[str], stop: threading.Event | None) -> None:
        recording = trace.current()
        for step in self.plan.steps:
            if stop is not None and stop.is_set():
                raise Interrupted("the run was stopped")
            begun = time.perf_counter() if recording else 0.0
            arguments = [self._argument(values, name, form) for name, form in step.inputs]
            named = zip(step.outputs, step.call(arguments), strict=False)
            values.update((name, result) for name, result in named if name)
            del arguments, named  # or what dies now would live through the next step
            for ref in step.weights:
                self.provider.release(ref)
            for name in step.dead:
                if name not in keep:
                    values.pop(name, None)
            if recording:
                nbytes = sum(ref.nbytes for ref in step.weights)
                recording.record(step.node.op_type, time.perf_counter() - begun, nbytes)

    def _argument(self, values: dict[str, Any], name: str, form: Form) -> Any:
        """An input as its operator wants it: in the engine's own form, or as an array."""
        if not name:
            return None
        value = values[name] if name in values else self.provider.get(self.graph.initializers[name])
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Weight) and form is not Form.TILES:
            value = value.whole()
        if form:
            return value
        return self._decode(value) if isinstance(value, Weight) else np.asarray(value)

    def _is_lasting(self, ref: WeightRef) -> bool:
        return self.provider.get(ref).lasting

    def _results(
        self, values: dict[str, Any], wanted: Sequence[str], feeds: Mapping[str, Any], stay: bool
    ) -> dict[str, Any]:
        """The outputs, each the caller's own: none is a feed, and no two are one array."""
        # What a replay computed is copied, each for itself.
        results, taken = {}, set() if self._replay else {id(feed) for feed in feeds.values()}
        for name in wanted:
            value = self._output(values, name, stay)
            if isinstance(value, np.ndarray) and id(value) in taken:
                value = value.copy()
            results[name] = value
            taken.add(id(value))
        return results

    def _output(self, values: dict[str, Any], name: str, stay: bool) -> Any:
        value = self._argument(values, name, Form.NATIVE)
        if isinstance(value, Weight):
            return np.array(self._decode(value))
        if not isinstance(value, np.ndarray):
            stays = hasattr(value, "reserve") or (stay and hasattr(value, "board"))
            return value if stays or not hasattr(value, "__array__") else np.asarray(value)
        # A replay overwrites what it computed; a view may look at a feed or a constant, and a
        # constant itself is read-only: results are the caller's to change.
        shared = self._replay or value.base is not None or not value.flags.writeable
        return value.copy() if shared else value

    def describe(self) -> str:
        """The plan as text: one line a step."""
        return describe(self.plan)

    def close(self) -> None:
        """Let go of files and memory; running it afterwards is a UsageError."""
        with self._lock:
            self._closed = True
            self._bind(None)
            getattr(self.provider, "close", lambda: None)()
            self._arena.trim()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _closed_on_failure(gpu: Gpu | None) -> Iterator[None]:
    """Let go of the GPU when what is done meanwhile fails."""
    try:
        yield
    except BaseException:
        if gpu:
            with suppress(DeviceError):  # the first error says what is the matter
                gpu.device.close()
        raise


def _planned(graph: Graph, has_panels: Callable[[WeightRef], Any], precision: str,
             device: str) -> Plan:  # fmt: skip
    """The plan for a device of the registry's, of the graph as it is best there."""
    rewrites = {"cuda": passes.rewrite_fused, "offload": passes.rewrite_together}
    if device in rewrites:
        graph = rewrites[device](graph)
    return make_plan(graph, decode_constant, has_panels, precision, device)


def _next_tokens(feeds: Mapping[str, Any]) -> int:
    """How many tokens the feeds hold, one for each sequence whose cache kernels append to; 0 when
    they are something else."""
    arrays = [f for n, f in feeds.items() if isinstance(f, np.ndarray) and n != passes.LOGIT_ROWS]
    slots = [f for f in feeds.values() if not isinstance(f, np.ndarray)]
    if not slots or not all(hasattr(slot, "advanced") for slot in slots):
        return 0
    tokens: int = slots[0].tokens
    total = slots[0].shape[2] + 1  # what an attention mask covers
    sizes = {f.size for f in arrays}
    return tokens if tokens in sizes and sizes <= {tokens, total} else 0


def _check_choices(device: str, precision: str) -> None:
    if device not in DEVICES:
        raise UsageError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return physical_cores()
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    return threads


def _checked_feeds(
    declared: Mapping[str, Value],
    feeds: Mapping[str, Any],
    accepted: Mapping[str, Any],
) -> dict[str, Any]:
    """The feeds as arrays of the declared types; slots pass as they are, and those that were
    `accepted` unseen: of theirs, only the length ever changes."""
    if feeds.keys() != declared.keys():
        unknown = [name for name in feeds if name not in declared]
        missing = [name for name in declared if name not in feeds]
        problem = f"unknown {unknown}" if unknown else f"missing {missing}"
        names = ", ".join(declared)
        raise ShapeError(f"feeds: {problem}; the model's inputs are {names}")
    known = accepted.keys() if accepted.items() <= feeds.items() else ()
    new = declared.keys() - known
    return {**feeds, **{name: _checked(declared[name], feeds[name]) for name in new}}


def _grows(value: Value, axis: int) -> bool:
    """Whether any length is allowed along an axis."""
    return value.shape is None or not isinstance(value.shape[axis], int)


def _checked(value: Value, feed: Any) -> Any:
    if not hasattr(feed, "reserve"):
        feed = np.asarray(feed)
        if value.dtype not in ("", "string") and feed.dtype != numpy_dtype(value.dtype):
            raise ShapeError(f"input {value.name}: got {feed.dtype}, the model takes {value.dtype}")
    shape = value.shape
    if shape is not None:
        fits = len(shape) == len(feed.shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(shape, feed.shape, strict=True)
        )
        if not fits:
            wanted = tuple("?" if n is None else n for n in shape)
            raise ShapeError(
                f"input {value.name}: got shape {tuple(feed.shape)}, the model takes {wanted}"
            )
    return feed
