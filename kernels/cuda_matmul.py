"""MatMul with matrices that lie in a GPU's memory.

Dims: M rows, K common, N columns; leading dims as NumPy's.

Beside the CPU a product begins at once and goes on by itself: what comes back is waited for when
somebody looks at it, so that products of one input overlap, and the CPU works meanwhile.
"""

import math

import numpy as np

from ..registry import op
from .cuda_forms import padded
from .cuda_matrix import DeviceMatrix, product_launches
from . import fused  # noqa: F401
from .cuda_rows import on_gpu
from .lowered import FEW_ROWS
from .matmul import USES, lower_matmul, matmul, packing_bytes


def lower_device_matmul(a, b):
    """What is on the GPU is no business of a table."""
    return None if isinstance(b, DeviceMatrix) else lower_matmul(a, b)


@op("MatMul", since=1, device="offload", native=("b",), packs=("b",), uses=USES,
    lower=lower_device_matmul, working=packing_bytes)  # fmt: skip
def device_matmul(a, b):
    """a (..., M, K) times b (K, N), on the GPU if b lies there, else on the CPU."""
    if isinstance(b, DeviceMatrix):
        return b.product(np.asarray(a))
    return matmul(a, b)


@on_gpu("MatMul", 0, 1)
def matmul_there(rows, a, b):
    """a (..., M, K) float times a DeviceMatrix (K, N) -> (..., M, N)."""
    return _products(rows, a, b)


@on_gpu("MatMuls", 0, 1, 2, 3, domain="onnxstream_nb")
def matmuls_there(rows, a, *matrices):
    """a (..., M, K) float times each DeviceMatrix (K, N) -> (..., M, N) of each."""
    return _products(rows, a, *matrices)


def _products(rows, a, *matrices):
    if not all(isinstance(m, DeviceMatrix) and m.board is not None for m in matrices):
        return None
    k, *others = {m.shape[0] for m in matrices}
    if others or a.shape[-1:] != (k,) or k != padded(k):
        return None
    m = math.prod(a.shape[:-1])
    results = [rows.room((*a.shape[:-1], matrix.shape[1]), a.dtype) for matrix in matrices]
    half, room = 0, max(matrix.scratch(m) for matrix in matrices)
    if m > FEW_ROWS:
        half = rows.room((m, k // 2)).address
    scratch = rows.room((room // 4,)).address if room else 0
    where = matrices, rows.address(a), [y.address for y in results]
    for launch in product_launches(*where, m, rows.board.device.capability, half, scratch):
        rows.add(*launch)
    return rows.giving(*results)
