"""Tiles of fast products with panels: a few rows of X times two panels, in registers.

Dims: R = ROWS rows of X, P = PANELS panels of 16 rows of W; a tile is (R, P, 16) float32. `q` and
`r` are a group of one panel and of the other in quads (8, 16, 4), `x` the group's R records.

A fast record is one of quads.py with 8 bits of the activations, x = scale low: RECORD bytes, (32,)
int8 and then the same fields. An element of X that is read serves both panels, and a quad of W all
rows; each of the tile's sums waits only for itself.
"""

import numpy as np
from llvmlite import ir
from numba import types

from .quads import (
    MINUS_8, MINUS_32_FIRST, MINUS_32_LAST, MINUS_128, SCALE, SUM, ZERO, four_products, rounded,
    twin_rounded, u8x512,
)  # fmt: skip
from .simd import (
    FLOAT, I32, I64, VI8, VI32, Vector, address, broadcast, call, f32x16, lanes_from, load,
    primitive, read_memory, store, vector_of, write_memory,
)  # fmt: skip
from .vector import f32, i64

ROWS, PANELS = 2, 2
SHAPE, SIZE = (ROWS, PANELS, 16), ROWS * PANELS * 16
LIMIT = 127  # the largest integer
RECORD = 64
BEFORE = -32  # where a field is, of where quads.py says: it has two parts
ROW_BYTES = 64 * PANELS  # of a tile
WIDE = vector_of(FLOAT, SIZE)

tile = Vector("tile", WIDE)


# -- helpers -------------------------------------------------------------------------------------


def _quad(b, q, i):
    """Quad i of a group."""
    return b.shuffle_vector(q, ir.Constant(q.type, ir.Undefined), lanes_from(16 * i, 16))


def _joined(b, parts):
    """A tile's vectors, by rows and panels, one behind the other."""
    while len(parts) > 1:
        order = lanes_from(0, 2 * parts[0].type.count)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [b.shuffle_vector(x, y, order) for x, y in pairs]
    return parts[0]


def _at(b, where, offset):
    return b.add(where, ir.Constant(I64, offset))


def _fields(b, x, field, kind):
    """A field of each of R records."""
    return [load(b, _at(b, x, RECORD * i + BEFORE + field), kind) for i in range(ROWS)]


def _read_fields(x, field, dtype):
    """The same for the twins, (R, 1, 1)."""
    found = [read_memory(x + RECORD * i + BEFORE + field, dtype, 1) for i in range(ROWS)]
    return np.reshape(found, (ROWS, 1, 1))


def _quiet(function):
    def twin(*operands):
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite stays so
            return np.float32(function(*operands))

    return twin


# -- tiles ---------------------------------------------------------------------------------------


@primitive(tile, address, twin=lambda p: read_memory(p, np.float32, SIZE).reshape(SHAPE))
def load_tile(b, p):
    return load(b, p, WIDE)


@primitive(types.void, address, tile, twin=write_memory)
def store_tile(b, p, x):
    store(b, x, p)


@primitive(tile, f32x16, f32x16, twin=lambda x, y: np.broadcast_to([x, y], SHAPE))
def by_panel(b, x, y):
    """(16,) of each panel, for all rows."""
    return _joined(b, [x, y] * ROWS)


def _by_row(field):
    def twin(x):
        return np.broadcast_to(_read_fields(x, field, np.float32), SHAPE)

    def generate(b, x):
        rows = [broadcast(b, value) for value in _fields(b, x, field, FLOAT)]
        return _joined(b, [row for row in rows for _ in range(PANELS)])

    generate.__name__ = f"field_{field}"
    return primitive(tile, address, twin=twin)(generate)


scales_by_row, sums_by_row = _by_row(SCALE), _by_row(SUM)
"""The records' scales, and scale times sum, for all columns."""


@primitive(tile, tile, tile, twin=_quiet(np.multiply))
def mul_tiles(b, x, y):
    return b.fmul(x, y)


@primitive(tile, tile, tile, tile, twin=_quiet(lambda x, y, z: x * y + z))
def fma_tiles(b, x, y, z):
    """x * y + z, in one rounding where the CPU has it."""
    return call(b, f"llvm.fmuladd.v{SIZE}f32", WIDE, [x, y, z])


