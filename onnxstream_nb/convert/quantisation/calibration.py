"""What a model computes on a text: the values that quantisation is calibrated by.

A graph is walked in pieces, each up to the values that are wanted next, over all windows of the
text; between two pieces only what later ones read is kept. So the weights of one piece are in
memory at a time, and a piece may be changed by what was seen before it. Dims: T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedError, UsageError
from ...graph import Graph, Node, Value, WeightRef
from ...passes import find_cache
from ...passes.rewriting import node_reads
from ...session import Session
from ..draft import Draft

if TYPE_CHECKING:
    from ...tokenizer import Tokenizer

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

CHARACTERS = 64  # of a text, for each token that is wanted: a longer one is not read to its end
HELD = 256 << 20  # bytes of captured values of one window that are held at a time
_SHORT = ("int4", "uint4")


def feeds_of_text(
    graph: Graph,
    tokenizer: Tokenizer,
    text: str,
    window: int,
    windows: int,
    source: str = "the calibration text",
) -> Iterator[dict[str, Array]]:
    """The inputs of a language model for `windows` windows of `window` tokens, spread evenly over
    the text: ids and positions (1, T), a mask of ones, an empty past.

    Raises UsageError naming `source` when the text is too short, UnsupportedError naming an input
    that is not known.
    """
    needed = window * windows
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(text[: CHARACTERS * needed])]
    if len(ids) < needed:
        raise UsageError(
            f"{source}: calibration needs {needed} tokens ({windows} windows of {window}), and "
            f"this text has {len(ids)}; give a longer one, or lower --tokens"
        )
    past = {pair.past_input for pair in find_cache(graph)}
    step = len(ids) // window // windows * window
    for start in range(0, step * windows, step):
        cut = ids[start : start + window]
        cut[0] = cut[0] if bos is None else bos
        yield {value.name: _feed(value, cut, value.name in past) for value in graph.inputs}


def _feed(value: Value, ids: Sequence[int], is_past: bool) -> Array:
    """An input for one sequence that starts with an empty cache."""
    dtype, count = np.dtype(value.dtype), len(ids)
    made: Mapping[str, Callable[[], Array]] = {
        "input_ids": lambda: np.array([ids], dtype),
        "position_ids": lambda: np.arange(count, dtype=dtype)[None],
        "attention_mask": lambda: np.ones((1, count), dtype),
        "token_type_ids": lambda: np.zeros((1, count), dtype),
    }
    if value.name in made:
        return made[value.name]()
    if not is_past or value.shape is None:
        raise UnsupportedError(
            f"calibration: the graph has an input {value.name!r} that text gives no values for"
        )
    batch, *sizes = (size if isinstance(size, int) else None for size in value.shape)
    return np.zeros((batch or 1, *(size or 0 for size in sizes)), dtype)


def captured(
    draft: Draft, names: Iterable[str], feeds: Iterable[Feeds]
) -> Iterator[Mapping[str, Array]]:
    """What the values `names` are for each of the feeds, by name.

    So that memory stays bounded, a mapping holds some of the names only: groups of them follow the
    graph's order, and every group comes once for each of the feeds.
    """
    wanted = set(names)
    order = [v.name for v in draft.graph.inputs]
    order += [o for node in draft.graph.nodes for o in node.outputs]
    ordered = [name for name in order if name in wanted]
    unknown = wanted - set(ordered)
    if unknown:
        raise UsageError(f"the graph has no value {', '.join(sorted(unknown))}")
    walk = Walk(draft, feeds, ordered)
    while ordered:
        group = ordered[: walk.group]
        del ordered[: len(group)]
        yield from walk.run_to(group)


class Walk:
    """A pass over a draft's graph for many feeds at once, stopping at `targets`, which are to be
    asked for in the graph's order.

    `group` is how many targets may be asked for at a time, by the size of the largest seen so far;
    `ran` are the values that the pieces so far have computed.
    """

    def __init__(self, draft: Draft, feeds: Iterable[Feeds], targets: Iterable[str]) -> None:
        self.draft = draft
        self.group = 1
        self.ran: set[str] = set()
        self._targets = list(targets)
        self._live = [dict(feed) for feed in feeds]
        self._known = {v.name for v in draft.graph.inputs}

    def run_to(
        self, names: Sequence[str], draft: Draft | None = None
    ) -> Iterator[dict[str, Array]]:
        """Run on to the values `names`; yields them for each of the feeds.

        `draft`, with other weights or nodes for what has not been run, replaces the one before; the
        values that earlier pieces left behind must have the same names in it.
        """
        self.draft = draft or self.draft
        self._targets = [name for name in self._targets if name not in names]
        piece = _needed(self.draft.graph, names, self._known)
        computed = {o for node in piece for o in node.outputs}
        made = self._known | computed
        later = _needed(self.draft.graph, self._targets, made)
        read = {name for node in later for name in node_reads(node)} | set(self._targets)
        kept, wanted = read & made, set(names)
        self._known = kept
        with _session(self.draft, piece, sorted((wanted | kept) - {""})) as session:
            for number, live in enumerate(self._live):
                fed = {v.name: live[v.name] for v in session.inputs}
                found = live | session.run(fed)
                self._live[number] = {name: found[name] for name in kept}
                yield {name: found[name] for name in names}
        self.ran |= computed
        largest = max((found[name].nbytes for name in names), default=1) if self._live else 1
        self.group = max(1, HELD // max(1, largest))


def _needed(graph: Graph, names: Iterable[str], known: set[str]) -> list[Node]:
    """The nodes that compute `names` from what is known, in order."""
    wanted, found = set(names) - known, []
    for node in reversed(graph.nodes):
        if not wanted.isdisjoint(node.outputs):
            found.append(node)
            wanted.update(name for name in node_reads(node) if name and name not in known)
    return found[::-1]


def _session(draft: Draft, nodes: Sequence[Node], outputs: Sequence[str]) -> Session:
    """A session of some nodes, which holds their weights in memory."""
    made = {o for node in nodes for o in node.outputs}
    read = {name for node in nodes for name in node_reads(node)}
    initializers = {
        name: stored(ref, draft.read(ref)) if name in draft.made else ref
        for name, ref in draft.graph.initializers.items()
        if name in read
    }
    inputs = sorted(read - made - set(draft.graph.initializers) - {""})
    declared = {v.name: v for v in draft.graph.inputs}
    graph = draft.graph.with_(
        nodes=tuple(nodes),
        inputs=tuple(declared.get(name, Value(name, "", None)) for name in inputs),
        outputs=tuple(Value(name, "", None) for name in outputs if name in made),
        initializers=initializers,
    )
    return Session(graph, load="ram", optimize=False)


def stored(ref: WeightRef, array: Array) -> WeightRef:
    """The reference with its elements (of `ref.shape`) in memory, those of four bits packed."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if ref.dtype in _SHORT:
        nibbles = np.zeros(-(-flat.size // 2) * 2, np.uint8)
        nibbles[: flat.size] = flat.astype(np.int8).view(np.uint8) & 15
        flat = nibbles[::2] | nibbles[1::2] << 4
    data = flat.tobytes()
    return replace(ref, source=data, offset=0, nbytes=len(data), encoding="raw", transposed=False)
