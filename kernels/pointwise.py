"""Kernels that treat each element by itself.

Dims: N elements; or R rows of C columns, over which an operand may be broadcast: its rows lie
`step` bytes apart (0: one row serves all), and with `varies` 0 a row is a single element.
"""

from .functions import (
    ADD, CUBE, DIVIDE, ERF, EXPONENTIAL, GELU, GELU_TANH, MULTIPLY, NEGATIVE, RECIPROCAL, RELU,
    SIGMOID, SQUARE, SQUARE_ROOT, SUBTRACT, SWISH, TANH, apply,
)  # fmt: skip
from .jit import arg, arg_float, inline, jit, kernel, share
from .vector import (
    choose_n, load_f16, load_f16_n, load_f32, load_f32_n, peek_f32, splat, store_f16, store_f16_n,
    store_f32, store_f32_n,
)  # fmt: skip


@jit
def unary(function, args, thread, threads):
    """args: x (N,), out (N,), N, a parameter."""
    x, out, n, a = arg(args, 0), arg(args, 1), arg(args, 2), splat(arg_float(args, 3))
    start, stop = share(n, 16, thread, threads)
    full = start + (stop - start) // 16 * 16
    for i in range(start, full, 16):
        store_f32(out + 4 * i, apply(function, load_f32(x + 4 * i), a))
    if full < stop:
        y = apply(function, load_f32_n(x + 4 * full, stop - full), a)
        store_f32_n(out + 4 * full, y, stop - full)


@inline
def operand(p, varies, i):
    """16 elements of a row from element i on, or its single element 16 times."""
    return load_f32(p + 4 * i) if varies else splat(peek_f32(p))


@inline
def operand_n(p, varies, i, n):
    """The same for n elements."""
    return load_f32_n(p + 4 * i, n) if varies else splat(peek_f32(p))


@jit
def binary(function, args, thread, threads):
    """args: out (R, C), R, C, then for x and y each: address, step, varies."""
    out, rows, columns = arg(args, 0), arg(args, 1), arg(args, 2)
    x_varies, y_varies = arg(args, 5), arg(args, 8)
    start, stop = share(rows * columns, 16, thread, threads)
    while start < stop:
        row, column = start // columns, start % columns
        n = min(columns - column, stop - start)
        x = arg(args, 3) + arg(args, 4) * row + 4 * column * x_varies
        y = arg(args, 6) + arg(args, 7) * row + 4 * column * y_varies
        to, full = out + 4 * start, n // 16 * 16
        for i in range(0, full, 16):
            z = apply(function, operand(x, x_varies, i), operand(y, y_varies, i))
            store_f32(to + 4 * i, z)
        if full < n:
            left = operand_n(x, x_varies, full, n - full)
            right = operand_n(y, y_varies, full, n - full)
            store_f32_n(to + 4 * full, apply(function, left, right), n - full)
        start += n


@kernel
def where_f32(args, thread, threads):
    """(R, C) float32: x where the condition (R, C) bool holds, else y.

    args: out, R, C, then for x and y each address, step, varies, then the condition's.
    """
    out, rows, columns = arg(args, 0), arg(args, 1), arg(args, 2)
    x_varies, y_varies, condition = arg(args, 5), arg(args, 8), arg(args, 9)
    start, stop = share(rows * columns, 16, thread, threads)
    while start < stop:
        row, column = start // columns, start % columns
        n = min(columns - column, stop - start)
        x = arg(args, 3) + arg(args, 4) * row + 4 * column * x_varies
        y = arg(args, 6) + arg(args, 7) * row + 4 * column * y_varies
        for i in range(0, n, 16):
            count = min(16, n - i)
            left = operand_n(x, x_varies, i, count)
            right = operand_n(y, y_varies, i, count)
            z = choose_n(condition + start + i, left, right, count)
            store_f32_n(out + 4 * (start + i), z, count)
        start += n


@kernel
def add_f32(args, thread, threads):
    """x + y: (R, C) float32."""
    binary(ADD, args, thread, threads)


@kernel
def subtract_f32(args, thread, threads):
    """x - y: (R, C) float32."""
    binary(SUBTRACT, args, thread, threads)


@kernel
def multiply_f32(args, thread, threads):
    """x y: (R, C) float32."""
    binary(MULTIPLY, args, thread, threads)


@kernel
def divide_f32(args, thread, threads):
    """x / y: (R, C) float32."""
    binary(DIVIDE, args, thread, threads)


@kernel
def negative_f32(args, thread, threads):
    """-x: (N,) float32 -> (N,)."""
    unary(NEGATIVE, args, thread, threads)


@kernel
def reciprocal_f32(args, thread, threads):
    """1 / x: (N,) float32 -> (N,)."""
    unary(RECIPROCAL, args, thread, threads)


@kernel
def square_root_f32(args, thread, threads):
    """The square root: (N,) float32 -> (N,)."""
    unary(SQUARE_ROOT, args, thread, threads)


@kernel
def square_f32(args, thread, threads):
    """x ** 2: (N,) float32 -> (N,)."""
    unary(SQUARE, args, thread, threads)


@kernel
def cube_f32(args, thread, threads):
    """x ** 3: (N,) float32 -> (N,)."""
    unary(CUBE, args, thread, threads)


@kernel
def relu_f32(args, thread, threads):
    """max(0, x): (N,) float32 -> (N,)."""
    unary(RELU, args, thread, threads)


@kernel
def exponential_f32(args, thread, threads):
    """e ** x: (N,) float32 -> (N,)."""
    unary(EXPONENTIAL, args, thread, threads)


@kernel
def sigmoid_f32(args, thread, threads):
    """1 / (1 + e ** -x): (N,) float32 -> (N,)."""
    unary(SIGMOID, args, thread, threads)


@kernel
def swish_f32(args, thread, threads):
    """x sigmoid(a x): (N,) float32 -> (N,)."""
    unary(SWISH, args, thread, threads)


@kernel
def tanh_f32(args, thread, threads):
    """The hyperbolic tangent: (N,) float32 -> (N,)."""
    unary(TANH, args, thread, threads)


@kernel
def erf_f32(args, thread, threads):
    """The error function: (N,) float32 -> (N,)."""
    unary(ERF, args, thread, threads)


@kernel
def gelu_f32(args, thread, threads):
    """x (1 + erf(x / sqrt 2)) / 2: (N,) float32 -> (N,)."""
    unary(GELU, args, thread, threads)


@kernel
def gelu_tanh_f32(args, thread, threads):
    """The same with erf approximated by tanh: (N,) float32 -> (N,)."""
    unary(GELU_TANH, args, thread, threads)


@kernel
def half_to_float(args, thread, threads):
    """(N,) float16 -> (N,) float32. args: x, out, N."""
    x, out, n = arg(args, 0), arg(args, 1), arg(args, 2)
    start, stop = share(n, 16, thread, threads)
    full = start + (stop - start) // 16 * 16
    for i in range(start, full, 16):
        store_f32(out + 4 * i, load_f16(x + 2 * i))
    store_f32_n(out + 4 * full, load_f16_n(x + 2 * full, stop - full), stop - full)


@kernel
def float_to_half(args, thread, threads):
    """(N,) float32 -> (N,) float16, to nearest even. args: x, out, N."""
    x, out, n = arg(args, 0), arg(args, 1), arg(args, 2)
    start, stop = share(n, 16, thread, threads)
    full = start + (stop - start) // 16 * 16
    for i in range(start, full, 16):
        store_f16(out + 2 * i, load_f32(x + 4 * i))
    store_f16_n(out + 2 * full, load_f32_n(x + 4 * full, stop - full), stop - full)
