"""Operators that move data and compute nothing: views where NumPy has them, copies elsewhere.

Dims: any shape (...); R is the number of axes.
"""

import numpy as np

from ..errors import ShapeError, UnsupportedError
from ..registry import op
from .buffers import contiguous, empty


def ints(values):
    """The elements of an integer array, or of an attribute, as a tuple."""
    return tuple(int(v) for v in (values.flat if isinstance(values, np.ndarray) else values))


@op("Reshape", since=1, view=True)
def reshape_1(x, *, shape=(), consumed_inputs=()):
    """x (...) -> shape."""
    return reshape(x, shape)


@op("Reshape", since=5, view=True)
def reshape(x, shape, *, allowzero=0):
    """x (...), shape (R,) -> shape, in which 0 keeps the axis and -1 is what remains."""
    wanted = ints(shape)
    try:
        if not allowzero:
            wanted = tuple(n or x.shape[i] for i, n in enumerate(wanted))
        try:
            return x.reshape(wanted, copy=False)
        except ValueError:  # no view has that shape
            return contiguous(x).reshape(wanted)
    except (ValueError, IndexError) as error:
        raise ShapeError(f"Reshape: {x.shape} cannot become {wanted}") from error


@op("Transpose", since=1, view=True)
def transpose(x, *, perm=None):
    """x (...) -> axis i of the result is axis perm[i] of x; without perm in reverse order."""
    return x.transpose(perm or None)


@op("Unsqueeze", since=1, view=True)
def unsqueeze_1(x, *, axes):
    """x (...) -> with new axes of size 1, counted in the result."""
    return np.expand_dims(x, tuple(axes))


@op("Unsqueeze", since=13, view=True)
def unsqueeze(x, axes):
    """x (...), axes (A,) -> with new axes of size 1, counted in the result."""
    return np.expand_dims(x, ints(axes))


@op("Squeeze", since=1, view=True)
def squeeze_1(x, *, axes=None):
    """x (...) -> without those axes, or without all of size 1."""
    return x.squeeze(tuple(axes) if axes else None)


@op("Squeeze", since=13, view=True)
def squeeze(x, axes=None):
    """x (...), axes (A,) -> without those axes, or without all of size 1."""
    return x.squeeze(None if axes is None else ints(axes))


@op("Flatten", since=1, view=True)
def flatten(x, *, axis=1):
    """x (...) -> (product of the axes before `axis`, product of the others)."""
    at = axis if axis >= 0 else axis + x.ndim
    return x.reshape(int(np.prod(x.shape[:at], dtype=np.int64)), -1 if x.size else
                     int(np.prod(x.shape[at:], dtype=np.int64)))  # fmt: skip


@op("Expand", since=8, view=True)
def expand(x, shape):
    """x (...), shape (R,) -> both broadcast, as a view whose elements are not repeated."""
    try:
        return np.broadcast_to(x, np.broadcast_shapes(x.shape, ints(shape)))
    except ValueError as error:
        raise ShapeError(f"Expand: {x.shape} does not broadcast to {ints(shape)}") from error


def _joined(inputs, axis):
    """All inputs one behind the other; the result in the arena when it is large."""
    dtype, shape = np.result_type(*inputs), list(inputs[0].shape)
    shape[axis] = sum(i.shape[axis] for i in inputs)
    return np.concatenate(inputs, axis, out=None if dtype.hasobject else empty(shape, dtype))


@op("Concat", since=1)
def concat(*inputs, axis=1):
    """Each (..., C, ...) -> one after the other along `axis`."""
    try:
        return _joined(inputs, axis)
    except (ValueError, IndexError) as error:
        shapes = ", ".join(str(i.shape) for i in inputs)
        raise ShapeError(f"Concat along axis {axis}: {shapes} do not fit") from error


