"""A language model over a session: ids in, logits out, a cache that grows. It knows no text.

Dims: T tokens of one sequence, V vocabulary, positions 0 .. context - 1.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from . import passes
from .device import memory_available, physical_cores
from .errors import ShapeError, UnsupportedError, UsageError
from .graph import Graph, Value
from .kvcache import ArraySlot, KVCache, bytes_at, bytes_resident
from .loading import logit_chunk, prompt_precision
from .progress import Reading
from .session import Progress, Session, decode_constant, load_graph

Logits = np.ndarray[Any, np.dtype[np.float32]]

DEFAULT_CONTEXT = 4096  # for models that do not say
RESERVED_POSITIONS = 4096  # of the cache, when there is no budget to keep; it grows as needed


class LanguageModel:
    """Feeds ids to a causal language model and keeps what it has read.

    `model` is a path or a Graph with past/present pairs. `tokens` are the ids in the cache, in
    order; `context` how many fit; `chunk` how many of a prompt are read at a time. With `ram`, a
    budget for the whole process, the memory of a full context is set aside, or that of several
    `sequences` (sequences.py). `precision` "auto" is "fast" for weights stored as floats, "exact"
    for block encodings: see Session. `kv_cache` "q8" keeps keys and values in 8 bits instead of 16:
    see Slot. What of a full context's does not fit `ram` lies in a file in the folder `kv_spill`;
    without one, or for several sequences, it has to fit. `logit_chunk` is how many positions
    `logits` computes at a time, `every_position` whether the graph has them; `passes` counts passes
    over the weights; `full_cache_bytes` is what the cache takes at the whole context. `packed` is
    as for Session, and so are `device` and `cuda`; with `logits_stay`, what `feed` returns of a GPU
    is left there (gpu.board.DeviceArray) until the next pass. One caller at a time.
    """

    def __init__(
        self,
        model: str | Path | Graph,
        *,
        load: str = "auto",
        ram: int | str | None = None,
        threads: int | None = None,
        context: int | None = None,
        precision: str = "auto",
        kv_cache: str = "f16",
        kv_spill: str | Path | None = None,
        device: str = "cpu",
        cuda: int | str = "auto",
        packed: str | Path | None = None,
        sequences: int = 1,
        progress: Progress | None = None,
    ) -> None:
        if progress is not None:
            progress("reading the model", None)
        graph = passes.optimize(load_graph(model), decode_constant)
        graph = passes.rewrite_unpadded(graph, decode_constant)
        graph = passes.rewrite_windows(graph, decode_constant)
        self.graph = passes.rewrite_logit_rows(graph)
        self.context, self._encoding = _context(graph, context), kv_cache
        self._find_values(f"{graph.name or model}")
        self.every_position = _gives_every_position(graph)
        self.tokens: list[int] = []
        self.passes, self.logits_stay = 0, False
        self._wanted = self._now = 0  # tokens: in the cache when all is read, read by this pass
        self._begun = 0  # passes that the provider had begun before this one
        self.precision = prompt_precision(self.graph) if precision == "auto" else precision
        windows = 2 * (threads or physical_cores())  # shares of the thread team
        spill = None if ram is None or kv_spill is None else Path(kv_spill)
        reserve = self._reserve(ram is not None, windows, sequences, spill is not None)
        self._has_budget = ram is not None
        self.session = Session(
            self.graph, load=load, ram=ram, threads=threads, precision=self.precision,
            device=device, cuda=cuda, optimize=False, reserve=reserve, packed=packed,
            cache=sequences * self.cache_bytes_at(self.context), progress=progress,
        )  # fmt: skip
        self.chunk, self.logit_chunk = self.session.chunk, logit_chunk(self.graph)
        self.full_cache_bytes = self.cache_bytes_at(self.context)
        if progress is not None and self.session.reserve < reserve[0]:
            progress("setting aside room on disk for the context", None)
        self._cache = self._open_cache(spill, windows)
        # Only Attention appends to its slots; a present computed otherwise is carried over here.
        self._carried = {
            slot: p.present_output
            for p in self.pairs
            if isinstance(slot := self._cache.slots[p.past_input], ArraySlot)
        }

    def _find_values(self, name: str) -> None:
        """What of the graph's inputs and outputs is the cache, what the ids and the logits."""
        self.pairs = passes.find_cache(self.graph)
        if not self.pairs:
            raise UnsupportedError(
                f"{name}: the graph has no past/present inputs and outputs, so it "
                "cannot generate text; export it with its cache (use_cache, with past)"
            )
        past = {p.past_input for p in self.pairs}
        self._inputs = [v for v in self.graph.inputs if v.name not in past]
        presents = {p.present_output for p in self.pairs}
        self._logits = next(v for v in self.graph.outputs if v.name not in presents)
        _check_inputs(self._inputs)

    def _reserve(self, has_budget: bool, windows: int, sequences: int, spills: bool) -> list[int]:
        """Bytes to set aside for the cache: the most, and less where the rest can be spilled."""
        positions = self.context if has_budget else min(self.context, RESERVED_POSITIONS)
        choices = bytes_resident(self.graph, self.pairs, positions, self._encoding, windows=windows)
        return choices if spills and sequences == 1 else [sequences * choices[0]]

    def _open_cache(self, spill: Path | None, windows: int) -> KVCache:
        try:
            return KVCache(
                self.graph, self.pairs, self._encoding, self.context,
                resident=self.session.reserve, spill=spill, windows=windows,
                place=self.session.slots(),
            )  # fmt: skip
        except BaseException:
            self.session.close()
            raise

    @property
    def vocab_size(self) -> int:
        """V, as the graph declares it; 0 when it does not."""
        size = (self._logits.shape or (0,))[-1]
        return size if isinstance(size, int) else int(self.graph.metadata.get("vocab_size", 0))

    @property
    def streams(self) -> bool:
        """Whether every pass reads weights anew, those that are not kept."""
        return self.session.stream is not None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that generating one token reads: all but tables it picks rows from."""
        tables = {ref.matrix for ref in self.session.plan.tables}
        weights = self.session.plan.weights
        read = {ref.key: ref.nbytes for ref in weights if ref.matrix not in tables}
        return sum(read.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache of keys and values takes now, in memory and on disk."""
        return self._cache.nbytes

    @property
    def spilled_bytes(self) -> int:
        """Bytes that are set aside for the cache on disk."""
        return self._cache.disk_bytes

    @property
    def bytes_streamed(self) -> int:
        """Bytes read from disk so far, in passes; 0 when every weight stays where it is."""
        stream = self.session.stream
        return stream.bytes_read if stream is not None else 0

    @property
    def gpu_bytes(self) -> int:
        """Bytes of weights that lie on a GPU; 0 without one."""
        return self.session.gpu_bytes

    def reading(self) -> Reading | None:
        """The pass under way, for whoever looks from another thread; None between two."""
        while True:  # until all that was looked at is of one pass
            of = len(self.tokens), self._wanted, self._now, self._begun
            found = self._reading(*of)
            if of == (len(self.tokens), self._wanted, self._now, self._begun):
                return found

    def _reading(self, tokens: int, wanted: int, now: int, begun: int) -> Reading | None:
        stream = self.session.stream
        if not now:
            return None
        if stream is None:
            return Reading("", 0, 0, 0, tokens, wanted, now)
        read = stream.pass_read if stream.passes > begun else 0
        whole = stream.bytes_a_pass
        return Reading(stream.reading, stream.bytes_read, read, whole, tokens, wanted, now)

    @property
    def cache_room(self) -> int:
        """Bytes that caches may take together: what was set aside, or when memory has no bounds but
        the machine's half of what is free, if that is more; half of the GPU's where they lie there.
        """
        if self.session.gpu_room is not None:
            return self.session.gpu_room // 2
        if self._has_budget or self.streams:
            return self.session.reserve
        return max(self.session.reserve, memory_available() // 2)

    def cache_bytes_at(self, positions: int) -> int:
        """The most memory that the cache of one sequence takes with so many positions, in bytes."""
        return bytes_at(self.graph, self.pairs, positions, self._encoding)

    def new_cache(self, positions: int) -> KVCache:
        """An empty cache for so many positions of another sequence: see sequences.py."""
        return KVCache(
            self.graph, self.pairs, self._encoding, positions, place=self.session.slots()
        )

    def feed(self, ids: Sequence[int], stop: threading.Event | None = None) -> Logits:
        """Read `ids` and return the logits (V,) float32 that follow the last of them.

        Raises UsageError when they do not fit the context, Interrupted when `stop` is set
        meanwhile; `tokens` then says how far it came.
        """
        for chunk in self._chunks(ids, self.chunk):
            logits = self._pass(chunk, [-1], stop)
        return cast(Logits, logits[-1])

    def logits(self, ids: Sequence[int], stop: threading.Event | None = None) -> Logits:
        """Read `ids` and return the logits (T, V) float32 that follow each of them.

        Raises as `feed`, and UnsupportedError when the graph has the logits of its last position
        only.
        """
        chunks = self._chunks(ids, min(self.chunk, self.logit_chunk))
        parts = [np.asarray(self._pass(c, range(-len(c), 0), stop)) for c in chunks]
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(logits) != len(ids):
            raise UnsupportedError(
                f"{self.graph.name or 'the graph'} gives logits of {len(logits)} of {len(ids)} "
                "positions; export it with those of all, or read one at a time (--batch 1)"
            )
        return logits

    def _chunks(self, ids: Sequence[int], size: int) -> list[list[int]]:
        """`ids` in pieces of `size`, after a look at whether they fit."""
        if len(ids) == 0:
            raise UsageError("feed needs at least one id")
        if len(self.tokens) + len(ids) > self.context:
            raise UsageError(
                f"{len(self.tokens) + len(ids)} tokens do not fit the context of {self.context}; "
                "raise --context or shorten the prompt"
            )
        self._wanted = len(self.tokens) + len(ids)
        whole = [int(i) for i in ids]
        return [whole[start : start + size] for start in range(0, len(whole), size)]

    def _pass(self, ids: list[int], rows: Sequence[int], stop: threading.Event | None) -> Logits:
        """The logits after the ids at `rows` of one chunk, which count from its end (-1 is the
        last); those of all positions where the graph does not let them be picked."""
        past = len(self.tokens)
        feeds: dict[str, Any] = dict(self._cache.slots)
        for value in self._inputs:
            feeds[value.name] = _feed(value, ids, past, rows)
        wanted = [self._logits.name, *self._carried.values()]
        stream = self.session.stream
        self._begun = 0 if stream is None else stream.passes
        self._now = len(ids)
        try:
            result = self.session.run(feeds, wanted, stop=stop, stay=self.logits_stay)
        finally:
            self._now = 0
        self.tokens += ids
        self.passes += 1
        for slot, present in self._carried.items():
            slot.append(np.split(result[present], [past], slot.axis)[1])
        self._cache.length = len(self.tokens)
        logits = result[self._logits.name]
        if hasattr(logits, "board"):
            return cast(Logits, logits.as_shape((-1, logits.shape[-1])))
        logits = np.asarray(logits, np.float32)
        return cast(Logits, logits.reshape(-1, logits.shape[-1]))

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self.tokens):
            raise UsageError(f"cannot rewind {len(self.tokens)} tokens to {length}")
        del self.tokens[length:]
        self._cache.length = length

    def close(self) -> None:
        """Let go of the weights and the cache."""
        self.session.close()
        self._cache.close()


