"""Operators that pick elements by index, and those that put them there.

Dims: data of R axes, indices of Q axes; an index may be negative and counts from the end then.
"""

import math
from functools import partial

import numpy as np

from ..errors import ShapeError
from ..registry import kernels, op
from .buffers import SMALL, empty
from .decode import pick_rows
from .lowered import Rows, plain
from .mapping import SMALL as SMALL_PART
from .shape import ints
from .weight import USES, decode, decode_rows, is_plain


def in_range(name, indices, size, axis):
    """The indices as int64 from 0 on; an error that names one that is outside."""
    indices = np.asarray(indices, np.int64)
    one = indices.size == 1  # a token's: NumPy takes longer than the row that is looked up
    low = 0 if not indices.size else indices.item() if one else indices.min()
    if low < -size or (indices.size and (low if one else indices.max()) >= size):
        wrong = indices[(indices < -size) | (indices >= size)].flat[0]
        raise ShapeError(f"{name}: index {wrong} is out of range for axis {axis} of size {size}")
    return np.where(indices < 0, indices + size, indices) if low < 0 else indices


def _lower_lookup(data, indices, axis):
    """One row of a table (C, K) as it is stored: it is read or copied, then decoded."""
    is_table = axis == 0 and len(data.shape) == 2 and not data.transposed and not data.packed
    if not is_table or indices.size != 1 or data.dtype != np.float32:
        return None
    kernel, nbytes = kernels().get(f"decode_{data.encoding}"), data.row_bytes
    is_here = data.buffer.size == data.shape[0] * nbytes
    if kernel is None or data.encoding == "uint8" or not (is_here or data.read_row):
        return None
    row, out = np.empty(nbytes, np.uint8), empty((*indices.shape, data.shape[1]))
    rows = data.shape[0]

    def fetch():
        i = in_range("Gather", indices, rows, axis).item()
        if is_here:
            row[:] = data.buffer[nbytes * i : nbytes * (i + 1)]
        else:
            data.read_row(i, row)

    call = (kernel, row.ctypes.data, nbytes, out.ctypes.data, 1, data.shape[1], 0)
    return Rows((out,), [call], serial=True, keep=(row, indices), fetch=fetch)


def lower_gather(data, indices, *, axis=0):
    """Rows of data (1, ..., C, ...), contiguous float32, by int64 indices; or a row of a table."""
    if not isinstance(data, np.ndarray):
        return _lower_lookup(data, indices, axis % len(data.shape))
    if not plain(data) or indices.dtype != np.int64 or not indices.flags.c_contiguous:
        return None
    axis = axis % data.ndim
    lead, size, width = data.shape[:axis], data.shape[axis], math.prod(data.shape[axis + 1 :])
    if math.prod(lead) != 1 or not size:
        return None
    out = empty((*lead, *indices.shape, *data.shape[axis + 1 :]))
    call = (pick_rows, data.ctypes.data, out.ctypes.data, indices.size, width, indices.ctypes.data)
    return Rows(
        (out,), [(*call, size)], serial=out.size < SMALL_PART, keep=(data, indices),
        check=partial(in_range, "Gather", indices, size, axis),
    )  # fmt: skip


@op("Gather", since=1, native=("data",), lookups=("data",), uses=(*USES, "pick_rows"),
    lower=lower_gather)  # fmt: skip
def gather(data, indices, *, axis=0):
    """data (..., C, ...), indices (...) -> data's shape with C replaced by the indices' shape."""
    axis = axis % len(data.shape)
    wanted = in_range("Gather", indices, data.shape[axis], axis)
    if not isinstance(data, np.ndarray):
        rows = axis == 0 and len(data.shape) == 2 and not data.transposed
        flat = np.ascontiguousarray(wanted).reshape(-1)
        if rows and not is_plain(data):
            return decode_rows(data, flat).reshape(*wanted.shape, data.shape[1])
        if rows and data.read_rows is not None:
            return data.read_rows(flat).view(data.dtype).reshape(*wanted.shape, data.shape[1])
        data = decode(data)
    if data.dtype.hasobject or wanted.size * data.nbytes < SMALL * max(1, data.shape[axis]):
        return np.asarray(np.take(data, wanted, axis))
    out = empty((*data.shape[:axis], *wanted.shape, *data.shape[axis + 1 :]), data.dtype)
    return np.take(data, wanted, axis, out=out, mode="clip")  # without, NumPy makes a copy


def _element_grid(name, data, indices, axis):
    """An index tuple that picks data[..., indices[...], ...] for each element of indices."""
    axis = axis % data.ndim
    grid = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    grid[axis] = in_range(name, indices, data.shape[axis], axis)
    return tuple(grid)


@op("GatherElements", since=11)
def gather_elements(data, indices, *, axis=0):
    """data (...), indices (...) of as many axes -> indices' shape, along `axis` as they say."""
    return data[_element_grid("GatherElements", data, indices, axis)]


