"""Weights on their way to operators that want arrays: decoded whole, or a few rows of them.

Dims: a weight's stored form is N rows of K elements; M rows are looked up.
"""

import numpy as np

from ..registry import kernels, op
from .buffers import empty
from .mapping import launch

USES = ("decode_{encoding}",)
SMALL_BYTES = 65536


def is_plain(weight):
    """Whether the stored elements are the logical ones."""
    return weight.encoding == weight.ref.dtype


def decode_rows(weight, ids=None):
    """Rows ids (M,) int64 of a stored weight, or all of them -> (M, K) float32."""
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
    launch(kernel, address, weight.row_bytes, out.ctypes.data, n, k, where)
    if weight.encoding == "uint8":
        out -= np.float32(weight.zero_point)
        out *= np.float32(weight.scale)
    return out


def decode_parts(weight):
    """A matrix (K, N) of integers, scales and zero points -> (N, K) or (K, N) as it is stored."""
    ref, by_rows = weight.ref, weight.transposed
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
