"""What `inspect` says of the memory that a pass needs beside weights and cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..device import format_size

if TYPE_CHECKING:
    from ..graph import Graph

Facts = dict[str, Any]
NAMED = 3  # of the values whose size cannot be told


def prepared(path: Path) -> Graph:
    """The graph as it runs: rewritten, and a language model's with logits of one position."""
    from .. import passes
    from ..session import decode_constant, load_graph

    graph = passes.optimize(load_graph(path), decode_constant)
    if not passes.find_cache(graph):
        return graph
    for rewrite in (passes.rewrite_unpadded, passes.rewrite_windows):
        graph = rewrite(graph, decode_constant)
    return passes.rewrite_logit_rows(graph)


def activation_facts(graph: Graph, tokens: int) -> Facts:
    """The liveness bound of a pass over `tokens`, as JSON's types; of a graph with open sizes that
    are no tokens, with these sizes taken for `tokens`."""
    from ..liveness import sizes_for_tokens, token_bound
    from ..plan import CONSTANT_BYTES
    from ..session import decode_constant

    constants = {
        name: decode_constant(ref)
        for name, ref in graph.initializers.items()
        if ref.nbytes <= CONSTANT_BYTES and not ref.parts
    }
    bound = token_bound(graph, constants, tokens)
    return {
        "activation_bytes": bound.nbytes,
        "with_working_memory_bytes": bound.working,
        "tokens": tokens if any(v.name == "input_ids" for v in graph.inputs) else None,
        "sizes": sizes_for_tokens(graph, tokens),
        "step": bound.step,
        "operator": bound.op_type,
        "alive": [asdict(memory) for memory in bound.alive],
        "unknown": list(bound.unknown),
    }


def line(facts: Mapping[str, Any]) -> str:
    """The bound in a line: how much, for which sizes, at which step, and what it leaves out."""
    sizes = ", ".join(f"{name}={size}" for name, size in facts["sizes"].items())
    given = f"{facts['tokens']} tokens" if facts["tokens"] else sizes
    text = (
        f"{format_size(facts['activation_bytes'])}{f' at {given}' if given else ''}"
        f" (step {facts['step']}, {facts['operator']}; liveness bound)"
    )
    if facts["unknown"]:
        names = ", ".join(facts["unknown"][:NAMED])
        more = ", ..." if len(facts["unknown"]) > NAMED else ""
        text += f", not counting {len(facts['unknown'])} values of unknown size ({names}{more})"
    return text


def alive_rows(facts: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """What is alive at that step, the largest first: name, type, shape, size, steps."""
    return [
        (
            m["name"], m["dtype"], "x".join(map(str, m["shape"])) or "()",
            format_size(m["nbytes"]), f"{m['first']}-{m['last']}",
        )
        for m in facts["alive"]
    ]  # fmt: skip
