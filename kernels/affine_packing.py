"""Filling the panels of quantised matrices (affine.py), a part of the matrix at a time.

Dims: a matrix (K, N), stored by rows (N, K) or by columns (K, N) as MatMul's factor is exported; B
scales along K. A piece of a part is `count` of its stored rows, from row `first` on, which is a
multiple of PIECE; rows `start` to `stop` of the N, whole panels of them, are packed at a time.
"""

import numpy as np

from ..registry import kernels
from .affine import HEAD, SHARED, geometry
from .jit import arg, inline, jit, kernel, share
from .quads import (
    byte_words, nibble_words, peek_i32, peek_u16, poke_i32, poke_u8, poke_u16, store_words,
    with_upper_words,
)  # fmt: skip
from .threads import team
from .vector import peek_u8

PIECE = 64  # rows of 4-bit elements begin with a byte, groups and panels are whole
LEAST = {"int4": 8, "uint4": 0, "int8": 128, "uint8": 0}
"""What makes stored integers unsigned when it is added."""


@inline
def place(panels, g, each, unit_bytes, group_bytes):
    """The address of group g's quads, in panels whose first unit's quads begin at `panels`; a unit
    has those of `each` groups."""
    unit = g // each
    return panels + unit_bytes * unit + group_bytes * (g - each * unit)


@inline
def spread(word):
    """Eight nibbles of 32 bits -> a byte each."""
    x = word & 0xFFFFFFFF
    x = (x | (x << 16)) & 0x0000FFFF0000FFFF
    x = (x | (x << 8)) & 0x00FF00FF00FF00FF
    return (x | (x << 4)) & 0x0F0F0F0F0F0F0F0F


@jit
def row_group8(row, g, flip, out):
    """Group g of a row of bytes -> its lane of quads at out."""
    for j in range(8):
        poke_i32(out + 64 * j, peek_i32(row + 32 * g + 4 * j) ^ flip)


@jit
def row_group4(row, g, flip, out):
    """Group g of a row of nibbles -> its lane: byte j holds elements j and 16 + j."""
    for j in range(2):
        low, high = peek_i32(row + 16 * g + 4 * j), peek_i32(row + 16 * g + 8 + 4 * j)
        first, second = spread(low), spread(high)
        for half in range(2):
            word = (first >> (32 * half) & 0xFFFFFFFF) | (second >> (32 * half) & 0xFFFFFFFF) << 4
            poke_i32(out + 128 * j + 64 * half, word ^ flip)


@jit
def column_group8(source, k, n, i, lanes, flip, out):
    """Rows k .. k + 31 of bytes (K, N), columns from i on -> quads at out."""
    for j in range(8):
        p = source + (k + 4 * j) * n + i
        if lanes == 16:
            store_words(out + 64 * j, byte_words(p, n), flip)
        else:
            for lane in range(lanes):
                word = 0
                for b in range(4):
                    word |= peek_u8(p + n * b + lane) << (8 * b)
                poke_i32(out + 64 * j + 4 * lane, word ^ flip)


@inline
def nibble(source, i):
    """Element i of packed nibbles, the lower one of a byte first."""
    return (peek_u8(source + (i >> 1)) >> (4 * (i & 1))) & 15


@jit
def column_group4(source, k, n, i, lanes, flip, out):
    """Rows k .. k + 31 of nibbles (K, N), columns from i on -> split quads at out."""
    for j in range(4):
        first = (k + 4 * j) * n + i
        if lanes == 16 and n & 1 == 0:
            low = nibble_words(source + (first >> 1), n >> 1)
            high = nibble_words(source + ((first + 16 * n) >> 1), n >> 1)
            store_words(out + 64 * j, with_upper_words(low, high), flip)
        else:
            for lane in range(lanes):
                word = 0
                for b in range(4):
                    at = first + n * b + lane
                    both = nibble(source, at) | nibble(source, at + 16 * n) << 4
                    word |= both << (8 * b)
                poke_i32(out + 64 * j + 4 * lane, word ^ flip)