def _context(graph: Graph, wanted: int | None) -> int:
    """The context in tokens: what was asked for, within what the model was made for."""
    own = graph.metadata.get("context_length")
    if wanted is None:
        return int(own or DEFAULT_CONTEXT)
    if wanted < 1:
        raise UsageError(f"--context {wanted}: it must be at least 1")
    if own and wanted > int(own):
        raise UsageError(f"--context {wanted}: the model was made for at most {own} tokens")
    return wanted


def _gives_every_position(graph: Graph) -> bool:
    """Whether the logits are declared as long as the ids; exports may cut them to the last."""
    shapes = {v.name: v.shape for v in (*graph.inputs, *graph.outputs)}
    ids, logits = shapes.get("input_ids"), shapes.get("logits")
    return ids is not None and logits is not None and ids[1:2] == logits[1:2]


_KNOWN_INPUTS = ("input_ids", "attention_mask", "position_ids", passes.LOGIT_ROWS)


def _check_inputs(inputs: Sequence[Value]) -> None:
    for value in inputs:
        if value.name not in _KNOWN_INPUTS:
            raise UnsupportedError(
                f"the graph has an input {value.name!r} that generating text does not know; "
                f"it feeds {', '.join(_KNOWN_INPUTS)} and the cache"
            )


def _feed(value: Value, ids: list[int], past: int, rows: Sequence[int]) -> Any:
    dtype = np.dtype(value.dtype)
    if value.name == "input_ids":
        return np.array([ids], dtype)
    if value.name == "position_ids":
        return np.arange(past, past + len(ids), dtype=dtype)[None]
    if value.name == "attention_mask":
        return np.ones((1, past + len(ids)), dtype)
    if value.name == passes.LOGIT_ROWS:
        return np.array(rows, dtype)
    raise ShapeError(f"no feed for input {value.name}")


def declared(path: str | Path) -> tuple[int, int]:
    """(context in tokens, bytes of the weights) of the model at `path`, which is not opened."""
    graph = load_graph(path)
    sizes = {ref.key: ref.nbytes for ref in graph.initializers.values()}
    return _context(graph, None), sum(sizes.values())
