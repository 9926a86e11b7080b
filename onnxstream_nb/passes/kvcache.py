"""Finding the inputs and outputs of a graph that are a key/value cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from onnxstream_nb.graph import Graph, Node, Value

Kind = Literal["key", "value"]

_NUMBERED = re.compile(r"pkv(\d+)")
_NAMED = re.compile(r"(?:past_key_values|past)[._](\d+)[._](key|value)")


@dataclass(frozen=True, slots=True)
class CachePair:
    """An output that is fed back as an input: (batch, heads, sequence, channels), it grows."""

    past_input: str
    present_output: str
    kind: Kind


def find_cache(graph: Graph) -> list[CachePair]:
    """The cache of a graph in the order of its inputs, empty when it has none.

    A pair is known by what the graph computes (an Attention's past and present, or a Concat along
    the sequence), else by its names (`pkvN`/`opkvN`, `past_key_values.N.key`/`present.N.key`).
    """
    inputs = {i.name: i for i in graph.inputs}
    outputs = {o.name: o for o in graph.outputs}
    found: dict[str, CachePair] = {}
    taken: set[str] = set()
    for pair in (*_computed(graph), *_named(inputs, outputs)):
        known = pair.past_input in inputs and pair.present_output in outputs
        if known and pair.past_input not in found and pair.present_output not in taken:
            found[pair.past_input] = pair
            taken.add(pair.present_output)
    return [found[name] for name in inputs if name in found]


def _computed(graph: Graph) -> Iterator[CachePair]:
    users = graph.consumers()
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op_type == "Attention":
            pairs = zip(node.inputs[4:6], node.outputs[1:3], ("key", "value"), strict=False)
            yield from (CachePair(i, o, _kind(i, k)) for i, o, k in pairs if i and o)
        elif node.op_type == "Concat" and len(node.inputs) == 2 and _is_sequence(graph, node):
            kind = _kind(node.inputs[0], _used_as(node.outputs[0], users))
            yield CachePair(node.inputs[0], node.outputs[0], kind)


def _is_sequence(graph: Graph, node: Node) -> bool:
    """Whether the Concat grows a four-dimensional input along its third axis."""
    past = next((i for i in graph.inputs if i.name == node.inputs[0]), None)
    if past is None or past.shape is None or len(past.shape) != 4:
        return False
    return node.attributes["axis"] in (2, -2)


def _kind(name: str, computed: str) -> Kind:
    """What the name says, else what the graph does with it."""
    if match := _NUMBERED.fullmatch(name):
        return "value" if int(match[1]) % 2 else "key"
    if match := _NAMED.fullmatch(name):
        return "value" if match[2] == "value" else "key"
    return "value" if computed == "value" else "key"


def _used_as(value: str, users: dict[str, list[Node]]) -> Kind:
    """Keys are transposed before their product, values are not."""
    reached = [value]
    for name in reached:
        for node in users.get(name, ()):
            if node.op_type == "MatMul" and node.inputs[1] == name:
                return "value"
            if node.op_type == "Attention":
                return "value" if node.inputs[2] == name else "key"
            if node.op_type in ("Unsqueeze", "Expand", "Reshape", "Mul") and node.inputs[0] == name:
                reached.append(node.outputs[0])
    return "key"


def _named(inputs: dict[str, Value], outputs: dict[str, Value]) -> Iterator[CachePair]:
    for name in inputs:
        if match := _NUMBERED.fullmatch(name):
            yield CachePair(name, f"o{name}", _kind(name, ""))
        elif match := _NAMED.fullmatch(name):
            spelled = name.replace("past_key_values", "present", 1)
            for present in (spelled, name.replace("past", "present", 1)):
                if present in outputs:
                    yield CachePair(name, present, "key" if match[2] == "key" else "value")
