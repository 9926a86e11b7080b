"""Elementwise functions on a GPU, generated from those of the CPU (functions.py).

Dims: N elements; or R rows of C columns, over which an operand may be broadcast: its rows lie
`step` elements apart (0: one row serves all), and with `varies` 0 a row is a single element.

A function of the CPU is Python over vectors of 16; read with scalar primitives in place of the
vectors', the same text is a function of one element.
"""

from types import FunctionType

from . import functions
from .cuda_angles import cosine, sine
from .cuda_kernel import Function, cuda_kernel, device
from .cuda_prims import (
    cuda,
    exp2,
    float32,
    int32,
    int64,
    load_f32,
    load_i64,
    square_root,
    store_f16,
    store_f32,
)

THREADS = 256
LOG2E = 1.4426950408889634


@device
def add(x, y):
    return x + y


@device
def sub(x, y):
    return x - y


@device
def mul(x, y):
    return x * y


@device
def div(x, y):
    return x / y


@device
def fma(x, y, z):
    return x * y + z


@device
def maximum(x, y):
    return max(x, y)


@device
def minimum(x, y):
    return min(x, y)


@device
def sqrt(x):
    return square_root(x)


@device
def exp(x):
    return exp2(x * float32(LOG2E))


@device
def splat(x):
    return float32(x)


@device
def zero():
    return float32(0)


SCALARS = {
    "add": add, "sub": sub, "mul": mul, "div": div, "fma": fma, "maximum": maximum,
    "minimum": minimum, "sqrt": sqrt, "exp": exp, "splat": splat, "zero": zero,
}  # fmt: skip
_made = {getattr(functions, name): scalar for name, scalar in SCALARS.items()}  # by what they are


def of_elements(function):
    """The device function of one element that a function of functions.py is of vectors."""
    if function in _made:  # without a compiler these are their twins, whose names are others
        return _made[function]
    python = getattr(function, "py_func", function)
    if python not in _made:
        known = python.__globals__
        names = {n: of_elements(known[n]) for n in python.__code__.co_names if n in known}
        _made[python] = Function(FunctionType(python.__code__, names, python.__name__))
    return _made[python]


def make_unary(name, function):
    """The kernel of a function of one element and a parameter."""

    @cuda_kernel("aalf", name=name, threads=THREADS)
    def unary(x, y, n, parameter):
        """x (N,) float32 -> y (N,)."""
        i = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if i < n:
            store_f32(y + 4 * i, function(load_f32(x + 4 * i), parameter))

    return unary


def make_binary(name, function):
    """The kernel of a function of two elements, of operands that may be broadcast."""

    @cuda_kernel("aaaiiiiii", name=name, threads=THREADS)
    def binary(x, y, z, rows, columns, x_step, x_varies, y_step, y_varies):
        """x and y (R, C), or less where they are broadcast, float32 -> z (R, C), R C < 2 ** 31."""
        i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
        if i < rows * columns:
            row, column = i // columns, i % columns
            left = load_f32(x + 4 * int64(x_step * row + x_varies * column))
            right = load_f32(y + 4 * int64(y_step * row + y_varies * column))
            store_f32(z + 4 * int64(i), function(left, right))

    return binary


UNARY = {
    token.name: make_unary(f"{token.name}_elements", of_elements(token.function))
    for token in (
        functions.NEGATIVE, functions.RECIPROCAL, functions.SQUARE_ROOT, functions.SQUARE,
        functions.CUBE, functions.RELU, functions.EXPONENTIAL, functions.SIGMOID, functions.SWISH,
        functions.TANH, functions.ERF, functions.GELU, functions.GELU_TANH,
    )
}  # fmt: skip
UNARY["sin"], UNARY["cos"] = make_unary("sin_elements", sine), make_unary("cos_elements", cosine)
BINARY = {
    token.name: make_binary(f"{token.name}_elements", of_elements(token.function))
    for token in (functions.ADD, functions.SUBTRACT, functions.MULTIPLY, functions.DIVIDE)
}
swish_of = of_elements(functions.SWISH.function)


@cuda_kernel("aaal", threads=THREADS)
def swish_multiply(x, y, z, n):
    """x (N,) and y (N,) float32 -> z (N,) = x sigmoid(x) y."""
    i = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < n:
        store_f32(z + 4 * i, swish_of(load_f32(x + 4 * i), float32(1)) * load_f32(y + 4 * i))


@cuda_kernel("aal", threads=THREADS)
def to_half(x, y, n):
    """x (N,) float32 -> y (N,) float16, what is too large infinite."""
    i = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < n:
        store_f16(y + 2 * i, load_f32(x + 4 * i))


@cuda_kernel("aal", threads=THREADS)
def from_integers(x, y, n):
    """x (N,) int64 -> y (N,) float32, the nearest."""
    i = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if i < n:
        store_f32(y + 4 * i, float32(load_i64(x + 8 * i)))
