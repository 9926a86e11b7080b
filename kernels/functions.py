"""Elementwise functions as compile-time tokens: one kernel body, compiled once for each function.

Dims: a vector `x` has shape (16,) of float32; so has `a`, a second operand or a parameter.
"""

from .encoding import Token
from .jit import inline
from .machine_code import overload_inline
from .simd import JIT
from .vector import add, div, exp, fma, maximum, minimum, mul, splat, sqrt, sub, zero


class Function(Token):
    """A function of two vectors; a kernel body that receives it has its code in the inner loop."""

    def __init__(self, name, function):
        self.name, self.function = name, function


def apply(token, x, a):
    """The token's function of x and a."""
    return token.function(x, a)


if JIT:

    @overload_inline(apply)
    def _apply(token, x, a):
        function = token.token.function
        return lambda token, x, a: function(x, a)


@inline
def first(x, a):
    """x itself."""
    return x


@inline
def negative(x, a):
    return mul(x, splat(-1.0))


@inline
def reciprocal(x, a):
    return div(splat(1.0), x)


@inline
def square_root(x, a):
    return sqrt(x)


@inline
def square(x, a):
    return mul(x, x)


@inline
def cube(x, a):
    return mul(mul(x, x), x)


@inline
def relu(x, a):
    # The zero stands first because `maximum` gives its second operand for a NaN.
    return maximum(zero(), x)


@inline
def exponential(x, a):
    """e ** x to 5 ulp, with 0 and infinity where `exp` alone is clamped."""
    half = exp(mul(x, splat(0.5)))
    return mul(half, half)


@inline
def sigmoid(x, a):
    return div(splat(1.0), add(splat(1.0), exponential(negative(x, a), a)))


@inline
def swish(x, a):
    """x sigmoid(a x)."""
    return mul(x, sigmoid(mul(a, x), a))


@inline
def tanh(x, a):
    """To 4 ulp: a rational function of degree 13 / 6 (Eigen's), constant beyond |x| = 7.9."""
    x = minimum(splat(7.90531110763549805), maximum(splat(-7.90531110763549805), x))
    s = mul(x, x)
    p = fma(s, splat(-2.76076847742355e-16), splat(2.00018790482477e-13))
    p = fma(s, p, splat(-8.60467152213735e-11))
    p = fma(s, p, splat(5.12229709037114e-08))
    p = fma(s, p, splat(1.48572235717979e-05))
    p = fma(s, p, splat(6.37261928875436e-04))
    p = fma(s, p, splat(4.89352455891786e-03))
    q = fma(s, splat(1.19825839466702e-06), splat(1.18534705686654e-04))
    q = fma(s, q, splat(2.26843463243900e-03))
    q = fma(s, q, splat(4.89352518554385e-03))
    return div(mul(x, p), q)


@inline
def erf(x, a):
    """To 6 ulp: a rational function of degree 13 / 8 (Eigen's), constant beyond |x| = 4."""
    x = minimum(splat(4.0), maximum(splat(-4.0), x))
    s = mul(x, x)
    p = fma(s, splat(-2.72614225801306e-10), splat(2.77068142495902e-08))
    p = fma(s, p, splat(-2.10102402082508e-06))
    p = fma(s, p, splat(-5.69250639462346e-05))
    p = fma(s, p, splat(-7.34990630326855e-04))
    p = fma(s, p, splat(-2.95459980854025e-03))
    p = fma(s, p, splat(-1.60960333262415e-02))
    q = fma(s, splat(-1.45660718464996e-05), splat(-2.13374055278905e-04))
    q = fma(s, q, splat(-1.68282697438203e-03))
    q = fma(s, q, splat(-7.37332916720468e-03))
    q = fma(s, q, splat(-1.42647390514189e-02))
    return div(mul(x, p), q)


@inline
def gelu(x, a):
    """x times the normal distribution's integral up to x."""
    half = mul(x, splat(0.5))
    return fma(half, erf(mul(x, splat(0.7071067811865476)), a), half)


@inline
def gelu_tanh(x, a):
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3), written as x sigmoid(2 u)."""
    u = mul(x, fma(mul(x, x), splat(0.044715), splat(1.0)))
    return mul(x, sigmoid(mul(u, splat(1.5957691216057308)), a))


FIRST = Function("first", first)
NEGATIVE = Function("negative", negative)
RECIPROCAL = Function("reciprocal", reciprocal)
SQUARE_ROOT = Function("square_root", square_root)
SQUARE = Function("square", square)
CUBE = Function("cube", cube)
RELU = Function("relu", relu)
EXPONENTIAL = Function("exponential", exponential)
SIGMOID = Function("sigmoid", sigmoid)
SWISH = Function("swish", swish)
TANH = Function("tanh", tanh)
ERF = Function("erf", erf)
GELU = Function("gelu", gelu)
GELU_TANH = Function("gelu_tanh", gelu_tanh)
ADD = Function("add", add)
SUBTRACT = Function("subtract", sub)
MULTIPLY = Function("multiply", mul)
DIVIDE = Function("divide", div)
