"""Operators that make tensors out of attributes and sizes.

Dims: N elements of a range; any shape (...).
"""

import math

import numpy as np

from ..errors import UnsupportedError
from ..registry import op
from .dtypes import is_half, numpy_dtype
from .shape import ints


@op("Constant", since=1)
def constant(
    *, value=None, value_float=None, value_floats=None, value_int=None, value_ints=None,
    value_string=None, value_strings=None, sparse_value=None,
):  # fmt: skip
    """-> the one attribute that is given: a tensor (...), a scalar () or a list (N,)."""
    for given, dtype in (
        (value_float, np.float32), (value_floats, np.float32), (value_int, np.int64),
        (value_ints, np.int64), (value_string, object), (value_strings, object),
    ):  # fmt: skip
        if given is not None:
            return np.array(given, dtype)
    if value is None:
        raise UnsupportedError("Constant: sparse tensors are not supported")
    return value


@op("ConstantOfShape", since=9)
def constant_of_shape(shape, *, value=None):
    """shape (R,) -> shape, filled with the only element of `value`."""
    return np.full(ints(shape), 0, np.float32) if value is None else np.full(
        ints(shape), value.flat[0], value.dtype)  # fmt: skip


@op("Range", since=11)
def range_(start, limit, delta, *, stash_type=1):
    """All () -> (N,): start, start + delta, ... before limit; fp16 and bf16 computed in fp32."""
    dtype = start.dtype
    first, last, step = (v.reshape(()).astype(np.float32 if is_half(dtype) else dtype)
                         for v in (start, limit, delta))  # fmt: skip
    count = max(0, math.ceil((last - first) / step))
    return (first + np.arange(count).astype(first.dtype) * step).astype(dtype)


@op("EyeLike", since=9)
def eye_like(x, *, dtype=None, k=0):
    """x (M, N) -> (M, N), ones on the k-th diagonal."""
    return np.eye(*x.shape, k, dtype=x.dtype if dtype is None else numpy_dtype(dtype))


@op("OneHot", since=9)
def one_hot(indices, depth, values, *, axis=-1):
    """indices (...), depth (), values (off, on) -> (..., depth, ...), the new axis at `axis`."""
    classes = np.arange(int(depth.flat[0]))
    wanted = np.expand_dims(indices, axis).astype(np.int64)
    wanted = np.where(wanted < 0, wanted + classes.size, wanted)
    shape = [1] * wanted.ndim
    shape[axis] = classes.size
    return np.where(wanted == classes.reshape(shape), values[1], values[0]).astype(values.dtype)
