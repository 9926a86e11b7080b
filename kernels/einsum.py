"""Einsum.

Dims: named by the letters of the equation.
"""

import numpy as np

from ..registry import op
from .dtypes import numeric


@op("Einsum", since=12)
@numeric
def einsum(*inputs, equation):
    """Each (...) as the equation says -> (...): sums over the letters that the result lacks."""
    return np.einsum(equation.replace(" ", ""), *inputs, optimize=len(inputs) > 2)
