"""The ranges of activations: seen on calibration data, kept and exchanged as range_data.txt.

The file is OnnxStream's: lines `op_name,min,max` in the order of the names, ended by CR LF, for the
floats that an operator gives. Its reader takes any number that C's strtof does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ModelError, UsageError
from ...graph import Graph, Node

Array = np.ndarray[Any, Any]

ONNXSTREAM_PERCENT = 0.1
"""What OnnxStream clips at each end."""

_CLOSE = 1e-4  # relative error up to which six decimals, as C++ writes them, say a number
_PATTERNS = 1 << 16


class Range(NamedTuple):
    """The least and the greatest number that is told apart."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        """The range that holds both."""
        return Range(min(self.low, other.low), max(self.high, other.high))


class Seen:
    """What was seen of one value: its least and greatest finite elements, and how many there are
    of every size.

    Sizes are told apart by the upper 16 bits of a float32 (sign, exponent, 7 bits), so that the
    memory is bounded, whatever the numbers are: a percentile is off by less than 0.8 %, outwards.
    """

    def __init__(self, counted: bool) -> None:
        self.low, self.high = math.inf, -math.inf
        self.ignored = 0
        self._counts = np.zeros(_PATTERNS if counted else 0, np.int64)

    def add(self, values: Array) -> None:
        """Count the elements of an array of floats; infinities and NaN are only told."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        finite = flat[np.isfinite(flat)]
        self.ignored += flat.size - finite.size
        if not finite.size:
            return
        self.low, self.high = min(self.low, finite.min()), max(self.high, finite.max())
        if self._counts.size:
            upper = finite.view(np.uint32) >> 16
            self._counts += np.bincount(upper, minlength=_PATTERNS)

    def range(self, percent: float = 0.0) -> Range | None:
        """What is left when `percent` % of the elements are clipped at each end; None when nothing
        finite was seen. The elements must have been counted for a percentile."""
        if self.low > self.high:
            return None
        whole = Range(float(self.low), float(self.high))
        if not percent:
            return whole
        counts = np.concatenate([self._counts[: _PATTERNS // 2 - 1 : -1], self._counts[: 1 << 15]])
        total = np.cumsum(counts)
        clipped = int(total[-1] * (percent / 100))
        low = int(np.searchsorted(total, clipped, "right"))
        high = int(np.searchsorted(total, total[-1] - clipped, "left"))
        edges = Range(_edge(low, upper=False), _edge(high, upper=True))
        return Range(max(edges.low, whole.low), min(edges.high, whole.high))


def _edge(place: int, upper: bool) -> float:
    """An end of the numbers at a place in the ascending order of upper halves."""
    half = 1 << 15
    pattern = _PATTERNS - 1 - place if place < half else place - half
    larger = upper if place >= half else not upper
    bits = pattern << 16 | (0xFFFF if larger else 0)
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def names_of(graph: Graph) -> dict[str, str]:
    """Value name -> the name under which range_data.txt knows it: of the operator that makes it,
    or of its first output where it has none; an input of the graph has its own."""
    names = {value.name: value.name for value in graph.inputs}
    for node in graph.nodes:
        names.update((output, _operator_name(node)) for output in node.outputs if output)
    return names


def _operator_name(node: Node) -> str:
    return node.name or node.outputs[0]


def read_ranges(path: str | Path) -> dict[str, Range]:
    """Operator name -> the range of what it gives, from a range_data.txt.

    Raises UsageError when there is no such file, ModelError naming the line that is malformed.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise UsageError(f"{path}: cannot read range data ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise ModelError(f"{path}: not UTF-8 text, so no range data ({e})") from e
    lines = text.replace("\r", "\n").split("\n")
    ranges = dict(_parse(path, number, line) for number, line in enumerate(lines, 1) if line)
    if not ranges:
        raise ModelError(f"{path}: empty; calibrate again")
    return ranges


def _parse(path: Path, number: int, line: str) -> tuple[str, Range]:
    name, *numbers = line.split(",")
    try:
        low, high = map(float, numbers)
    except ValueError as e:
        raise ModelError(f"{path}:{number}: {line!r} is not of the form NAME,MIN,MAX") from e
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ModelError(f"{path}:{number}: {low} to {high} is no range")
    return name, Range(low, high)


def format_ranges(ranges: Mapping[str, Range]) -> bytes:
    """The contents of a range_data.txt, in the order of C++'s std::map.

    Raises UsageError for an operator whose name the form cannot hold.
    """
    for name in ranges:
        if "," in name or "\r" in name or "\n" in name:
            raise UsageError(
                f"operator {name!r}: range_data.txt has no way to write a comma or a line's end in "
                "a name; rename the operator in the model"
            )
    ordered = sorted(ranges.items(), key=lambda item: item[0].encode())
    lines = (f"{name},{_number(r.low)},{_number(r.high)}\r\n" for name, r in ordered)
    return "".join(lines).encode()


def _number(value: float) -> str:
    """As std::to_string writes it; with an exponent where six decimals would say another number."""
    text = f"{value:.6f}"
    return text if abs(float(text) - value) <= _CLOSE * abs(value) else f"{value:.9g}"


def by_operator(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges of values as range_data.txt has them: of all that an operator of a name gives."""
    names, result = names_of(graph), dict[str, Range]()
    for value, found in ranges.items():
        name = names[value]
        result[name] = result[name].union(found) if name in result else found
    return result


def by_value(
    graph: Graph, ranges: Mapping[str, Range], values: Iterable[str], source: str
) -> dict[str, Range]:
    """The ranges of `values` among those of operators. Raises UsageError naming those missing."""
    names = names_of(graph)
    wanted = list(values)
    missing = [value for value in wanted if names[value] not in ranges]
    if missing:
        listed = ", ".join(f"{names[value]!r}" for value in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UsageError(
            f"{source}: no range for {listed}{more}; range data of another model, or made before "
            "the graph was changed: calibrate again"
        )
    return {value: ranges[names[value]] for value in wanted}