# -- products ------------------------------------------------------------------------------------


def _products(q, r, x, first, last):
    """Quads first .. last times the records' elements, (R, P, 16) int32, for the twins."""
    quads = np.stack([v.reshape(8, 16, 4)[first:last].astype(np.int32) for v in (q, r)])
    rows = np.stack([read_memory(x + RECORD * i, np.int8, 32) for i in range(ROWS)])
    elements = rows.astype(np.int32).reshape(ROWS, 8, 4)[:, first:last]
    return np.einsum("pjwe,ije->ipw", quads, elements)


def _sums(b, panels, x, first, last, sums):
    """`sums` (R P vectors of int32) plus such products, as float32."""
    for j in range(first, last):
        quads = [_quad(b, q, j) for q in panels]
        for i in range(ROWS):
            element = broadcast(b, load(b, _at(b, x, RECORD * i + 4 * j), I32), VI32)
            for n in range(PANELS * i, PANELS * i + PANELS):
                sums[n] = four_products(b, sums[n], quads[n % PANELS], element)
    return b.sitofp(_joined(b, sums), WIDE)


def _dots(first, last, field, name):
    """Products of quads first .. last with the records' elements, plus a field of theirs."""

    def twin(q, r, x):
        return np.float32(_products(q, r, x, first, last) + _read_fields(x, field, np.int32))

    def generate(b, q, r, x):
        rows = [broadcast(b, start, VI32) for start in _fields(b, x, field, I32)]
        sums = [row for row in rows for _ in range(PANELS)]
        return _sums(b, (q, r), x, first, last, sums)

    generate.__name__ = name
    return primitive(tile, u8x512, u8x512, address, twin=twin)(generate)


dots = {field: _dots(0, 8, field, f"dots_{field}") for field in (MINUS_8, MINUS_128, ZERO)}
"""By the field that the sums start with."""
dots_first = _dots(0, 4, MINUS_32_FIRST, "dots_first")
dots_last = _dots(4, 8, MINUS_32_LAST, "dots_last")
"""The same for the first 16 elements, and for the last."""


def _dots_above(first, last, field, bits, name):
    """The same less each row of W's own zero point: (16,) uint8 for either panel; `field` is minus
    2 ** bits the elements' sum."""

    def twin(q, r, x, zeros, more):
        minus = _read_fields(x, field, np.int32) >> bits
        points = np.stack([read_memory(p, np.uint8, 16) for p in (zeros, more)])
        return np.float32(_products(q, r, x, first, last) + points.astype(np.int32) * minus)

    def generate(b, q, r, x, zeros, more):
        points = [b.zext(load(b, p, VI8), VI32) for p in (zeros, more)]
        down = ir.Constant(I32, bits)
        minus = [broadcast(b, b.ashr(v, down), VI32) for v in _fields(b, x, field, I32)]
        sums = [b.mul(point, row) for row in minus for point in points]
        return _sums(b, (q, r), x, first, last, sums)

    generate.__name__ = name
    return primitive(tile, u8x512, u8x512, *3 * [address], twin=twin)(generate)


dots_above = _dots_above(0, 8, MINUS_8, 3, "dots_above")
dots_above_first = _dots_above(0, 4, MINUS_32_FIRST, 5, "dots_above_first")
dots_above_last = _dots_above(4, 8, MINUS_32_LAST, 5, "dots_above_last")


# -- records -------------------------------------------------------------------------------------


def _twin_narrow(x, inverse, out):
    whole = twin_rounded(x, inverse)
    write_memory(out, whole.astype(np.int8))
    return int(whole.sum())


@primitive(i64, address, f32, address, twin=_twin_narrow)
def narrow16(b, x, inverse, out):
    """16 floats at x times `inverse`, rounded -> (16,) int8 at out; their sum."""
    whole = rounded(b, x, inverse)
    store(b, b.trunc(whole, VI8), out)
    return b.sext(call(b, "llvm.vector.reduce.add.v16i32", I32, [whole]), I64)
