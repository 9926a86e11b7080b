"""Sine and cosine on a GPU, also of large angles: positions times frequencies.

Dims: none; functions of one float32, in radians.

The special function unit's own are off by what its angle is rounded to. Here a multiple of pi / 2
is taken away first, in three parts of pi / 2 and without rounding in between, then polynomials
serve: the error is below 1e-7, and 1.6 units in the last place, up to 1e6; 2e-5 up to 1e7.
Sources: Cody and Waite, "Software Manual for the Elementary Functions" (1980); the polynomials are
those of Moshier's Cephes, sinf.c.
"""

import numpy as np

from .cuda_kernel import device
from .cuda_primitive import assembly, primitive
from .cuda_prims import float32

QUARTERS = 0.6366197723675814  # 2 / pi
FIRST, SECOND, THIRD = 1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15  # pi / 2


def _fused_twin(x, y, z):
    return np.float32(np.float64(x) * np.float64(y) + np.float64(z))


@primitive("f32", "f32", "f32", "f32", twin=_fused_twin)
def fused(ir, builder, x, y, z):
    """x y + z, rounded once; no compiler takes it apart, or puts it together with another."""
    return assembly(ir, builder, "fma.rn.f32 $0, $1, $2, $3;", [ir.FloatType()], [x, y, z])


@primitive("f32", "f32", twin=lambda x: np.rint(np.float32(x)))
def nearest(ir, builder, x):
    """The nearest whole number, of halves the even one."""
    return assembly(ir, builder, "cvt.rni.f32.f32 $0, $1;", [ir.FloatType()], [x])


def _whole_twin(x):
    return int(np.clip(np.float64(x), -(2**31), 2**31 - 1)) if x == x else 0


@primitive("i32", "f32", twin=_whole_twin)
def whole(ir, builder, x):
    """An integer of a whole number; the largest where it is larger, and 0 of what is none."""
    return assembly(ir, builder, "cvt.rzi.s32.f32 $0, $1;", [ir.IntType(32)], [x])


@device
def sine_from(x, quarter):
    """sin(x + quarter pi / 2)."""
    turns = nearest(x * float32(QUARTERS))
    angle = fused(turns, float32(-FIRST), x)
    angle = fused(turns, float32(-SECOND), angle)
    angle = fused(turns, float32(-THIRD), angle)
    square = angle * angle
    sine = float32(-1.9515295891e-4) * square + float32(8.3321608736e-3)
    sine = (sine * square - float32(1.6666654611e-1)) * square * angle + angle
    cosine = float32(2.443315711809948e-5) * square - float32(1.388731625493765e-3)
    cosine = (cosine * square + float32(4.166664568298827e-2)) * square
    cosine = (cosine - float32(0.5)) * square + float32(1)
    quadrant = whole(turns) + quarter
    value = cosine if quadrant & 1 else sine
    return -value if quadrant & 2 else value


@device
def sine(x, parameter):
    """sin(x); no number where x is not finite."""
    return sine_from(x, 0)


@device
def cosine(x, parameter):
    """cos(x); no number where x is not finite."""
    return sine_from(x, 1)
