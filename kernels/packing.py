"""Packing stored rows of block encodings into panels (panels.py), where the host profits by it."""

import numpy as np

from ..registry import kernels, op
from .buffers import private_memory
from .panels import TOKENS
from .quads import SUPPORTED
from .threads import team


class Packer:
    """Says which weights have panels, and makes them."""

    def panel_bytes(self, ref):
        """Bytes of a panel of 16 rows of a weight (K, N) stored (N, K); 0 when it has none."""
        token = TOKENS.get(ref.encoding)
        if token is None or not SUPPORTED or len(ref.shape) != 2 or not ref.transposed:
            return 0
        if 0 in ref.shape:
            return 0
        return token.panel_bytes(ref.shape[0])

    def memory(self, size):
        """Zeroed memory for panels (size,) uint8."""
        return np.frombuffer(private_memory(size), np.uint8) if size else np.zeros(0, np.uint8)

    def pack(self, ref, rows, out, count):
        """`count` rows (count, bytes a row) uint8 -> panels at address `out`, which hold zeros."""
        k, step = ref.shape[0], self.panel_bytes(ref)
        kernel = kernels()[f"pack_{ref.encoding}"]
        row_bytes = rows.nbytes // count
        team().run([(kernel, rows.ctypes.data, row_bytes, out, step, count, k)])


@op("Panels", domain="onnxstream_nb")
def panels():
    """What packs weights."""
    return Packer()
