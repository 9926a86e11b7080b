"""Quantisation with feedback: the error of each column is made good by the columns behind it.

After Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv 2210.17323): the Hessian of a layer's squared output error is H = X' X over its
calibration inputs; columns are rounded one after the other, each one's error taken out of the rest
by the upper Cholesky factor of the inverse of H. Scales are fitted block by block as it goes, to
what the weights are by then; columns stay in their order.

Dims: a matrix is (N, K), inputs x (T, K), H (K, K).
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from ...session import internal
from ...weight import Weight
from ..draft import placeholder
from .calibration import stored
from .integer_forms import Rounded, checked, values
from .layers import Calibration, how
from .matrices import read_rows

Array = np.ndarray[Any, Any]

DAMPING = 0.01  # of the mean of H's diagonal, added to it
SMALLEST_HALVED = 96
MOST_DOUBLE = 8192  # K up to which H is inverted in float64


def solve(calibration: Calibration, search: bool) -> dict[str, Callable[[], Rounded]]:
    """The rounded matrix of every layer, kept in a file without a name until it is written."""
    found, file = {}, _Kept()
    for group in calibration:
        hessian = hessian_of(calibration.inputs(group))
        importance = np.maximum(hessian.diagonal(), 1e-30)
        factor = factor_of(hessian)
        del hessian
        for layer in group.layers:
            rows = read_rows(calibration.draft, layer.matrix)
            arguments = how(rows, layer.grid, search)
            result = internal("RoundWithFeedback")(rows, factor, importance, *arguments)
            rounded = Rounded(result.integers, result.scales, result.zeros)
            calibration.put(layer, values(checked(layer.name, rounded), arguments[0]))
            found[layer.name] = file.keep(rounded, layer.grid.dtype)
    return found


def hessian_of(inputs: Iterable[Array]) -> Array:
    """X' X (K, K) over all inputs, by their number."""
    total, count = np.zeros((1, 1), np.float32), 0
    for x in inputs:
        total = total + x.T @ x
        count += len(x)
    return cast(Array, total / np.float32(count))


def factor_of(hessian: Array) -> Array:
    """The upper Cholesky factor (K, K) float32 of the damped Hessian's inverse.

    A channel that never had an input has no error to make good: it stands alone.
    """
    damped: Array = hessian.astype(np.float64 if len(hessian) <= MOST_DOUBLE else np.float32)
    diagonal = damped.reshape(-1)[:: len(damped) + 1]  # a view
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    damping = DAMPING
    while True:
        diagonal += damping * mean
        try:
            # Backwards H = L L', so that forwards its inverse is U' U with U that of L.
            lower: Array = np.linalg.cholesky(cast(Any, damped[::-1, ::-1]))
            return np.ascontiguousarray(inverse_of_lower(lower)[::-1, ::-1], np.float32)
        except np.linalg.LinAlgError:  # not positive in this arithmetic: more damping helps
            damping *= 10


def inverse_of_lower(matrix: Array) -> Array:
    """The inverse of a lower triangular matrix (K, K), by halves: mostly products."""
    size = len(matrix)
    if size <= SMALLEST_HALVED:
        return np.tril(np.linalg.inv(cast(Any, matrix)))
    half = size // 2
    result = np.zeros_like(matrix)
    result[:half, :half] = inverse_of_lower(matrix[:half, :half])
    result[half:, half:] = inverse_of_lower(matrix[half:, half:])
    result[half:, :half] = -result[half:, half:] @ (matrix[half:, :half] @ result[:half, :half])
    return result


class _Kept:
    """Arrays in a temporary file, those of four bits packed."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the last reader
        weakref.finalize(self, self._file.close)

    def keep(self, rounded: Rounded, dtype: str) -> Callable[[], Rounded]:
        """Write a rounded matrix; the result reads it."""
        integers = self._write(rounded.integers, dtype)
        scales = self._write(rounded.scales, "float32")
        zeros = None if rounded.zeros is None else self._write(rounded.zeros, dtype)
        return lambda: Rounded(integers(), scales(), None if zeros is None else zeros())

    def _write(self, array: Array, dtype: str) -> Callable[[], Array]:
        ref = stored(placeholder("", dtype, array.shape), array)
        assert isinstance(ref.source, bytes)
        start, size, kind = self._file.seek(0, 2), len(ref.source), array.dtype
        self._file.write(ref.source)
        empty = replace(ref, source=b"")

        def read() -> Array:
            self._file.seek(start)
            flat = np.frombuffer(self._file.read(size), np.uint8)
            return Weight(empty, flat).stored().astype(kind, copy=False)

        return read
