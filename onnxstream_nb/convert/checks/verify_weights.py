"""Whether all weights are finite numbers, read once in pieces, past the page cache.

Of a block encoding the scales are looked at, which decide it: an element is a small integer
times one of them, plus another. Shapes: B blocks, n elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...device import format_size
from ...files import Files, aligned, room
from ...graph import ENCODINGS, Graph, WeightRef
from ...progress import Report
from ...session import decode_constant
from ...weight import SHORT_BITS, numpy_dtype
from .finding import Counter, Finding, Findings, failed, ok
from .verify_files import all_weights

Array = np.ndarray[Any, Any]

READ = 8 << 20  # bytes at a time

EXPONENTS: Mapping[str, tuple[str, int]] = {
    "float16": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80), "float32": ("<u4", 0x7F800000),
    "float64": ("<u8", 0x7FF0000000000000),
}  # fmt: skip
"""The bits of a float that are all set where it is no finite number."""

SCALES: Mapping[str, tuple[int, ...]] = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip
"""Where a block's float16 scales and minima are, in bytes from its begin."""

BOUNDS = frozenset((
    "Add", "Where", "Min", "Max", "Clip", "Expand", "Slice", "Less", "Greater", "Equal", "Pad",
    "LessOrEqual", "GreaterOrEqual", "ConstantOfShape", "Cast", "Unsqueeze", "Concat", "Attention",
    "IsInf", "ReduceMax", "Loop", "If", "Scan", "ScatterND", "Identity",
))  # fmt: skip
"""What takes infinities on purpose: masks that are 0 or -inf, bounds that bound nothing."""


def finite(graph: Graph, report: Report) -> Findings:
    """Whether every float weight is finite, all of each looked at; each that is not is named."""
    weights = [ref for ref in all_weights(graph) if _is_float(ref)]
    total, wrong, masks = sum(ref.nbytes for ref in weights), 0, 0
    counter, users = Counter(report, "reading weights", total), graph.consumers()
    files, memory = Files(), aligned(room(READ))
    try:
        for ref in weights:
            where = _first(ref, files, memory, counter)
            counter.finish(ref.nbytes)
            if where is None:
                continue
            if _is_mask(ref, {node.op_type for node in users.get(ref.name, ())}):
                masks += 1
                continue
            wrong += 1
            yield _not_finite(ref, where)
    finally:
        files.close()
    if not wrong:
        more = f"; {masks} of them masks or bounds with infinities" if masks else ""
        yield ok("weights", f"{len(weights)} of floats, {format_size(total)}, are finite{more}")


def _is_float(ref: WeightRef) -> bool:
    kind = ref.dtype if ref.encoding == "raw" else ref.encoding
    return kind not in SHORT_BITS and (
        kind in EXPONENTS or kind in SCALES or kind == "uint8" != ref.dtype or "float" in kind
        or "complex" in kind
    )  # fmt: skip


def _first(ref: WeightRef, files: Files, memory: Array, counter: Counter) -> int | None:
    """The number of the first element, in storage order, that is no finite number."""
    kind = ref.dtype if ref.encoding == "raw" else ref.encoding
    if kind == "uint8":
        return None if math.isfinite(ref.scale) and ref.nbytes else 0
    block = ENCODINGS[kind] if kind in SCALES else None
    unit = block.nbytes if block else numpy_dtype(kind).itemsize
    elements = 0
    for data in _pieces(ref, files, memory, READ // unit * unit):
        found = not_finite_blocks(data, kind) if block else not_finite(data, kind)
        if found.any():
            return elements + int(found.argmax()) * (block.block if block else 1)
        elements += len(found) * (block.block if block else 1)
        counter.at(elements * ref.nbytes // max(1, math.prod(ref.shape)))
    return None


def _pieces(ref: WeightRef, files: Files, memory: Array, size: int) -> Iterator[Array]:
    """The bytes of a weight, `size` at a time, each until the next are asked for."""
    for start in range(0, ref.nbytes, size):
        stop = min(ref.nbytes, start + size)
        if isinstance(ref.source, bytes):
            yield np.frombuffer(ref.source, np.uint8, stop - start, ref.offset + start)
        else:
            yield files.read_into(memory, ref, start, stop)


def not_finite(data: Array, kind: str) -> Array:
    """Bytes of floats -> (n,) bool, true for NaN and infinities."""
    if kind in EXPONENTS:
        integer, mask = EXPONENTS[kind]
        bits = np.frombuffer(data, integer)
        found: Array = (bits & mask) == mask
        return found
    numbers = data.view(numpy_dtype(kind))
    wide = numbers if kind.startswith("complex") else numbers.astype(np.float32)
    odd: Array = ~np.isfinite(wide)
    return odd


def not_finite_blocks(data: Array, kind: str) -> Array:
    """Bytes of whole blocks -> (B,) bool, true where a scale or a minimum is not finite."""
    blocks = data.reshape(-1, ENCODINGS[kind].nbytes)
    found = np.zeros(len(blocks), bool)
    for at in SCALES[kind]:
        found |= not_finite(np.ascontiguousarray(blocks[:, at : at + 2]).reshape(-1), "float16")
    return found


def _is_mask(ref: WeightRef, users: set[str]) -> bool:
    """Whether a weight with infinities is a mask or a bound: there is nothing but 0 and them, or
    it is one number, and it is only added, selected or compared."""
    if ref.encoding != "raw" or not users <= BOUNDS or ref.nbytes > 8 * READ:
        return False
    values = decode_constant(ref)
    return bool(np.isin(values, (0, np.inf, -np.inf)).all())


def _not_finite(ref: WeightRef, where: int) -> Finding:
    index = [int(i) for i in np.unravel_index(where, ref.stored_shape)]
    if ref.transposed:
        index[-2:] = index[:-3:-1]
    file = str(ref.source) if isinstance(ref.source, Path) else ""
    what = "element" if ref.encoding not in SCALES else f"scale of the {ref.encoding} block at"
    detail = f"the {what} {_index(index)} of {_index(ref.shape)} is not a finite number"
    remedy = "fetch the file again; or the weights overflowed when they were made: make them anew"
    return failed("weights", detail, file=file, tensor=ref.name, remedy=remedy)


def _index(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"
