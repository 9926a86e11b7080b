"""Several sequences of one language model, side by side in each pass over its weights.

A pass reads the tokens of all of them as if they were one prompt, with each token's own position;
Attention alone tells them apart, since each sequence has a cache of its own.

Dims: T tokens of a pass, of all its sequences; V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .graph import Graph, Node
from .kvcache import KVCache
from .kvslot import Slot, SlotGroup
from .llm import LanguageModel, Logits
from .passes import LOGIT_ROWS, CachePair
from .passes.rewriting import captured
from .session import internal

FED = {"input_ids", "position_ids", LOGIT_ROWS}  # beside the past


def can_share_passes(graph: Graph, pairs: Sequence[CachePair]) -> bool:
    """Whether a pass may hold several sequences: positions are fed, and tokens meet one another in
    Attention only, which has a causal limit instead of a mask."""
    past, present = {p.past_input for p in pairs}, {p.present_output for p in pairs}
    if {v.name for v in graph.inputs} - past != FED:
        return False
    attended: set[str] = set()
    for node in graph.nodes:
        own = set(node.inputs[4:6]) if _is_causal(node) else set()
        attended |= own & past
        if (set(node.inputs) - own) & (past | present):
            return False
    return attended == past and not captured(graph) & (past | present)


def _is_causal(node: Node) -> bool:
    """Whether a node is an Attention that sees what came before, or of it a window, and no more."""
    given = node.attributes
    return (
        (node.op_type, node.domain) == ("Attention", "")
        and given.get("is_causal", 0) == 1
        and not any((*node.inputs[3:4], *node.inputs[6:], *node.outputs[3:]))
        and given.get("right_window_size", -1) < 0
    )


class Strand:
    """One sequence: `tokens` are the ids in its cache, `waiting` those that it will read next."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.tokens: list[int] = []
        self.waiting: list[int] = []

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]
        self.cache.length = length


Part = tuple[Strand, int]
"""A strand, and how many of its waiting ids a pass reads."""


class Sequences:
    """Reads strands of a model for which `can_share_passes` holds, at most `most` at a time (None:
    `few`).

    Up to `few` strands each get the logits that they would get alone, to the last bit: what is
    computed as single tokens, up to `few` rows, and what is computed as a prompt do not meet in one
    pass, and a prompt is cut into the same chunks.
    """

    def __init__(self, llm: LanguageModel, most: int | None = None) -> None:
        self.few = int(internal("FewRows")())
        self.most = most or self.few
        self._llm, self._rows = llm, max(self.few, self.most)
        self._types = {v.name: np.dtype(v.dtype) for v in llm.graph.inputs if v.name in FED}
        self._last: list[Part] = []
        self._pasts: dict[str, SlotGroup] = {}

    def open(self, positions: int) -> Strand:
        """A new sequence of so many ids at most."""
        return Strand(self._llm.new_cache(positions))

    def close(self, strand: Strand) -> None:
        """Let go of a sequence and its cache."""
        if any(strand is other for other, _ in self._last):
            for past in self._pasts.values():
                past.parts = ()  # the session has recorded a run with it, and keeps it
            self._last = []
        strand.cache.close()

    def step(
        self, strands: Iterable[Strand], stop: threading.Event | None = None
    ) -> Iterator[tuple[Strand, Logits]]:
        """Read what is waiting: of prompts as much as one pass takes, of single tokens all.

        Yields the strands of which nothing waits any more, with the logits (V,) that follow, as
        they come. Raises Interrupted when `stop` is set meanwhile.
        """
        for parts in self._planned(strands):
            logits = self._pass(parts, stop)
            for (strand, _), row in zip(parts, logits, strict=True):
                if not strand.waiting:
                    yield strand, row

    def _planned(self, strands: Iterable[Strand]) -> list[list[Part]]:
        chunk = self._llm.chunk
        parts = [(s, min(len(s.waiting), chunk)) for s in strands if s.waiting]
        prompts = [part for part in parts if part[1] > self.few]
        tokens = [part for part in parts if part[1] <= self.few]
        return packed(prompts, chunk)[:1] + packed(tokens, self._rows)

    def _pass(self, parts: list[Part], stop: threading.Event | None) -> Logits:
        """The logits (strands, V) after the last id that the pass reads of each strand."""
        ids = [i for strand, count in parts for i in strand.waiting[:count]]
        positions = [len(s.tokens) + i for s, count in parts for i in range(count)]
        ends = np.cumsum([count for _, count in parts]) - 1
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], self._types["input_ids"]),
            "position_ids": np.array([positions], self._types["position_ids"]),
            LOGIT_ROWS: ends.astype(self._types[LOGIT_ROWS]),
        }
        result = self._llm.session.run(feeds | self._grouped(parts), ["logits"], stop=stop)
        self._llm.passes += 1
        for strand, count in parts:
            strand.tokens += strand.waiting[:count]
            del strand.waiting[:count]
            strand.cache.length = len(strand.tokens)
        return np.asarray(result["logits"][0], np.float32)

    def _grouped(self, parts: list[Part]) -> dict[str, SlotGroup]:
        """The past of a pass by input; for the next tokens of the same strands the same objects as
        before, to which the session's recording is bound."""
        if parts == self._last:
            return self._pasts
        pasts = {
            name: SlotGroup([(_slot(strand, name), count) for strand, count in parts])
            for name in parts[0][0].cache.slots
        }
        if all(count == 1 for _, count in parts):
            self._last, self._pasts = parts, pasts
        return pasts


def packed(parts: Iterable[Part], room: int) -> list[list[Part]]:
    """The parts in passes of at most `room` ids (or one part), each in the first where it fits."""
    found: list[list[Part]] = []
    for part in parts:
        for others in found:
            if sum(count for _, count in others) + part[1] <= room:
                others.append(part)
                break
        else:
            found.append([part])
    return found


def _slot(strand: Strand, name: str) -> Slot:
    slot = strand.cache.slots[name]
    assert isinstance(slot, Slot), name  # can_share_passes: Attention reads it
    return slot