def _tuples(name, data, indices, batch):
    """The last axis of the indices as an index tuple into data's axes from `batch` on."""
    return tuple(
        in_range(name, indices[..., i], data.shape[batch + i], batch + i)
        for i in range(indices.shape[-1])
    )


@op("GatherND", since=11)
def gather_nd(data, indices, *, batch_dims=0):
    """data (B, ..., ...), indices (B, ..., I) -> (B, ..., ...), what each index tuple points to."""
    batch = np.ogrid[tuple(slice(n) for n in data.shape[:batch_dims])] if batch_dims else ()
    extra = indices.ndim - 1 - batch_dims
    batch = tuple(b.reshape(b.shape + (1,) * extra) for b in batch)
    return np.asarray(data[batch + _tuples("GatherND", data, indices, batch_dims)])


COMBINE = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


def _scatter(data, where, updates, reduction):
    out = data.copy()
    if reduction == "none":
        out[where] = updates
    else:
        COMBINE[reduction].at(out, where, updates)
    return out


@op("Scatter", since=9)
@op("ScatterElements", since=11)
def scatter_elements(data, indices, updates, *, axis=0, reduction="none"):
    """data (...), indices and updates of one shape -> data with the updates put in along `axis`."""
    return _scatter(data, _element_grid("ScatterElements", data, indices, axis), updates, reduction)


@op("ScatterND", since=11)
def scatter_nd(data, indices, updates, *, reduction="none"):
    """data (...), indices (..., I), updates (..., ...) -> data with the updates put in."""
    return _scatter(data, _tuples("ScatterND", data, indices, 0), updates, reduction)


@op("TensorScatter", since=24)
def tensor_scatter(past_cache, update, write_indices=None, *, axis=-2, mode="linear"):
    """past_cache (B, ..., T, ...), update (B, ..., S, ...), write_indices (B,) -> the new cache."""
    out = past_cache.copy()
    axis, (size, count) = axis % out.ndim, (out.shape[axis], update.shape[axis])
    starts = np.zeros(len(out), np.int64) if write_indices is None else write_indices
    for row, new, start in zip(out, update, ints(starts), strict=True):
        places = np.arange(start, start + count)
        if mode == "circular":
            places = places % size
        places = in_range("TensorScatter", places, size, axis)
        np.moveaxis(row, axis - 1, 0)[places] = np.moveaxis(new, axis - 1, 0)
    return out


@op("NonZero", since=9)
def non_zero(x):
    """x (...) -> (R, N) int64, the index of each element that is not 0."""
    return np.array(np.nonzero(np.atleast_1d(x)), np.int64)


@op("Compress", since=9)
def compress(x, condition, *, axis=None):
    """x (...), condition (C,) bool -> the slices along `axis` (or elements) where it holds."""
    return np.compress(condition, x, axis)


@op("Unique", since=11)
def unique(x, *, axis=None, sorted=1):
    """x (...) -> unique slices, first indices (N,), inverse and counts; by value or appearance."""
    values, index, inverse, counts = np.unique(
        x, return_index=True, return_inverse=True, return_counts=True, axis=axis)  # fmt: skip
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(index)
        values, index, counts = values.take(order, axis or 0), index[order], counts[order]
        inverse = np.argsort(order)[inverse]
    return values, *(a.astype(np.int64) for a in (index, inverse, counts))


def _top(x, k, axis, largest):
    """The k first of each slice in falling (or rising) order; of equals the first."""
    size = x.shape[axis]
    if not 0 <= k <= size:
        raise ShapeError(f"TopK: k is {k}, but axis {axis} has {size} elements")
    if largest:
        order = size - 1 - np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    else:
        order = np.argsort(x, axis, kind="stable")
    order = order.take(np.arange(k), axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


@op("TopK", since=1)
def top_k_1(x, *, k, axis=-1):
    """x (..., C, ...) -> the k largest along `axis`, and their indices int64."""
    return _top(x, k, axis, True)


@op("TopK", since=10)
def top_k(x, k, *, axis=-1, largest=1, sorted=1):
    """x (..., C, ...), k (1,) -> the k largest (or smallest) along `axis`, and their indices."""
    return _top(x, int(k.flat[0]), axis, largest)


@op("ReverseSequence", since=10)
def reverse_sequence(x, sequence_lens, *, batch_axis=1, time_axis=0):
    """x (T, B, ...), sequence_lens (B,) -> the first elements of each sequence in reverse order."""
    y = np.moveaxis(x, (batch_axis, time_axis), (0, 1)).copy()
    for sequence, length in zip(y, ints(sequence_lens), strict=True):
        sequence[:length] = sequence[:length][::-1].copy()
    return np.moveaxis(y, (0, 1), (batch_axis, time_axis))