@jit
def pack_rows(by_nibbles, args, thread, threads):
    """args: rows, bytes a row, xor, first quads, bytes a panel, groups a unit, its bytes, N,
    K / 32."""
    source, stride, flip, panels, step = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4),
    )  # fmt: skip
    each, unit_bytes, n, groups = arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    start, stop = share(n, 16, thread, threads)
    for i in range(start, stop):
        panel, row, lane = panels + step * (i >> 4), source + stride * i, 4 * (i & 15)
        for g in range(groups):
            if by_nibbles:
                row_group4(row, g, flip, place(panel, g, each, unit_bytes, 256) + lane)
            else:
                row_group8(row, g, flip, place(panel, g, each, unit_bytes, 512) + lane)


@kernel
def pack_affine8_rows(args, thread, threads):
    """Bytes (N, K) -> panels."""
    pack_rows(False, args, thread, threads)


@kernel
def pack_affine4_rows(args, thread, threads):
    """Nibbles (N, K) -> panels."""
    pack_rows(True, args, thread, threads)


@kernel
def pack_affine8_columns(args, thread, threads):
    """Bytes (K, N), a piece -> panels. args: piece, xor, first quads, bytes a panel,
    groups a unit, its bytes, N, its first group, its groups, its first column to pack, how many."""
    source, flip, panels, step = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    each, unit_bytes, n = arg(args, 4), arg(args, 5), arg(args, 6)
    first, groups, column = arg(args, 7), arg(args, 8), arg(args, 9)
    start, stop = share(arg(args, 10), 16, thread, threads)
    for i in range(start, stop, 16):
        panel = panels + step * (i >> 4)
        for g in range(groups):
            out = place(panel, first + g, each, unit_bytes, 512)
            column_group8(source, 32 * g, n, column + i, min(16, stop - i), flip, out)


@kernel
def pack_affine4_columns(args, thread, threads):
    """Nibbles (K, N), a piece -> panels. args: piece, xor, first quads, bytes a panel,
    groups a unit, its bytes, N, its first group, its groups, its first column to pack, how many."""
    source, flip, panels, step = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    each, unit_bytes, n = arg(args, 4), arg(args, 5), arg(args, 6)
    first, groups, column = arg(args, 7), arg(args, 8), arg(args, 9)
    start, stop = share(arg(args, 10), 16, thread, threads)
    for i in range(start, stop, 16):
        panel = panels + step * (i >> 4)
        for g in range(groups):
            out = place(panel, first + g, each, unit_bytes, 256)
            column_group4(source, 32 * g, n, column + i, min(16, stop - i), flip, out)


@kernel
def pack_affine_heads(args, thread, threads):
    """Heads (64,) uint8 of panels. args: panels, how many, bytes a panel, the zero point of all
    units, the five numbers of a head."""
    start, stop = share(arg(args, 1), 16, thread, threads)
    for i in range(start, stop):
        panel = arg(args, 0) + arg(args, 2) * i
        for j in range(5):
            poke_i32(panel + 4 * j, arg(args, 4 + j))
        for lane in range(16):
            poke_u8(panel + SHARED + lane, arg(args, 3))


@inline
def move(source, bits, i, flip, out, lane):
    """Element i -> a lane; of zero points, some bits are turned over."""
    if bits == 16:
        poke_u16(out + 2 * lane, peek_u16(source + 2 * i))
    elif bits == 32:
        poke_i32(out + 4 * lane, peek_i32(source + 4 * i))
    elif bits == 8:
        poke_u8(out + lane, peek_u8(source + i) ^ flip)
    else:
        poke_u8(out + lane, nibble(source, i) ^ flip)


