"""What products in bfloat16 may be off, after ml_dtypes' rounding and float64 sums.

Dims: x (M, K) times w (K, N) is y (M, N).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

SMALLEST = 2.0**-126
"""Of the normal numbers: conversions and products take what is smaller for zero."""


def rounded(x: Array) -> Array:
    with np.errstate(over="ignore"):
        result: Array = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    return result


def slack(x: Array, w: Array) -> Array:
    """What sums in float32 may be off, (M, N).

    A product of two bfloat16 is exact, each of the K sums rounds by 2 ** -24, in whatever order
    (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1); a factor, a product or a sum
    below the normal numbers is taken for zero.
    """
    x, w, steps = np.abs(x), np.abs(w), x.shape[1] + 2
    flushed = SMALLEST * (x.sum(1, keepdims=True) + w.sum(0, keepdims=True) + 2 * steps)
    return steps * 2.0**-24 / (1 - steps * 2.0**-24) * (x @ w) + flushed


def assert_rounded(y: Array, x: Array, w: Array) -> None:
    x, w = rounded(x), rounded(w)
    error, bound = np.abs(y - x @ w), slack(x, w)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


def assert_split(y: Array, x: Array, w: Array) -> None:
    """x = C + D + c, w = A + B + a: B D is left out, below 2 ** -16 of x w, and a x and c w, each
    below 2 ** -17. Three sums instead of one, whose terms together are the product's, almost."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    error = np.abs(y - x @ w)
    bound = 2.0**-15 * (np.abs(x) @ np.abs(w)) + 3.1 * slack(x, w)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"
