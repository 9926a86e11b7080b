"""A language model over a session: ids in, logits out, a cache that grows. It knows no text.

Dims: T tokens of one sequence, V vocabulary, positions 0 .. context - 1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from . import passes
from .errors import ShapeError, UnsupportedError, UsageError
from .graph import Graph, Value
from .kvcache import ArraySlot, KVCache, bytes_at
from .loading import prompt_precision
from .session import Progress, Session, decode_constant, load_graph

Logits = np.ndarray[Any, np.dtype[np.float32]]

DEFAULT_CONTEXT = 4096  # for models that do not say
RESERVED_POSITIONS = 4096  # of the cache, when there is no budget to keep; it grows as needed


class LanguageModel:
    """Feeds ids to a causal language model and keeps what it has read.

    `model` is a path or a Graph with past/present pairs. `tokens` are the ids in the cache, in
    order; `context` how many fit; `chunk` how many of a prompt are read at a time. With `ram`, a
    budget for the whole process, the memory of a full context is set aside. `precision` "auto" is
    "fast" for weights stored as floats, "exact" for block encodings: see Session. `kv_cache` "q8"
    keeps keys and values in 8 bits instead of 16: see KVSlot. With `all_logits` the head is
    computed for every position, for `logits`. `packed` is as for Session. One caller at a time.
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
        device: str = "cpu",
        all_logits: bool = False,
        packed: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if progress is not None:
            progress("reading the model", None)
        graph = passes.optimize(load_graph(model), decode_constant)
        self.all_logits = all_logits
        self.graph = graph if all_logits else passes.rewrite_last_logits(graph)
        pairs = passes.find_cache(self.graph)
        if not pairs:
            raise UnsupportedError(
                f"{graph.name or model}: the graph has no past/present inputs and outputs, so it "
                "cannot generate text; export it with its cache (use_cache, with past)"
            )
        self.context = _context(graph, context)
        self._cache = KVCache(self.graph, pairs, kv_cache)
        # Only Attention appends to its slots; a present computed otherwise is carried over here.
        self._carried = {
            slot: p.present_output
            for p in pairs
            if isinstance(slot := self._cache.slots[p.past_input], ArraySlot)
        }
        self._inputs = [v for v in graph.inputs if v.name not in self._cache.slots]
        presents = {p.present_output for p in pairs}
        self._logits = next(v for v in self.graph.outputs if v.name not in presents)
        _check_inputs(self._inputs)
        self.tokens: list[int] = []
        positions = self.context if ram is not None else min(self.context, RESERVED_POSITIONS)
        self.precision = prompt_precision(self.graph) if precision == "auto" else precision
        self.session = Session(
            self.graph, load=load, ram=ram, threads=threads, precision=self.precision,
            device=device, optimize=False, reserve=bytes_at(self.graph, pairs, positions, kv_cache),
            packed=packed, progress=progress,
        )  # fmt: skip
        self.chunk = self.session.chunk

    @property
    def vocab_size(self) -> int:
        """V, as the graph declares it; 0 when it does not."""
        size = (self._logits.shape or (0,))[-1]
        return size if isinstance(size, int) else int(self.graph.metadata.get("vocab_size", 0))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that generating one token reads: all but tables it picks rows from."""
        tables = {ref.matrix for ref in self.session.plan.tables}
        weights = self.session.plan.weights
        read = {ref.key: ref.nbytes for ref in weights if ref.matrix not in tables}
        return sum(read.values())

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache of keys and values takes now."""
        return self._cache.nbytes

    def feed(self, ids: Sequence[int], stop: threading.Event | None = None) -> Logits:
        """Read `ids` and return the logits (V,) float32 that follow the last of them.

        Raises UsageError when they do not fit the context, Interrupted when `stop` is set
        meanwhile; `tokens` then says how far it came.
        """
        for logits in self._passes(ids, stop):
            last = logits[-1]
        return cast(Logits, last)

    def logits(self, ids: Sequence[int], stop: threading.Event | None = None) -> Logits:
        """Read `ids` and return the logits (T, V) float32 that follow each of them.

        For a model opened with `all_logits`. Raises as `feed`, and UnsupportedError when the graph
        gives the logits of its last position only.
        """
        if not self.all_logits:
            raise UsageError("logits of every position need a model opened with all_logits=True")
        chunks = list(self._passes(ids, stop))
        logits = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        if len(logits) != len(ids):
            raise UnsupportedError(
                f"{self.graph.name or 'the graph'} gives logits of {len(logits)} of {len(ids)} "
                "positions; export it with those of all, or read one at a time (--batch 1)"
            )
        return logits

    def _passes(self, ids: Sequence[int], stop: threading.Event | None) -> Iterator[Logits]:
        """The logits of each chunk of `ids`, all positions that the graph gives."""
        if len(ids) == 0:
            raise UsageError("feed needs at least one id")
        if len(self.tokens) + len(ids) > self.context:
            raise UsageError(
                f"{len(self.tokens) + len(ids)} tokens do not fit the context of {self.context}; "
                "raise --context or shorten the prompt"
            )
        for start in range(0, len(ids), self.chunk):
            yield self._pass([int(i) for i in ids[start : start + self.chunk]], stop)

    def _pass(self, ids: list[int], stop: threading.Event | None) -> Logits:
        past = len(self.tokens)
        feeds: dict[str, Any] = dict(self._cache.slots)
        for value in self._inputs:
            feeds[value.name] = _feed(value, ids, past)
        wanted = [self._logits.name, *self._carried.values()]
        result = self.session.run(feeds, wanted, stop=stop)
        self.tokens += ids
        for slot, present in self._carried.items():
            slot.append(np.split(result[present], [past], slot.axis)[1])
        self._cache.length = len(self.tokens)
        logits = np.asarray(result[self._logits.name], np.float32)
        return logits.reshape(-1, logits.shape[-1])

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= len(self.tokens):
            raise UsageError(f"cannot rewind {len(self.tokens)} tokens to {length}")
        del self.tokens[length:]
        self._cache.length = length

    def close(self) -> None:
        """Let go of the weights and the cache."""
        self.session.close()
        self._cache.slots.clear()


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


_KNOWN_INPUTS = ("input_ids", "attention_mask", "position_ids")


def _check_inputs(inputs: Sequence[Value]) -> None:
    for value in inputs:
        if value.name not in _KNOWN_INPUTS:
            raise UnsupportedError(
                f"the graph has an input {value.name!r} that generating text does not know; "
                f"it feeds {', '.join(_KNOWN_INPUTS)} and the cache"
            )


def _feed(value: Value, ids: list[int], past: int) -> Any:
    dtype = np.dtype(value.dtype)
    if value.name == "input_ids":
        return np.array([ids], dtype)
    if value.name == "position_ids":
        return np.arange(past, past + len(ids), dtype=dtype)[None]
    if value.name == "attention_mask":
        return np.ones((1, past + len(ids)), dtype)
    raise ShapeError(f"no feed for input {value.name}")
