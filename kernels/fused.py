"""Operators that a GPU computes together (passes/fused.py), by the CPU.

Dims: rows of N elements (..., N).
"""

from ..registry import declared, op
from . import arithmetic  # noqa: F401  it declares the two
from .elementwise import swish
from .matmul import matmul
from .norm import rms_normalization

ADD, MULTIPLY = (declared(name)[7].function for name in ("Add", "Mul"))


@op("AddRMSNormalization", domain="onnxstream_nb")
def add_rms_normalization(a, b, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """a and b (..., N), scale (N,) -> a + b, and its RMSNormalization."""
    total = ADD(a, b)
    return total, rms_normalization(total, scale, axis=axis, epsilon=epsilon, stash_type=stash_type)


@op("SwishMul", domain="onnxstream_nb")
def swish_mul(x, y):
    """x (..., N), y (..., N) -> x sigmoid(x) y."""
    return MULTIPLY(swish(x), y)


@op("MatMuls", domain="onnxstream_nb", native=("b", "c", "d"), packs=("b", "c", "d"))
def matmuls(a, b, c=None, d=None):
    """a (..., M, K), matrices (K, N) -> the product with each, (..., M, N)."""
    return tuple(matmul(a, matrix) for matrix in (b, c, d) if matrix is not None)
