"""MatMul with matrices that lie in a GPU's memory.

Dims: M rows, K common, N columns; leading dims as NumPy's.

Beside the CPU a product begins at once and goes on by itself: what comes back is waited for when
somebody looks at it, so that products of one input overlap, and the CPU works meanwhile.
"""

import numpy as np

from ..registry import op
from .cuda_forms import padded
from .cuda_matrix import DeviceMatrix
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
    if not isinstance(b, DeviceMatrix) or b.board is None or not a.ndim:
        return None
    k, n = b.shape
    if k != padded(k) or a.shape[-1] != k:
        return None
    m = a.size // k if k else 0
    y, half, scratch = rows.room((*a.shape[:-1], n), a.dtype), 0, b.scratch(m)
    if m > FEW_ROWS:
        half = rows.room((m, k // 2)).address
    where = rows.address(a), y.address, half, m, rows.board.device.capability
    room = rows.room((scratch // 4,)).address if scratch else 0
    for launch in b.launches(*where, room):
        rows.add(*launch)
    return rows.giving(y)
