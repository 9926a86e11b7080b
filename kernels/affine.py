"""Panels of quantised matrices as ONNX has them: integers, scales and zero points in parts.

Dims: a panel holds 16 rows of K elements in groups of 32; `block` elements share a scale, the
groups of a block are a unit. The panel begins with its head of 64 bytes: its geometry (int32 each:
2 ** 30 / groups a unit, rounded up, or 0 for one unit; groups a unit; bytes a unit; where a unit's
quads begin; 1 when its scales are float16, plus 2 when it has zero points, plus 4 when it has two
of each), and from byte 32 on zero points that are the same in all units, (16,) uint8. A unit is the
rows' scales, (16,) float16 or float32 as they are stored, their zero points, (16,) uint8, where
units have their own, and the quads of its groups (quads.py), of 4 or 8 bits an element. With blocks
of 16 a unit is a group, and has scales (2, 16) and zero points (2, 16) of its halves. A row's own
element is scale (q - zero point), q unsigned.

So 4 bits with a float16 scale for 32 of them take 4.5 bits, as in GGUF's q4_0, and with a zero
point 4.75. A matrix with one scale a row has one unit, so that 8 bits take 8 bits.
"""

from dataclasses import dataclass

from .jit import inline
from .panels import PanelEncoding
from .quads import load_quads, load_split_quads, peek_i32
from .vector import load_f16, load_f32

HEAD = 64
SHARED = 32  # where the head has the zero points of all units
ONE = 30  # bits of a fraction: what units have of a group
HALF, ZEROS, HALVES = 1, 2, 4  # what a head says of units
BITS = {"affine4": 4, "affine8": 8}


@dataclass(frozen=True, slots=True)
class Geometry:
    """How panels of one weight are cut: units, groups in each, bits an element, whether scales
    are float16, whether units have zero points of their own, whether their halves have."""

    units: int
    groups: int
    bits: int
    half: bool
    zeros: bool
    halves: bool

    @property
    def head(self):
        """What a panel's head says, integers."""
        part = 0 if self.units == 1 else -(-(1 << ONE) // self.groups)
        flags = HALF * self.half + ZEROS * self.zeros + HALVES * self.halves
        return part, self.groups, self.unit_bytes, self.quads, flags

    @property
    def scale_bytes(self):
        """Bytes of 16 scales."""
        return 32 if self.half else 64

    @property
    def before_zeros(self):
        """Where a unit's zero points begin, behind its scales."""
        return self.scale_bytes << self.halves

    @property
    def quads(self):
        """Where a unit's quads begin."""
        return self.before_zeros + (16 * self.zeros << self.halves)

    @property
    def unit_bytes(self):
        """Bytes of a unit."""
        return self.quads + 64 * self.bits * self.groups

    @property
    def nbytes(self):
        """Bytes of a panel, up to the next one's alignment."""
        return -(-(HEAD + self.units * self.unit_bytes) // 64) * 64


def geometry(ref):
    """The panels of a weight in parts, or None when it has none (`WeightRef.in_groups`)."""
    k, n = ref.shape
    if not n or not ref.in_groups:
        return None
    _, scales, *zeros = ref.parts
    own = any(part.shape != (1, 1) for part in zeros)
    kind = BITS[ref.encoding], scales.dtype == "float16", own
    each = k // 32 if ref.block >= k else max(1, ref.block // 32)
    return Geometry(-(-k // (32 * each)), each, *kind, ref.block == 16 and k > 16)


@inline
def scales_of(unit, flags):
    """The scales (16,) of a unit."""
    return load_f16(unit) if flags & HALF else load_f32(unit)


@inline
def unit_of(panel, g):
    """Group g: the addresses of its unit, its zero points and the unit's quads, its number among
    the unit's groups, what the head says of units."""
    quads, flags = peek_i32(panel + 12), peek_i32(panel + 16)
    number = (g * peek_i32(panel)) >> ONE
    unit = panel + HEAD + peek_i32(panel + 8) * number
    zeros = panel + SHARED
    if flags & ZEROS:
        zeros = unit + quads - (32 if flags & HALVES else 16)
    return unit, zeros, unit + quads, g - peek_i32(panel + 4) * number, flags


@inline
def scales_and_points(unit, zeros, flags):
    """The scales (16,) of a unit, those of its last 16 elements where it has two, the addresses of
    the zero points of either, what the head says of units."""
    first = last = scales_of(unit, flags)
    if flags & HALVES:
        last = scales_of(unit + (32 if flags & HALF else 64), flags)
    return first, last, zeros, zeros + 8 * (flags & ZEROS), flags


@inline
def read_affine4(panel, g):
    """Quads, and what `scales_and_points` gives."""
    unit, zeros, quads, i, flags = unit_of(panel, g)
    return load_split_quads(quads + 256 * i), *scales_and_points(unit, zeros, flags)


@inline
def read_affine8(panel, g):
    unit, zeros, quads, i, flags = unit_of(panel, g)
    return load_quads(quads + 512 * i), *scales_and_points(unit, zeros, flags)


AFFINE4 = PanelEncoding("affine4_panels", 1, 0, None, read_affine4, "above")
AFFINE8 = PanelEncoding("affine8_panels", 1, 0, None, read_affine8, "above")
