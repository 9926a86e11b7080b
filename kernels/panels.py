"""Block encodings as panels: 16 rows side by side, the form that products in integers read.

Dims: a panel holds 16 rows of K elements, N rows in N / 16 panels, the last filled up with zeros.
It is cut into units of 64 elements (256 for the K encodings) that begin with the scales of the 16
rows; the rows' quantised elements follow in quads, 4 bytes of each row in turn (quads.py). The
elements keep the bit positions that they have in GGUF's blocks, so that packing moves whole words.

An encoding is a token (encoding.py): `add(panel, g, x, rows, out)` adds group g of 16 weight rows
times `rows` records at x to `rows` vectors (16,) at out; `pack(row, i, panel, lane)` moves block i
of one row into its place.
"""

from numba.extending import overload

from .encoding import Token
from .jit import inline, jit
from .quads import (
    MINUS_8, MINUS_32_FIRST, MINUS_32_LAST, MINUS_128, RECORD, SCALE, SUM, ZERO, dot, dot_first,
    dot_last, load_nibble_quads, load_quads, load_split_quads, peek_i32, peek_u16, poke_i32,
    poke_u8, poke_u16, with_bit, with_two_bits,
)  # fmt: skip
from .simd import JIT
from .vector import (
    fma,
    load_f16,
    load_f32,
    load_i8,
    load_u8,
    mul,
    peek_f32,
    peek_u8,
    splat,
    store_f32,
)