@kernel
def pack_affine_values(args, thread, threads):
    """Scales or zero points (rows, B), a piece -> panels. args: piece, bits an element, xor,
    its first element, elements from row to row, from block to block, where the first go, bytes a
    panel, bytes a unit, rows, blocks, whether a unit is two blocks, bytes from one to the other."""
    source, bits, flip, begin = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    row_step, block_step, out = arg(args, 4), arg(args, 5), arg(args, 6)
    halves, half_bytes = arg(args, 11), arg(args, 12)
    start, stop = share(arg(args, 9), 16, thread, threads)
    for i in range(start, stop, 16):
        panel, lanes = out + arg(args, 7) * (i >> 4), min(16, stop - i)
        for block in range(arg(args, 10)):
            element = begin + row_step * i + block_step * block
            place = panel + arg(args, 8) * (block >> halves) + half_bytes * (block & halves)
            for lane in range(lanes):
                move(source, bits, element + row_step * lane, flip, place, lane)
            for lane in range(lanes * bits // 8, 2 * bits if bits > 8 else 0):
                poke_u8(place + lane, 0)  # scales of rows that are none: finite


def pack_integers(ref, piece, out, first, count, start, stop):
    """A piece of the integers, flat bytes -> the panels of rows `start` to `stop` at `out`."""
    cut, (k, n), part = geometry(ref), ref.shape, ref.parts[0]
    flip, where = LEAST[part.dtype], piece.ctypes.data
    bits = 4 if ref.encoding == "affine4" else 8
    flip *= 0x11111111 if bits == 4 else 0x01010101
    out += HEAD + cut.quads
    head = flip, out, cut.nbytes, cut.groups, cut.unit_bytes
    order = "rows" if part.transposed else "columns"
    kernel = kernels()[f"pack_{ref.encoding}_{order}"]
    if part.transposed:
        stride = part.shape[0] * bits // 8
        panels = (flip, out + cut.nbytes * ((first - start) // 16), *head[2:])
        team().run([(kernel, where, stride, *panels, count, k // 32)])
    else:
        groups = (min(first + count, k) - first) // 32
        team().run([(kernel, where, *head, n, first // 32, groups, start, stop - start)])


def pack_values(ref, index, piece, out, first, start, stop):
    """A piece of the scales or the zero points, as a weight -> the panels of rows `start` to `stop`
    at `out`.

    What is one for all rows or all blocks is written for each of them.
    """
    cut, part, columns = geometry(ref), ref.parts[index], piece.ref.stored_shape[1]
    values, bits = _elements(piece)
    rows, blocks, at, above, source = stop - start, cut.units << cut.halves, 0, 0, 0
    if part.transposed:
        row_step, block_step, above = columns, 1, max(0, first - start)
        rows = rows if part.shape[1] == 1 else piece.shape[1]
    else:
        row_step, block_step, source = 1, columns, start if columns > 1 else 0
        at = first if part.shape[0] > 1 else 0
        blocks = min(blocks - at, piece.shape[0]) if part.shape[0] > 1 else blocks
    steps = source, row_step * (part.shape[1] > 1), block_step * (part.shape[0] > 1)
    place, unit_bytes = HEAD + (cut.before_zeros if index == 2 else 0), cut.unit_bytes
    if index == 2 and not cut.zeros:
        place, unit_bytes, blocks = SHARED, 0, 1
    where = out + cut.nbytes * (above // 16) + place + cut.unit_bytes * (at >> cut.halves)
    halves = int(cut.halves), 16 if index == 2 else cut.scale_bytes
    args = values.ctypes.data, bits, LEAST.get(part.dtype, 0), *steps
    args += where, cut.nbytes, unit_bytes, rows, blocks, *halves
    team().run([(pack_affine_values, *args)])


def _elements(piece):
    """The stored elements of scales or zero points as panels have them, flat, and bits of each."""
    dtype = piece.ref.dtype
    if dtype in ("int4", "uint4"):
        return piece.buffer, 4
    values = piece.stored()
    if dtype == "bfloat16":
        values = values.astype(np.float32)
    return values, 8 * values.itemsize


def pack_heads(ref, out, panels):
    """The geometry into every panel, and the zero points of integers that have none of their own:
    signed ones are above -8 or -128."""
    cut, zero = geometry(ref), LEAST[ref.parts[0].dtype]
    team().run([(pack_affine_heads, out, panels, cut.nbytes, zero, *cut.head)])
