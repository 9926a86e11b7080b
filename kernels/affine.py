"""Panels of quantised matrices as ONNX has them: integers, scales and zero points in parts.

Dims: a panel holds 16 rows of K elements in groups of 32; `block` elements share a scale, the
groups of a block are a unit. The panel begins with its geometry (int32 each: the shift from a group
to its unit, bytes a unit, where the zero points are), 64 bytes in all. A unit is the rows' scales,
(16,) float32, and the quads of its groups (quads.py), of 4 or 8 bits an element. Behind the units
lie the zero points, (units, 16) uint8: a row's own element is scale (q - zero point), q unsigned.

A matrix with one scale a row has one unit, so that 8 bits take 8 bits.
"""

from dataclasses import dataclass

from .jit import inline, jit
from .panels import PanelEncoding
from .quads import RECORD, SCALE, dot_above, load_quads, load_split_quads, peek_i32
from .vector import fma, load_f32, mul, peek_f32, splat, store_f32

HEAD = 64
ONE_UNIT = 31  # the shift that takes every group to unit 0
INTEGERS = ("int4", "uint4", "int8", "uint8")
BITS = {"affine4": 4, "affine8": 8}


@dataclass(frozen=True, slots=True)
class Geometry:
    """How panels of one weight are cut: units and what a panel's head says of them."""

    units: int
    shift: int
    unit_bytes: int

    @property
    def zeros(self):
        """Where the zero points begin."""
        return HEAD + self.units * self.unit_bytes

    @property
    def nbytes(self):
        """Bytes of a panel, up to the next one's alignment."""
        return -(-(self.zeros + 16 * self.units) // 64) * 64


def geometry(ref):
    """The panels of a weight in parts, or None when it has none: blocks that no group fills or that
    are no power of two, an end that is no group, zero points that are no integers."""
    k, n = ref.shape
    if ref.block_axis:
        return None
    groups, each, bits = k // 32, ref.block // 32, BITS[ref.encoding]
    if not n or not k or k % 32 or any(part.dtype not in INTEGERS for part in ref.parts[2:]):
        return None
    if ref.block >= k:
        return Geometry(1, ONE_UNIT, 64 + 64 * bits * groups)
    if ref.block % 32 or each & (each - 1):
        return None
    return Geometry(-(-groups // each), each.bit_length() - 1, 64 + 64 * bits * each)


@jit
def add_above(q, scale, zeros, x, rows, out):
    """out (rows, 16) += scale times (q minus the zero points, times each record)."""
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        store_f32(total, fma(dot_above(q, record, zeros), factor, load_f32(total)))


@inline
def unit_of(panel, g):
    """Group g: the address of its unit, its number in there, the address of its zero points."""
    shift = peek_i32(panel)
    unit = g >> shift
    zeros = panel + peek_i32(panel + 8) + 16 * unit
    return panel + HEAD + peek_i32(panel + 4) * unit, g - (unit << shift), zeros


@inline
def add_affine4(panel, g, x, rows, out):
    unit, i, zeros = unit_of(panel, g)
    add_above(load_split_quads(unit + 64 + 256 * i), load_f32(unit), zeros, x, rows, out)


@inline
def add_affine8(panel, g, x, rows, out):
    unit, i, zeros = unit_of(panel, g)
    add_above(load_quads(unit + 64 + 512 * i), load_f32(unit), zeros, x, rows, out)


AFFINE4 = PanelEncoding("affine4_panels", 1, 1, 0, add_affine4, None)
AFFINE8 = PanelEncoding("affine8_panels", 1, 1, 0, add_affine8, None)
