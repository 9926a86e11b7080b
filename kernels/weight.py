"""Weights on their way to operators that want arrays: decoded whole, or a few rows of them.

Dims: a weight's stored form is N rows of K elements; M rows are looked up.
"""

import numpy as np

from ..registry import kernels, op
from .buffers import empty
from .mapping import launch

USES = ("decode_{encoding}",)
SMALL_BYTES = 65536
FEW = 64  # rows of a table at a time: what is made of them on the way stays small


def is_plain(weight):
    """Whether the stored elements are the logical ones."""
    return weight.encoding == weight.ref.dtype


def decode_rows(weight, ids=None):
    """Rows ids (M,) int64 of a stored weight, or all of them -> (M, K) float32."""
    if weight.ref.parts:
        return decode_table(weight, ids)
    stored = weight.ref.stored_shape
    k = stored[-1] if stored else 1
    n = int(np.prod(stored[:-1], dtype=np.int64)) if ids is None else ids.size
    out = empty((n, k))
    if out.size == 0:
        return out
    address, where = weight.address, 0 if ids is None else ids.ctypes.data
    if weight.read_rows is not None:
        rows = weight.read_rows(range(n) if ids is None else ids)
        address, where = rows.ctypes.data, 0
    kernel = kernels()[f"decode_{weight.encoding}"]
    launch(kernel, address, weight.row_bytes, out.ctypes.data, n, k, where, serial=n == 1)
    if weight.encoding == "uint8":
        out -= np.float32(weight.zero_point)
        out *= np.float32(weight.scale)
    return out


def decode_table(weight, ids):
    """Rows ids (M,) int64 of a table in parts -> (M, K) float32: integers less zero points, times
    scales. Only those rows are read of one that is left in its file."""
    k, block = weight.shape[1], weight.ref.block
    out = empty((ids.size, k))
    for start in range(0, ids.size, FEW):
        values = out[start : start + FEW]
        integers, scales, *zeros = weight.part_rows(ids[start : start + FEW])
        values[:] = integers
        for zero in zeros:
            values -= np.repeat(zero.astype(np.float32), block, axis=1)[:, :k]
        values *= np.repeat(scales.astype(np.float32), block, axis=1)[:, :k]
    return out


def decode_parts(weight):
    """A matrix (K, N) of integers, scales and zero points -> (N, K) or (K, N) as it is stored."""
    ref, by_rows = weight.ref, weight.transposed
    if ref.block_axis:
        return decode_table(weight, np.arange(ref.shape[0])).astype(ref.dtype, copy=False)
    integers, scales, *zeros = (decode(part) for part in weight.parts)
    values = np.ascontiguousarray(integers[: ref.shape[0]].T if by_rows else integers)
    values = values.astype(np.float32)
    for i in range(-(-ref.shape[0] // ref.block)):
        where = slice(i * ref.block, (i + 1) * ref.block)
        block = values.T[where] if by_rows else values[where]
        for zero in zeros:
            block -= zero[i % len(zero)].astype(np.float32)
        block *= scales[i].astype(np.float32)
    return values.astype(ref.dtype, copy=False)


@op("Decode", domain="onnxstream_nb", native=("weight",), uses=USES)
def decode(weight):
    """A weight -> its logical array: a view of plain elements, float32 of encoded ones."""
    if isinstance(weight, np.ndarray):
        return weight
    if weight.ref.parts:
        array = decode_parts(weight)
    elif is_plain(weight):
        array = weight.stored()
    elif weight.encoding in ("float16", "bfloat16") and weight.ref.nbytes <= SMALL_BYTES:
        array = weight.stored().astype(np.float32)  # not worth a kernel, nor compiling one
    else:
        array = decode_rows(weight).reshape(weight.ref.stored_shape)
    return array.swapaxes(-1, -2) if weight.transposed else array
