"""Operators of one input that treat each element by itself, activation functions included.

Dims: any shape (...), which the result has too.
"""

import math

import numpy as np

from ..registry import op
from .angles import cosine_f32, sine_f32
from .buffers import computed
from .dtypes import numeric
from .lowered import plain
from .mapping import LARGE, lower_unary, map_unary, unary_rows
from .pointwise import (
    erf_f32, exponential_f32, gelu_f32, gelu_tanh_f32, negative_f32, reciprocal_f32, relu_f32,
    sigmoid_f32, square_root_f32, swish_f32, tanh_f32,
)  # fmt: skip

erf64 = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _relu(x):
    return np.maximum(x, x.dtype.type(0))


def mapped(kernel, function, much):
    """An operator of one input: the kernel for `much` float32, the NumPy function otherwise.

    `much` is 0 where the two round differently.
    """

    @numeric
    def run(x):
        """x (...) -> (...)."""
        if x.dtype == np.float32 and x.size >= much:
            return map_unary(kernel, x)
        return computed(function, x)

    return run


for _name, _kernel, _function, _much in (
    ("Exp", exponential_f32, np.exp, 0), ("Neg", negative_f32, np.negative, LARGE),
    ("Reciprocal", reciprocal_f32, np.reciprocal, LARGE), ("Relu", relu_f32, _relu, LARGE),
    ("Sigmoid", sigmoid_f32, _sigmoid, 0), ("Sqrt", square_root_f32, np.sqrt, LARGE),
    ("Tanh", tanh_f32, np.tanh, 0),
):  # fmt: skip
    op(_name, since=6, uses=(_kernel.name,), lower=lower_unary(_kernel))(
        mapped(_kernel, _function, _much)
    )

for _name, _kernel, _function in (("Cos", cosine_f32, np.cos), ("Sin", sine_f32, np.sin)):
    op(_name, since=7, uses=(_kernel.name,), lower=lower_unary(_kernel))(
        mapped(_kernel, _function, 0)
    )


def _single(function):
    def run(x):
        """x (...) -> (...)."""
        return computed(function, x)

    return run


for _name, _since, _function in (
    ("Abs", 6, np.abs), ("Acos", 7, np.arccos), ("Acosh", 9, np.arccosh), ("Asin", 7, np.arcsin),
    ("Asinh", 9, np.arcsinh), ("Atan", 7, np.arctan), ("Atanh", 9, np.arctanh),
    ("Ceil", 6, np.ceil), ("Cosh", 9, np.cosh), ("Floor", 6, np.floor),
    ("Log", 6, np.log), ("Round", 11, np.rint), ("Sign", 9, np.sign),
    ("Sinh", 9, np.sinh), ("Softplus", 1, lambda x: np.logaddexp(x, x.dtype.type(0))),
    ("Softsign", 1, lambda x: x / (1 + np.abs(x))), ("Tan", 7, np.tan),
    ("HardSwish", 14, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("Mish", 18, lambda x: x * np.tanh(np.logaddexp(x, x.dtype.type(0)))),
):  # fmt: skip
    op(_name, since=_since)(numeric(_single(_function)))

for _name, _since, _function in (
    ("BitwiseNot", 18, np.invert), ("IsNaN", 9, np.isnan), ("Not", 1, np.logical_not),
):  # fmt: skip
    op(_name, since=_since)(_single(_function))


@op("Identity", since=1, view=True)
def identity(x):
    """x (...) -> x itself."""
    return x


@op("Erf", since=9, uses=("erf_f32",), lower=lower_unary(erf_f32))
@numeric
def erf(x):
    """x (...) -> (...), the error function."""
    return map_unary(erf_f32, x) if x.dtype == np.float32 else erf64(x).astype(x.dtype)


def lower_gelu(x, *, approximate="none"):
    """x (...), contiguous float32."""
    kernel = gelu_f32 if approximate == "none" else gelu_tanh_f32
    return unary_rows(kernel, x) if plain(x) else None


@op("Gelu", since=20, uses=("gelu_f32", "gelu_tanh_f32"), lower=lower_gelu)
@numeric
def gelu(x, *, approximate="none"):
    """x (...) -> (...), x times the normal distribution's integral up to x."""
    if x.dtype == np.float32:
        return map_unary(gelu_f32 if approximate == "none" else gelu_tanh_f32, x)
    if approximate == "none":
        return x * (1 + erf64(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def lower_swish(x, *, alpha=1.0):
    """x (...), contiguous float32."""
    return unary_rows(swish_f32, x, alpha) if plain(x) else None


@op("Swish", since=24, uses=("swish_f32",), lower=lower_swish)
@numeric
def swish(x, *, alpha=1.0):
    """x (...) -> (...), x sigmoid(alpha x)."""
    if x.dtype == np.float32:
        return map_unary(swish_f32, x, alpha)
    return x * _sigmoid(alpha * x)


@op("IsInf", since=10)
def is_inf(x, *, detect_negative=1, detect_positive=1):
    """x (...) -> (...) bool."""
    negative = np.isinf(x) & (x < 0) & bool(detect_negative)
    return np.asarray(negative | np.isinf(x) & (x > 0) & bool(detect_positive))


@op("Elu", since=6)
@numeric
def elu(x, *, alpha=1.0):
    """x (...) -> (...), below 0 alpha (e^x - 1)."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@op("Celu", since=12)
@numeric
def celu(x, *, alpha=1.0):
    """x (...) -> (...), below 0 alpha (e^(x / alpha) - 1)."""
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(np.minimum(x, 0) / alpha), 0)


@op("Selu", since=6)
@numeric
def selu(x, *, alpha=1.6732631921768188, gamma=1.0507010221481323):
    """x (...) -> (...), gamma times the Elu."""
    return gamma * elu(x, alpha=alpha)


@op("LeakyRelu", since=6)
@numeric
def leaky_relu(x, *, alpha=0.009999999776482582):
    """x (...) -> (...), below 0 alpha x."""
    return np.where(x < 0, alpha * x, x)


@op("ThresholdedRelu", since=10)
@numeric
def thresholded_relu(x, *, alpha=1.0):
    """x (...) -> (...), 0 where x <= alpha."""
    return np.where(x > alpha, x, x.dtype.type(0))


@op("HardSigmoid", since=6)
@numeric
def hard_sigmoid(x, *, alpha=0.20000000298023224, beta=0.5):
    """x (...) -> (...), alpha x + beta within 0 and 1."""
    return np.clip(alpha * x + beta, 0, 1)


@op("Shrink", since=9)
@numeric
def shrink(x, *, bias=0.0, lambd=0.5):
    """x (...) -> (...), moved towards 0 by bias, and 0 between -lambd and lambd."""
    y = np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0))
    return y.astype(x.dtype)


@op("Clip", since=6)
@numeric
def clip_6(x, *, min=-3.4028234663852886e38, max=3.4028234663852886e38):
    """x (...) -> (...), no less than min and no more than max."""
    return np.minimum(np.maximum(x, x.dtype.type(min)), x.dtype.type(max))


@op("Clip", since=11)
@numeric
def clip(x, min=None, max=None):
    """x (...), min (), max () -> (...)."""
    x = x if min is None else np.maximum(x, min)
    return x if max is None else np.minimum(x, max)