class PanelEncoding(Token):
    """A block encoding's panels: groups a block, groups a unit, bytes a unit of 16 rows.

    `read(panel, g)` gives a group's quads and its scales, `form` names how they are multiplied
    (panel_gemm.py), and `start` is the field of a record that their sum starts with.
    """

    def __init__(self, name, block, unit, unit_bytes, add, pack, read, form, start=ZERO):
        self.name, self.block, self.unit, self.unit_bytes = name, block, unit, unit_bytes
        self.add, self.pack, self.read, self.form, self.start = add, pack, read, form, start

    def panel_bytes(self, k):
        """Bytes of a panel of K inputs."""
        return -(-k // (32 * self.unit)) * self.unit_bytes


@jit
def add_scaled(q, scale, start, x, rows, out):
    """out (rows, 16) += scale times (q times each record, which starts with its field `start`)."""
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        store_f32(total, fma(dot(q, record, record + start), factor, load_f32(total)))


@jit
def add_affine(q, scale, offset, x, rows, out):
    """out (rows, 16) += scale times (q times each record) plus offset times the record's sum."""
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        so_far = fma(offset, splat(peek_f32(record + SUM)), load_f32(total))
        store_f32(total, fma(dot(q, record, record + ZERO), factor, so_far))


@inline
def read_q8_0(panel, g):
    unit, i = panel + 1088 * (g >> 1), g & 1
    return load_quads(unit + 64 + 512 * i), load_f16(unit + 32 * i)


@inline
def add_q8_0(panel, g, x, rows, out):
    q, scale = read_q8_0(panel, g)
    add_scaled(q, scale, MINUS_128, x, rows, out)


@inline
def read_q4_0(panel, g):
    unit, i = panel + 576 * (g >> 1), g & 1
    return load_split_quads(unit + 64 + 256 * i), load_f16(unit + 32 * i)


@inline
def add_q4_0(panel, g, x, rows, out):
    q, scale = read_q4_0(panel, g)
    add_scaled(q, scale, MINUS_8, x, rows, out)


@inline
def read_q4_1(panel, g):
    unit, i = panel + 640 * (g >> 1), g & 1
    q = load_split_quads(unit + 128 + 256 * i)
    return q, load_f16(unit + 32 * i), load_f16(unit + 64 + 32 * i)


@inline
def add_q4_1(panel, g, x, rows, out):
    q, scale, offset = read_q4_1(panel, g)
    add_affine(q, scale, offset, x, rows, out)


@inline
def k_affine(unit, i):
    """Scale and offset (16,) of group i of a q4_k or q5_k unit."""
    scale = mul(load_f16(unit), load_u8(unit + 64 + 16 * i))
    return scale, mul(mul(load_f16(unit + 32), load_u8(unit + 192 + 16 * i)), splat(-1.0))


@inline
def read_q4_k(panel, g):
    unit, i = panel + 2368 * (g >> 3), g & 7
    q = load_nibble_quads(unit + 320 + 512 * (i >> 1), 4 * (i & 1))
    scale, offset = k_affine(unit, i)
    return q, scale, offset


@inline
def add_q4_k(panel, g, x, rows, out):
    q, scale, offset = read_q4_k(panel, g)
    add_affine(q, scale, offset, x, rows, out)


@inline
def read_q5_k(panel, g):
    unit, i = panel + 2880 * (g >> 3), g & 7
    q = load_nibble_quads(unit + 320 + 512 * (i >> 1), 4 * (i & 1))
    scale, offset = k_affine(unit, i)
    return with_bit(q, unit + 2368, i), scale, offset


@inline
def add_q5_k(panel, g, x, rows, out):
    q, scale, offset = read_q5_k(panel, g)
    add_affine(q, scale, offset, x, rows, out)


@inline
def read_q6_k(panel, g):
    """Quads, and the scales of the first 16 elements and of the last."""
    unit, half, i = panel + 3392 * (g >> 3), (g & 7) >> 2, g & 3
    q = load_nibble_quads(unit + 320 + 1024 * half + 512 * (i & 1), 4 * (i >> 1))
    d, scales = load_f16(unit), unit + 64 + 32 * (g & 7)
    first, last = mul(d, load_i8(scales)), mul(d, load_i8(scales + 16))
    return with_two_bits(q, unit + 2368 + 512 * half, 2 * i), first, last


@inline
def add_q6_k(panel, g, x, rows, out):
    q, first, last = read_q6_k(panel, g)
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = splat(peek_f32(record + SCALE))
        terms = mul(first, dot_first(q, record, record + MINUS_32_FIRST))
        terms = fma(last, dot_last(q, record, record + MINUS_32_LAST), terms)
        store_f32(total, fma(terms, factor, load_f32(total)))


@jit
def move_words(source, count, out):
    """`count` words of 4 bytes -> one a quad."""
    for j in range(count):
        poke_i32(out + 64 * j, peek_i32(source + 4 * j))


@jit
def pack_q8_0(row, i, panel, lane):
    block, unit, half = row + 34 * i, panel + 1088 * (i >> 1), i & 1
    poke_u16(unit + 32 * half + 2 * lane, peek_u16(block))
    for j in range(8):  # plus 128: the instruction multiplies unsigned by signed bytes
        word = peek_i32(block + 2 + 4 * j) ^ 0x80808080
        poke_i32(unit + 64 + 512 * half + 64 * j + 4 * lane, word)


@jit
def pack_q4_0(row, i, panel, lane):
    block, unit, half = row + 18 * i, panel + 576 * (i >> 1), i & 1
    poke_u16(unit + 32 * half + 2 * lane, peek_u16(block))
    move_words(block + 2, 4, unit + 64 + 256 * half + 4 * lane)


@jit
def pack_q4_1(row, i, panel, lane):
    block, unit, half = row + 20 * i, panel + 640 * (i >> 1), i & 1
    poke_u16(unit + 32 * half + 2 * lane, peek_u16(block))
    poke_u16(unit + 64 + 32 * half + 2 * lane, peek_u16(block + 2))
    move_words(block + 4, 4, unit + 128 + 256 * half + 4 * lane)


@jit
def pack_k_scales(block, unit, lane):
    """The two fp16 and the eight 6-bit scales and minima of a q4_k or q5_k block."""
    poke_u16(unit + 2 * lane, peek_u16(block))
    poke_u16(unit + 32 + 2 * lane, peek_u16(block + 2))
    for i in range(4):
        a, b, c = peek_u8(block + 4 + i), peek_u8(block + 8 + i), peek_u8(block + 12 + i)
        scales, minima = unit + 64 + 16 * i + lane, unit + 192 + 16 * i + lane
        poke_u8(scales, a & 63)
        poke_u8(minima, b & 63)
        poke_u8(scales + 64, (c & 15) | ((a >> 6) << 4))
        poke_u8(minima + 64, (c >> 4) | ((b >> 6) << 4))


@jit
def pack_q4_k(row, i, panel, lane):
    block, unit = row + 144 * i, panel + 2368 * i
    pack_k_scales(block, unit, lane)
    move_words(block + 16, 32, unit + 320 + 4 * lane)


@jit
def pack_q5_k(row, i, panel, lane):
    block, unit = row + 176 * i, panel + 2880 * i
    pack_k_scales(block, unit, lane)
    move_words(block + 48, 32, unit + 320 + 4 * lane)
    move_words(block + 16, 8, unit + 2368 + 4 * lane)


@jit
def pack_q6_k(row, i, panel, lane):
    block, unit = row + 210 * i, panel + 3392 * i
    poke_u16(unit + 2 * lane, peek_u16(block + 208))
    for j in range(16):
        poke_u8(unit + 64 + 16 * j + lane, peek_u8(block + 192 + j))
    move_words(block, 32, unit + 320 + 4 * lane)
    move_words(block + 128, 16, unit + 2368 + 4 * lane)


Q8_0 = PanelEncoding("q8_0_panels", 1, 2, 1088, add_q8_0, pack_q8_0, read_q8_0, "scaled", MINUS_128)
Q4_0 = PanelEncoding("q4_0_panels", 1, 2, 576, add_q4_0, pack_q4_0, read_q4_0, "scaled", MINUS_8)
Q4_1 = PanelEncoding("q4_1_panels", 1, 2, 640, add_q4_1, pack_q4_1, read_q4_1, "offset")
Q4_K = PanelEncoding("q4_k_panels", 8, 8, 2368, add_q4_k, pack_q4_k, read_q4_k, "offset")
Q5_K = PanelEncoding("q5_k_panels", 8, 8, 2880, add_q5_k, pack_q5_k, read_q5_k, "offset")
Q6_K = PanelEncoding("q6_k_panels", 8, 8, 3392, add_q6_k, pack_q6_k, read_q6_k, "halves")


def add_group(token, panel, g, x, rows, out):
    """Add group g of a panel times `rows` records at x to out (rows, 16)."""
    token.add(panel, g, x, rows, out)


def pack_block(token, row, i, panel, lane):
    """Move block i of a row into its lane of a panel."""
    token.pack(row, i, panel, lane)


def block_groups(token):
    """Groups a block."""
    return token.block


if JIT:

    @overload(add_group, jit_options={"forceinline": True})
    def _add_group(token, panel, g, x, rows, out):
        function = token.token.add
        return lambda token, panel, g, x, rows, out: function(panel, g, x, rows, out)

    @overload(pack_block, jit_options={"forceinline": True})
    def _pack_block(token, row, i, panel, lane):
        function = token.token.pack
        return lambda token, row, i, panel, lane: function(row, i, panel, lane)

    @overload(block_groups, jit_options={"forceinline": True})
    def _block_groups(token):
        groups = token.token.block
        return lambda token: groups


TOKENS = {"q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1, "q4_k": Q4_K, "q5_k": Q5_K, "q6_k": Q6_K}
"""What has panels, by the name of its encoding."""
