"""Conversions between element types.

Dims: any shape (...), which the result has too.
"""

import numpy as np

from ..registry import op
from .angles import int64_to_float
from .buffers import contiguous
from .dtypes import numpy_dtype
from .mapping import SMALL, map_unary, unary_rows
from .pointwise import float_to_half, half_to_float


def _to_text(x):
    """Strings as the standard prints them: 9 digits of a float, and no point in an integer."""
    if x.dtype.kind in "fV":
        text = [f"{v:.9g}" if x.dtype == np.float64 else str(np.float32(v)) for v in x.flat]
    else:
        text = [str(v) for v in x.flat]
    return np.array(text, object).reshape(x.shape)


def _is_eight_bit(dtype):
    return dtype.name.startswith("float8")


def _powers_of_two(x, round_mode):
    """Float8e8m0 holds an exponent alone: x (...) float32 -> (...) powers of two."""
    mantissa, exponent = np.frexp(np.abs(x))
    below = {"up": mantissa <= 0.5, "nearest": mantissa < 0.75, "down": mantissa < 1}[round_mode]
    exponent = np.where(mantissa == 0, -127, np.maximum(exponent - below, -127))
    return np.where(np.isfinite(x), np.copysign(np.ldexp(np.float32(1), exponent), x), np.nan)


def convert(x, dtype, saturate=1, round_mode="up"):
    """x (...) -> (...) of another type; float8 stays within its range where `saturate` says so."""
    if x.dtype == dtype:
        return x
    if {x.dtype, dtype} == {np.dtype(np.float16), np.dtype(np.float32)} and x.size >= SMALL:
        return map_unary(float_to_half if dtype == np.float16 else half_to_float, x, dtype=dtype)
    if dtype.kind == "O":
        return _to_text(x)
    if x.dtype.kind == "O":
        return np.array([float(v) for v in x.flat]).reshape(x.shape).astype(dtype)
    with np.errstate(all="ignore"):
        if saturate and _is_eight_bit(dtype):
            import ml_dtypes

            limit = float(ml_dtypes.finfo(dtype).max)
            x = np.clip(x.astype(np.float32), -limit, limit)
        if dtype.name == "float8_e8m0fnu":
            x = _powers_of_two(x.astype(np.float32), round_mode)
        return contiguous(x, dtype)


USES = ("half_to_float", "float_to_half", "int64_to_float")


def lower_cast(x, *, to, saturate=1, round_mode="up"):
    """x (...), contiguous int64, to float32: positions."""
    is_known = isinstance(x, np.ndarray) and x.dtype == np.int64 and x.flags.c_contiguous
    if not is_known or numpy_dtype(to) != np.float32:
        return None
    return unary_rows(int64_to_float, x)


@op("Cast", since=6, uses=USES, lower=lower_cast)
def cast_6(x, *, to):
    """x (...) -> (...) of the type with that number."""
    return convert(x, numpy_dtype(to))


@op("Cast", since=19, uses=USES, lower=lower_cast)
def cast(x, *, to, saturate=1, round_mode="up"):
    """x (...) -> (...) of the type with that number."""
    return convert(x, numpy_dtype(to), saturate, round_mode)


@op("CastLike", since=15, uses=USES)
def cast_like(x, target, *, saturate=1, round_mode="up"):
    """x (...), target (any shape) -> (...) of the target's type."""
    return convert(x, target.dtype, saturate, round_mode)


@op("BitCast", since=26)
def bit_cast(x, *, to):
    """x (...) -> (...): the same bits taken for another type of the same size."""
    return np.ascontiguousarray(x).view(numpy_dtype(to)).reshape(x.shape)
