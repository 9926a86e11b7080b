"""Running kernels on arrays: at once, or as rows of a table.

Dims: any shape (...); R rows of C columns, over which an operand may be broadcast.
"""

import numpy as np

from .buffers import contiguous, empty
from .jit import float_bits
from .joined import Flow
from .lowered import Rows, plain
from .simd import JIT
from .threads import team

SMALL, LARGE = 1 << 13, 1 << 17
"""Elements below which a kernel is not worth sharing between threads, and below which NumPy is done
before a kernel has been dispatched, where it runs at memory speed. Only what both round alike is
left to NumPy: a row must not depend on how many others there are."""
LANES = 16  # elements: kernels of this kind are cut at multiples of them


def launch(kernel, *values, serial=False):
    """Run one kernel on the thread team, `serial` on the calling thread alone."""
    if JIT and serial:
        args = np.array(values, np.int64)
        kernel.call(args.ctypes.data, 0, 1)
    elif JIT:
        team().run([(kernel, *values)], serial)
    else:
        with np.errstate(all="ignore"):
            team().run([(kernel, *values)], serial)


def evaluate(rows):
    """The output of rows with a single call."""
    launch(*rows.calls[0], serial=rows.serial)
    return rows.outputs[0]


def unary_rows(kernel, x, parameter=0.0, dtype=np.float32):
    """The call that computes x (any shape) -> the same shape, contiguous."""
    x = contiguous(x)
    out = empty(x.shape, dtype)
    source, place = x.ctypes.data, out.ctypes.data
    call = (kernel, source, place, x.size, float_bits(parameter))
    flow = Flow(((place, out.nbytes),), own=((source, x.nbytes),), items=x.size, align=LANES)
    return Rows((out,), [call], serial=x.size < SMALL, keep=(x,), flows=(flow,))


def map_unary(kernel, x, parameter=0.0, dtype=np.float32):
    """x (any shape) -> the same shape."""
    return evaluate(unary_rows(kernel, x, parameter, dtype))


def layout(shape, shapes):
    """R, C and for each of the broadcast `shapes` (elements between rows, varies), or None.

    None says that the broadcast to `shape` is not of this form: two runs of axes, in each of
    which every operand either varies along all axes or along none.
    """
    runs = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        at = [axis - len(shape) + len(s) for s in shapes]
        varies = tuple(i >= 0 and s[i] != 1 for i, s in zip(at, shapes, strict=True))
        if runs and runs[-1][1] == varies:
            runs[-1] = runs[-1][0] * size, varies
        else:
            runs.append((size, varies))
    if len(runs) > 2:
        return None
    everywhere = (1, (False,) * len(shapes))
    (rows, down), (columns, across) = ([everywhere, everywhere, *runs])[-2:]
    steps = [(columns if a else 1) if d else 0 for d, a in zip(down, across, strict=True)]
    return rows, columns, list(zip(steps, map(int, across), strict=True))


def broadcast_rows(kernel, *operands):
    """The call that computes broadcast operands; None when NumPy must do it."""
    if not all(o.flags.c_contiguous for o in operands):
        return None
    shape = np.broadcast_shapes(*(o.shape for o in operands))
    form = layout(shape, [o.shape for o in operands])
    if form is None:
        return None
    rows, columns, steps = form
    out = empty(shape)
    call, read = [kernel, out.ctypes.data, rows, columns], {True: (), False: ()}
    for o, (step, varies) in zip(operands, steps, strict=True):
        address = o.ctypes.data
        call += address, step * o.itemsize, varies
        read[o.size == out.size] += ((address, o.nbytes),)
    writes = ((call[1], out.nbytes),)
    flow = Flow(writes, read[False], read[True], items=out.size, align=LANES)
    return Rows((out,), [call], serial=out.size < SMALL, keep=operands, flows=(flow,))


def map_broadcast(kernel, *operands):
    """The broadcast result; None when NumPy must do it."""
    rows = broadcast_rows(kernel, *operands)
    return rows and evaluate(rows)


def lower_unary(kernel):
    """How an operator of one float32 array is lowered."""
    return lambda x: unary_rows(kernel, x) if plain(x) else None


def lower_binary(kernel):
    """How an operator of two float32 arrays is lowered."""
    return lambda a, b: broadcast_rows(kernel, a, b) if plain(a, b) else None