def _split(x, sizes, parts, axis):
    size = x.shape[axis]
    if sizes is None:
        part = -(-size // parts)
        sizes = [max(0, min(part, size - part * i)) for i in range(parts)]
    if sum(sizes) != size:
        raise ShapeError(f"Split: sizes {tuple(sizes)} do not add up to {size} of axis {axis}")
    return tuple(np.split(x, np.cumsum(sizes[:-1], dtype=np.int64), axis))


@op("Split", since=1, view=True)
def split_1(x, split_input=None, *, axis=0, split=None, n_outputs):
    """x (..., C, ...) -> pieces of the sizes `split`, else of equal size."""
    sizes = split if split_input is None else ints(split_input)
    return _split(x, sizes or None, n_outputs, axis)


@op("Split", since=13, view=True)
def split(x, split=None, *, axis=0, num_outputs=None, n_outputs):
    """x (..., C, ...), split (P,) -> pieces of those sizes, else equal (last: the rest)."""
    sizes = None if split is None else ints(split)
    return _split(x, sizes, num_outputs or n_outputs, axis)


@op("Slice", since=1, view=True)
def slice_1(x, *, starts, ends, axes=None):
    """x (...) -> the elements from starts to ends of those axes."""
    return slice_(x, *(np.array(v, np.int64) for v in (starts, ends)), axes)


@op("Slice", since=10, view=True)
def slice_(x, starts, ends, axes=None, steps=None):
    """x (...), all others (A,) -> the elements from starts to ends of those axes, by steps."""
    axes = range(len(starts)) if axes is None else ints(axes)
    steps = (1,) * len(starts) if steps is None else ints(steps)
    where = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, ints(starts), ints(ends), steps, strict=True):
        size = x.shape[axis]
        # Counted from the end, what lies before the beginning is the beginning.
        start = max(start + size, 0) if start < 0 else start
        end = end + size if end < 0 else end
        where[axis] = slice(start, None if end < 0 and step < 0 else max(end, 0), step)
    return x[tuple(where)]


@op("Shape", since=1, native=("x",))
def shape(x, *, start=0, end=None):
    """x (...) -> (R,) int64, its sizes from axis `start` to before `end`; x may be a slot."""
    return np.array(x.shape[start:end], np.int64)


@op("Size", since=1)
def size(x):
    """x (...) -> () int64, how many elements it has."""
    return np.array(x.size, np.int64)


@op("Tile", since=6)
def tile(x, repeats):
    """x (...), repeats (R,) -> each axis as many times."""
    return np.tile(x, ints(repeats))


def _pad(x, pads, mode, value, axes):
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        widths[axis] = pads[i], pads[i + len(axes)]
    sized = zip(x.shape, widths, strict=True)
    crop = tuple(slice(max(0, -before), n - max(0, -behind)) for n, (before, behind) in sized)
    widths = [(max(0, before), max(0, behind)) for before, behind in widths]
    fill = {"constant_values": value} if mode == "constant" else {}
    return np.pad(x[crop], widths, mode, **fill)


@op("Pad", since=2)
def pad_2(x, *, pads, mode="constant", value=0.0):
    """x (...) -> each axis i longer by pads[i] before and pads[R + i] behind."""
    return _pad(x, pads, mode, value, range(x.ndim))


@op("Pad", since=11)
def pad(x, pads, constant_value=None, axes=None, *, mode="constant"):
    """x (...), pads (2 A,), value (), axes (A,) -> each axis longer by pads before and behind."""
    value = np.zeros((), x.dtype) if constant_value is None else constant_value.reshape(())
    return _pad(x, ints(pads), mode, value, range(x.ndim) if axes is None else ints(axes))


@op("Trilu", since=14)
def trilu(x, k=None, *, upper=1):
    """x (..., M, N), k () -> zeros below (upper) or above the k-th diagonal."""
    return (np.triu if upper else np.tril)(x, 0 if k is None else int(k.flat[0]))


@op("DepthToSpace", since=1)
def depth_to_space(x, *, blocksize, mode="DCR"):
    """x (N, C b b, H, W) -> (N, C, H b, W b)."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


@op("SpaceToDepth", since=1)
def space_to_depth(x, *, blocksize, mode="DCR"):
    """x (N, C, H b, W b) -> (N, C b b, H, W)."""
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    y = y.transpose(0, 3, 5, 1, 2, 4) if mode == "DCR" else y.transpose(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


@op("Dropout", since=7, view=True)
def dropout_7(x, *, ratio=0.5, n_outputs):
    """x (...) -> x itself and a mask of ones."""
    return (x, np.ones(x.shape, bool)) if n_outputs > 1 else (x,)


@op("Dropout", since=12, view=True)
def dropout(x, ratio=None, training_mode=None, *, seed=None, n_outputs):
    """x (...), ratio (), training_mode () -> x itself and a mask (...) bool of ones."""
    if training_mode is not None and training_mode and (ratio is None or ratio > 0):
        raise UnsupportedError("Dropout: training_mode is not supported; export for inference")
    return dropout_7(x, n_outputs=n_outputs)
