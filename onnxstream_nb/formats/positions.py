"""The parts of a decoder's graph that depend on positions alone: rotary angles and masks.

Dims: T tokens, P past tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from .notation import Notation
from .rope import Rotary

FLOAT = 1  # onnx.TensorProto.FLOAT, the target of Cast
Angles = tuple[str, str]


def rotary_angles(graph: Notation, rotaries: Iterable[Rotary]) -> dict[Rotary, Angles]:
    """cos and sin of all positions' angles, (1, T, rotated size / 2), for each kind of rotation."""
    positions = graph.node("Cast", "rotary.positions", "position_ids", to=FLOAT)
    axes = graph.constant("rotary.axes", (-1,))
    column = graph.node("Unsqueeze", "rotary.column", positions, axes)
    kinds = enumerate(dict.fromkeys(rotaries))
    return {r: _angles(graph, f"rotary_{i}" if i else "rotary", column, r) for i, r in kinds}


def _angles(graph: Notation, name: str, column: str, rotary: Rotary) -> Angles:
    frequencies = graph.constant(f"{name}.inv_freq", rotary.frequencies)
    angles = graph.node("Mul", f"{name}.angles", column, frequencies)
    cos = graph.node("Cos", f"{name}.cos", angles)
    sin = graph.node("Sin", f"{name}.sin", angles)
    if rotary.attention_factor == 1.0:
        return cos, sin
    factor = graph.constant(f"{name}.attention_factor", (rotary.attention_factor,), scalar=True)
    return (
        graph.node("Mul", f"{name}.cos_scaled", cos, factor),
        graph.node("Mul", f"{name}.sin_scaled", sin, factor),
    )


def masks(graph: Notation, sizes: Iterable[int | None]) -> dict[int | None, str]:
    """Window -> its boolean mask (T, P + T), True where attended; "" where causal suffices."""
    windows = dict.fromkeys(w for w in sizes if w is not None)
    result: dict[int | None, str] = {None: ""}
    if not windows:
        return result
    past = graph.node("Shape", "mask.past_shape", "past_key_values.0.key", start=2, end=3)
    tokens = graph.node("Shape", "mask.tokens_shape", "input_ids", start=1, end=2)
    past = graph.node("Squeeze", "mask.past", past)
    total = graph.node("Add", "mask.total", past, graph.node("Squeeze", "mask.tokens", tokens))
    zero = graph.constant("mask.zero", (0,), scalar=True)
    one = graph.constant("mask.one", (1,), scalar=True)
    queries = graph.node("Range", "mask.queries", past, total, one)
    keys = graph.node("Range", "mask.keys", zero, total, one)
    column = graph.node("Unsqueeze", "mask.column", queries, graph.constant("mask.axes", (1,)))
    distance = graph.node("Sub", "mask.distance", column, keys)
    causal = graph.node("GreaterOrEqual", "mask.causal", distance, zero)
    for window in windows:
        size = graph.constant(f"mask.window_{window}", (window,), scalar=True)
        near = graph.node("Less", f"mask.near_{window}", distance, size)
        result[window] = graph.node("And", f"mask.sliding_{window}", causal, near)
    return result
