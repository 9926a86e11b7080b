"""Packing stored weights into panels (panels.py, affine.py), where the host profits by it.

Dims: a matrix (K, N) has ceil(N / 16) panels; a block encoding is stored (N, K).
"""

import hashlib
from pathlib import Path

import numpy as np

from ..registry import kernels, op
from .affine import geometry
from .affine_packing import PIECE, pack_heads, pack_integers, pack_values
from .buffers import empty
from .panels import TOKENS
from .quads import SUPPORTED
from .threads import team

LAYOUT = ("affine", "affine_packing", "packing", "panel_groups", "panels", "quads", "six_bits")
"""The files of this package that say what panels are."""


class Packer:
    """Says which weights have panels, and makes them."""

    piece = PIECE  # a piece of a part begins with a multiple of so many stored rows

    @property
    def stamp(self):
        """A hash of what defines panels: those that another version packed may be others."""
        folder, digest = Path(__file__).parent, hashlib.sha256()
        for name in LAYOUT:
            digest.update((folder / f"{name}.py").read_bytes())
        return digest.hexdigest()[:16]

    def panel_bytes(self, ref):
        """Bytes of a panel of 16 rows of a weight (K, N); 0 when it has none, or is packed.

        A block encoding, stored (N, K), has other kernels where panels do not pay; a matrix in
        parts has not.
        """
        if ref.panel:
            return 0
        if ref.parts:
            cut = geometry(ref)
            return 0 if cut is None else cut.nbytes
        token = TOKENS.get(ref.encoding)
        if token is None or not SUPPORTED or len(ref.shape) != 2 or not ref.transposed:
            return 0
        if 0 in ref.shape:
            return 0
        return token.panel_bytes(ref.shape[0])

    def pack(self, ref, rows, out, count):
        """`count` rows (count, bytes a row) uint8 -> panels at address `out`, which hold zeros."""
        k, step = ref.shape[0], self.panel_bytes(ref)
        kernel = kernels()[f"pack_{ref.encoding}"]
        row_bytes = rows.nbytes // count
        team().run([(kernel, rows.ctypes.data, row_bytes, out, step, count, k)])

    def pack_heads(self, ref, out, count):
        """Begin the panels of `count` rows of a weight in parts at address `out`."""
        pack_heads(ref, out, -(-count // 16))

    def pack_part(self, ref, index, piece, out, first, count, start, stop):
        """Of part `index`, `count` stored rows from `first` on, as a weight -> the panels of rows
        `start` to `stop` of N, at `out`."""
        if index == 0:
            pack_integers(ref, piece.buffer, out, first, count, start, stop)
        else:
            pack_values(ref, index, piece, out, first, start, stop)


class Panels:
    """A weight in parts, or a tile of one, packed for one product.

    `first` is the first of its outputs, or of its inputs `begin`, of the whole weight's.
    """

    order, in_tiles = "panels", False

    def __init__(self, weight):
        packer, n = Packer(), weight.shape[1]
        self.first = weight.first if weight.transposed else 0
        self.begin = weight.first - self.first
        self.shape, self.encoding = weight.shape, weight.encoding
        self.row_bytes = packer.panel_bytes(weight.ref)
        self._memory = empty(-(-n // 16) * self.row_bytes + 64, np.uint8)
        self.address = (self._memory.ctypes.data + 63) // 64 * 64
        packer.pack_heads(weight.ref, self.address, n)
        for i, part in enumerate(weight.parts):
            rows = part.ref.stored_shape[0]
            packer.pack_part(weight.ref, i, part, self.address, 0, rows, 0, n)

    def tiles(self):
        """All of them at once."""
        yield self


@op("Panels", domain="onnxstream_nb")
def panels():
    """What packs weights."""
    return Packer()
