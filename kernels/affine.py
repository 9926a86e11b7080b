"""Panels of quantised matrices as ONNX has them: integers, scales and zero points in parts.

Dims: a panel holds 16 rows of K elements in groups of 32; `block` elements share a scale, the
groups of a block are a unit. The panel begins with its head of 64 bytes: its geometry (int32 each:
the shift from a group to its unit, bytes a unit, where a unit's quads begin, whether its scales are
float16, whether it has zero points), and from byte 32 on zero points that are the same in all
units, (16,) uint8. A unit is the rows' scales, (16,) float16 or float32 as they are stored, their
zero points, (16,) uint8, where units have their own, and the quads of its groups (quads.py), of 4
or 8 bits an element. A row's own element is scale (q - zero point), q unsigned.

So 4 bits with a float16 scale for 32 of them take 4.5 bits, as in GGUF's q4_0, and with a zero
point 4.75. A matrix with one scale a row has one unit, so that 8 bits take 8 bits.
"""

from dataclasses import dataclass

from .jit import inline, jit
from .panels import PanelEncoding
from .quads import RECORD, SCALE, dot_above, load_quads, load_split_quads, peek_i32
from .vector import fma, load_f16, load_f32, mul, peek_f32, splat, store_f32

HEAD = 64
SHARED = 32  # where the head has the zero points of all units
ONE_UNIT = 31  # the shift that takes every group to unit 0
INTEGERS = ("int4", "uint4", "int8", "uint8")
BITS = {"affine4": 4, "affine8": 8}


@dataclass(frozen=True, slots=True)
class Geometry:
    """How panels of one weight are cut: units, groups in each, bits an element, whether scales
    are float16, whether units have zero points of their own; and what their heads say."""

    units: int
    shift: int
    groups: int
    bits: int
    half: bool
    zeros: bool

    @property
    def scale_bytes(self):
        """Bytes of a unit's scales, behind which its zero points begin."""
        return 32 if self.half else 64

    @property
    def quads(self):
        """Where a unit's quads begin."""
        return self.scale_bytes + 16 * self.zeros

    @property
    def unit_bytes(self):
        """Bytes of a unit."""
        return self.quads + 64 * self.bits * self.groups

    @property
    def nbytes(self):
        """Bytes of a panel, up to the next one's alignment."""
        return -(-(HEAD + self.units * self.unit_bytes) // 64) * 64


def geometry(ref):
    """The panels of a weight in parts, or None when it has none: blocks that no group fills or that
    are no power of two, an end that is no group, zero points that are no integers."""
    k, n = ref.shape
    _, scales, *zeros = ref.parts
    groups, each = k // 32, ref.block // 32
    if ref.block_axis or not n or not k or k % 32:
        return None
    if any(part.dtype not in INTEGERS for part in zeros):
        return None
    own = any(part.shape != (1, 1) for part in zeros)
    kind = BITS[ref.encoding], scales.dtype == "float16", own
    if ref.block >= k:
        return Geometry(1, ONE_UNIT, groups, *kind)
    if ref.block % 32 or each & (each - 1):
        return None
    return Geometry(-(-groups // each), each.bit_length() - 1, each, *kind)


@jit
def add_above(q, scale, zeros, x, rows, out):
    """out (rows, 16) += scale times (q minus the zero points, times each record)."""
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        store_f32(total, fma(dot_above(q, record, zeros), factor, load_f32(total)))


@inline
def unit_of(panel, g):
    """Group g: addresses of its unit, its zero points and the unit's quads, its number there."""
    shift, quads = peek_i32(panel), peek_i32(panel + 8)
    number = g >> shift
    unit = panel + HEAD + peek_i32(panel + 4) * number
    zeros = unit + quads - 16 if peek_i32(panel + 16) else panel + SHARED
    return unit, zeros, unit + quads, g - (number << shift)


@inline
def scales_of(panel, unit):
    """The scales (16,) of a unit."""
    return load_f16(unit) if peek_i32(panel + 12) else load_f32(unit)


@inline
def add_affine4(panel, g, x, rows, out):
    unit, zeros, quads, i = unit_of(panel, g)
    add_above(load_split_quads(quads + 256 * i), scales_of(panel, unit), zeros, x, rows, out)


@inline
def add_affine8(panel, g, x, rows, out):
    unit, zeros, quads, i = unit_of(panel, g)
    add_above(load_quads(quads + 512 * i), scales_of(panel, unit), zeros, x, rows, out)


AFFINE4 = PanelEncoding("affine4_panels", 1, 1, 0, add_affine4, None)
AFFINE8 = PanelEncoding("affine8_panels", 1, 1, 0, add_affine8, None)
