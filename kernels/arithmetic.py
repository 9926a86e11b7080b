"""Operators of several inputs that treat each element by itself.

Dims: the inputs' shapes are broadcast to one shape (...), as NumPy does.
"""

from functools import reduce

import numpy as np

from ..errors import ShapeError
from ..registry import op
from .buffers import computed, contiguous
from .dtypes import numeric
from .elementwise import swish
from .mapping import LARGE, SMALL, lower_binary, map_broadcast, map_unary
from .pointwise import (
    add_f32, cube_f32, divide_f32, multiply_f32, square_f32, subtract_f32, where_f32,
)  # fmt: skip


def _divide(a, b):
    """Integers are divided towards zero."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.floor_divide(a, b)
    return quotient + ((quotient * b != a) & ((a < 0) ^ (b < 0))).astype(a.dtype)


def checked(function):
    """Let a failed broadcast raise an error that names the shapes."""

    def run(a, b):
        """a (...), b (...) -> (...)."""
        try:
            return function(a, b)
        except ValueError as error:
            raise ShapeError(f"shapes {a.shape} and {b.shape} do not broadcast") from error

    return run


def mapped(kernel, function):
    """An operator of two inputs: the kernel for much float32, the NumPy function otherwise."""

    @numeric
    @checked
    def run(a, b):
        """a (...), b (...) -> (...)."""
        if a.dtype == np.float32 == b.dtype and max(a.size, b.size) >= LARGE:
            out = map_broadcast(kernel, a, b)
            if out is not None:
                return out
        return computed(function, a, b)

    return run


def aligned(function):
    """The form before opset 7: b is broadcast on demand, its axes beginning at `axis` of a."""

    def run(a, b, *, axis=None, broadcast=0, consumed_inputs=()):
        """a (...), b (...) -> (...)."""
        if broadcast and axis is not None:
            axis = axis % a.ndim
            b = b.reshape(b.shape + (1,) * (a.ndim - axis - b.ndim))
        return function(a, b)

    return run


for _name, _kernel, _function in (
    ("Add", add_f32, np.add), ("Sub", subtract_f32, np.subtract),
    ("Mul", multiply_f32, np.multiply), ("Div", divide_f32, _divide),
):  # fmt: skip
    _declare = op(_name, since=7, uses=(_kernel.name,), lower=lower_binary(_kernel))
    _run = _declare(mapped(_kernel, _function))
    op(_name, since=1, uses=(_kernel.name,))(aligned(_run))


def _compared(function):
    def run(a, b):
        """a (...), b (...) -> (...) bool."""
        return np.asarray(computed(function, a, b), bool)

    return checked(run)


for _name, _since, _function in (
    ("And", 7, np.logical_and), ("Or", 7, np.logical_or), ("Xor", 7, np.logical_xor),
    ("Equal", 7, np.equal), ("Greater", 7, np.greater), ("Less", 7, np.less),
    ("GreaterOrEqual", 12, np.greater_equal), ("LessOrEqual", 12, np.less_equal),
):  # fmt: skip
    _run = op(_name, since=_since)(_compared(_function))
    if _since == 7:
        op(_name, since=1)(aligned(_run))

for _name, _since, _function in (
    ("BitwiseAnd", 18, np.bitwise_and), ("BitwiseOr", 18, np.bitwise_or),
    ("BitwiseXor", 18, np.bitwise_xor),
):  # fmt: skip
    op(_name, since=_since)(checked(_function))


def _folded(function):
    def run(*inputs):
        """Each input (...) -> (...)."""
        return reduce(function, inputs)

    return numeric(run)


for _name, _function in (("Max", np.maximum), ("Min", np.minimum), ("Sum", np.add)):
    op(_name, since=6)(_folded(_function))


@op("Mean", since=6)
@numeric
def mean(*inputs):
    """Each input (...) -> (...), their mean."""
    return reduce(np.add, inputs) / len(inputs)


@op("Pow", since=7, uses=("square_f32", "cube_f32"))
@numeric
def power(x, y):
    """x (...), y (...) -> (...) of x's type."""
    if y.size == 1 and y.ndim <= x.ndim and y.flat[0] in (2, 3):
        if x.dtype == np.float32 and x.size >= LARGE:
            return map_unary(square_f32 if y.flat[0] == 2 else cube_f32, x)
        return x * x if y.flat[0] == 2 else x * x * x
    if x.dtype.kind in "iu" and (y.dtype.kind == "f" or np.any(y < 0)):
        return np.power(x.astype(np.float64), y).astype(x.dtype)
    return np.power(x, y).astype(x.dtype)


op("Pow", since=1)(aligned(power))


@op("Mod", since=10)
@numeric
def mod(a, b, *, fmod=0):
    """a (...), b (...) -> (...): the remainder, with the sign of b, or with fmod that of a."""
    return np.fmod(a, b) if fmod else np.mod(a, b)


@op("BitShift", since=11)
def bit_shift(x, y, *, direction):
    """x (...), y (...) unsigned -> (...), shifted LEFT or RIGHT."""
    return np.asarray(np.left_shift(x, y) if direction == "LEFT" else np.right_shift(x, y))


@op("PRelu", since=7)
@numeric
def prelu(x, slope):
    """x (...), slope broadcast to x -> (...), below 0 slope x."""
    return np.where(x < 0, slope * x, x)


@op("SwiGLU", since=28)
@numeric
def swiglu(a, b, *, alpha=1.0):
    """a (...), b (...) -> (...), a sigmoid(alpha a) b."""
    return swish(a, alpha=alpha) * b


@op("Where", since=9, uses=("where_f32",))
def where(condition, x, y):
    """condition (...) bool, x (...), y (...) -> (...): x where it holds, else y."""
    if x.dtype == np.float32 == y.dtype and max(condition.size, x.size, y.size) >= SMALL:
        shape = np.broadcast_shapes(condition.shape, x.shape, y.shape)
        condition = contiguous(np.broadcast_to(condition, shape))
        out = map_broadcast(where_f32, x, y, condition)
        if out is not None:
            return out
    return np.asarray(np.where(condition, x, y))
