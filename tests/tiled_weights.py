"""Weights that come in tiles, without a stream: each tile's bytes are gone when the next comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from panel_oracles import packed_weight

from onnxstream_nb.weights import DiskProvider, Weight

GONE = 0xFF  # of floats: NaN


class Tiled(Weight):
    """A matrix whose stored rows come from cut to cut; those up to the first may be in panels."""

    __slots__ = ("cuts", "in_panels", "rows")
    in_tiles = True

    def __init__(self, weight: Weight, cuts: Sequence[int], in_panels: bool = False) -> None:
        super().__init__(weight.ref, np.empty(0, np.uint8))
        self.rows = weight.buffer.reshape(weight.ref.stored_shape[0], -1)
        self.cuts, self.in_panels = (*cuts, len(self.rows)), in_panels

    def tiles(self) -> Iterator[Weight]:
        for start, stop in pairwise((0, *self.cuts)):
            rows = self.rows[start:stop]
            if self.in_panels and start == 0:
                yield packed_weight(self.encoding, rows, self.ref.stored_shape[1])
                continue
            buffer = rows.reshape(-1).copy()
            tile = Weight(self.ref.rows(start, stop), buffer)
            tile.first = start
            yield tile
            buffer[:] = GONE

    def whole(self) -> Weight:
        return Weight(self.ref, self.rows.reshape(-1).copy())


class TiledParts(Weight):
    """A matrix in parts whose stored rows come in tiles of as many as stay together."""

    __slots__ = ()
    in_tiles = True

    def __init__(self, weight: Weight) -> None:
        super().__init__(weight.ref, np.empty(0, np.uint8))

    def tiles(self) -> Iterator[Weight]:
        rows, together = self.ref.stored_shape[0], self.ref.unit[0]
        for start in range(0, rows, together):
            part = self.ref.rows(start, min(rows, start + together))
            buffer = DiskProvider().get(part).buffer.copy()
            tile = Weight(part, buffer)
            tile.first = start
            yield tile
            buffer[:] = GONE
