"""Filling the panels of quantised matrices (affine.py), a part of the matrix at a time.

Dims: a matrix (K, N), stored by rows (N, K) or by columns (K, N) as MatMul's factor is exported; B
scales along K. A piece of a part is `count` of its stored rows, from row `first` on, which is a
multiple of PIECE; rows `start` to `stop` of the N, whole panels of them, are packed at a time.
"""

import ctypes

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..registry import kernels
from .affine import HEAD, SHARED, geometry
from .jit import arg, inline, jit, kernel, share
from .quads import (
    byte_words, nibble_words, peek_i32, poke_i32, store_words, with_upper_words,
)  # fmt: skip
from .threads import team
from .vector import peek_u8

PIECE = 64  # rows of 4-bit elements begin with a byte, groups and panels are whole
LEAST = {"int4": 8, "uint4": 0, "int8": 128, "uint8": 0}
"""What makes stored integers unsigned when it is added."""


@inline
def place(panels, g, shift, unit_bytes, group_bytes):
    """The address of group g's quads, in panels whose first unit's quads begin at `panels`."""
    unit = g >> shift
    return panels + unit_bytes * unit + group_bytes * (g - (unit << shift))


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
    """args: rows, bytes a row, xor, first quads, bytes a panel, shift, bytes a unit, N, K / 32."""
    source, stride, flip, panels, step = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4),
    )  # fmt: skip
    shift, unit_bytes, n, groups = arg(args, 5), arg(args, 6), arg(args, 7), arg(args, 8)
    start, stop = share(n, 16, thread, threads)
    for i in range(start, stop):
        panel, row, lane = panels + step * (i >> 4), source + stride * i, 4 * (i & 15)
        for g in range(groups):
            if by_nibbles:
                row_group4(row, g, flip, place(panel, g, shift, unit_bytes, 256) + lane)
            else:
                row_group8(row, g, flip, place(panel, g, shift, unit_bytes, 512) + lane)


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
    shift, bytes a unit, N, its first group, its groups, its first column to pack, how many."""
    source, flip, panels, step = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    shift, unit_bytes, n = arg(args, 4), arg(args, 5), arg(args, 6)
    first, groups, column = arg(args, 7), arg(args, 8), arg(args, 9)
    start, stop = share(arg(args, 10), 16, thread, threads)
    for i in range(start, stop, 16):
        panel = panels + step * (i >> 4)
        for g in range(groups):
            out = place(panel, first + g, shift, unit_bytes, 512)
            column_group8(source, 32 * g, n, column + i, min(16, stop - i), flip, out)


@kernel
def pack_affine4_columns(args, thread, threads):
    """Nibbles (K, N), a piece -> panels. args: piece, xor, first quads, bytes a panel,
    shift, bytes a unit, N, its first group, its groups, its first column to pack, how many."""
    source, flip, panels, step = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    shift, unit_bytes, n = arg(args, 4), arg(args, 5), arg(args, 6)
    first, groups, column = arg(args, 7), arg(args, 8), arg(args, 9)
    start, stop = share(arg(args, 10), 16, thread, threads)
    for i in range(start, stop, 16):
        panel = panels + step * (i >> 4)
        for g in range(groups):
            out = place(panel, first + g, shift, unit_bytes, 256)
            column_group4(source, 32 * g, n, column + i, min(16, stop - i), flip, out)


def pack_integers(ref, piece, out, first, count, start, stop):
    """A piece of the integers, flat bytes -> the panels of rows `start` to `stop` at `out`."""
    cut, (k, n), part = geometry(ref), ref.shape, ref.parts[0]
    flip, where = LEAST[part.dtype], piece.ctypes.data
    bits = 4 if ref.encoding == "affine4" else 8
    flip *= 0x11111111 if bits == 4 else 0x01010101
    out += HEAD + cut.quads
    head = flip, out, cut.nbytes, cut.shift, cut.unit_bytes
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
    """A piece of the scales or the zero points, as stored (rows, ...) -> the panels of rows `start`
    to `stop` at `out`.

    What is one for all rows or all blocks is written for each of them.
    """
    cut, n, part = geometry(ref), stop - start, ref.parts[index]
    values = piece.T if part.transposed else piece
    at, above = (0, max(0, first - start)) if part.transposed else (first, 0)
    values = values[: cut.units - at]
    if not part.transposed and part.shape[1] > 1:
        values = values[:, start:stop]
    if index == 2:
        values = (values.astype(np.int16) + LEAST[part.dtype]).astype(np.uint8)
        if not cut.zeros:
            view(out, np.uint8, -(-n // 16), cut, SHARED, 0)[:] = values
            return
    units = cut.units if part.shape[0] == 1 else len(values)
    columns = n if part.shape[1] == 1 else values.shape[1]
    panels = -(-columns // 16)
    kind = np.uint8 if index == 2 else np.float16 if cut.half else np.float32
    lanes = np.zeros((units, 16 * panels), kind)
    lanes[:, :columns] = values
    place = HEAD + (cut.scale_bytes if index == 2 else 0)
    every = view(out, kind, -(-n // 16), cut, place, cut.unit_bytes)
    every[above // 16 : above // 16 + panels, at : at + units] = lanes.reshape(
        units, panels, 16
    ).transpose(1, 0, 2)


def pack_heads(ref, out, panels):
    """The geometry into every panel, and the zero points of integers that have none of their own:
    signed ones are above -8 or -128."""
    cut = geometry(ref)
    head = view(out, np.int32, panels, cut, 0, 0)[:, 0]
    head[:, :5] = cut.shift, cut.unit_bytes, cut.quads, cut.half, cut.zeros
    view(out, np.uint8, panels, cut, SHARED, 0)[:] = LEAST[ref.parts[0].dtype]


def view(out, kind, panels, cut, start, step):
    """Panels at an address: (panels, units, 16) elements, from byte `start` of each, the units
    `step` bytes apart; those of all units, one for them, with `step` 0."""
    memory = (ctypes.c_uint8 * (panels * cut.nbytes)).from_address(out)
    flat = np.frombuffer(memory, np.uint8)[start:]
    size = np.dtype(kind).itemsize
    elements = flat[: flat.size // size * size].view(kind)
    units = cut.units if step else 1
    return as_strided(elements, (panels, units, 16), (cut.nbytes, step, size))
