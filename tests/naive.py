"""Operators in plain Python, one element at a time: the oracle of the kernels' tests.

Everything is computed in double precision; arrays go in and come out as (nested) lists or, where
shapes matter, as numpy arrays that are only indexed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Floats = Sequence[float]


def exp(x: float) -> float:
    return math.inf if x > 710 else math.exp(x)


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def swish(x: float, alpha: float = 1.0) -> float:
    return x * sigmoid(alpha * x)


def gelu(x: float) -> float:
    return x * math.erfc(-x / math.sqrt(2)) / 2


def gelu_tanh(x: float) -> float:
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def softmax(row: Floats) -> list[float]:
    largest = max(row)
    exponentials = [exp(x - largest) for x in row]
    total = math.fsum(exponentials)
    return [e / total for e in exponentials]


def log_softmax(row: Floats) -> list[float]:
    largest = max(row)
    total = math.log(math.fsum(exp(x - largest) for x in row))
    return [x - largest - total for x in row]


def broadcast(function: Callable[..., Any], *operands: np.ndarray[Any, Any]) -> list[Any]:
    """The function of every element of the broadcast, in C order."""
    shape = np.broadcast_shapes(*(o.shape for o in operands))

    def pick(o: np.ndarray[Any, Any], index: tuple[int, ...]) -> Any:
        own = index[len(index) - o.ndim :]
        return o[tuple(i if n > 1 else 0 for i, n in zip(own, o.shape, strict=True))].item()

    return [function(*(pick(o, index) for o in operands)) for index in np.ndindex(shape)]


def top_k(row: Floats, k: int, largest: bool) -> tuple[list[float], list[int]]:
    """The k largest (or smallest) and their indices; of equals the first."""
    order = sorted(range(len(row)), key=lambda i: (-row[i] if largest else row[i], i))[:k]
    return [row[i] for i in order], order


def slice_indices(size: int, start: int, end: int, step: int) -> list[int]:
    """The indices that Slice takes along an axis, as the standard words it."""
    start = start + size if start < 0 else start
    end = end + size if end < 0 else end
    if step > 0:
        start, end = min(max(start, 0), size), min(max(end, 0), size)
    else:
        start, end = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    return list(range(start, end, step))
