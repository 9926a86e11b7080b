"""What positions become before they turn anything: floats, and the cosines and sines of angles.

Dims: N elements. Each is computed in float64 and rounded once, whatever lies beside it.
"""

import numpy as np

from .jit import arg, jit, kernel, share
from .vector import peek_f32, peek_i64, poke_f32


@jit
def part(args, thread, threads):
    """Where a share's elements are in a call with x, out, N."""
    start, stop = share(arg(args, 2), 16, thread, threads)
    return arg(args, 0), arg(args, 1), start, stop


@kernel
def int64_to_float(args, thread, threads):
    """(N,) int64 -> (N,) float32. args: x, out, N."""
    x, out, start, stop = part(args, thread, threads)
    for i in range(start, stop):
        poke_f32(out + 4 * i, np.float32(peek_i64(x + 8 * i)))


@kernel
def cosine_f32(args, thread, threads):
    """The cosine: (N,) float32 -> (N,). args: x, out, N."""
    x, out, start, stop = part(args, thread, threads)
    for i in range(start, stop):
        poke_f32(out + 4 * i, np.float32(np.cos(np.float64(peek_f32(x + 4 * i)))))


@kernel
def sine_f32(args, thread, threads):
    """The sine: (N,) float32 -> (N,). args: x, out, N."""
    x, out, start, stop = part(args, thread, threads)
    for i in range(start, stop):
        poke_f32(out + 4 * i, np.float32(np.sin(np.float64(peek_f32(x + 4 * i)))))
