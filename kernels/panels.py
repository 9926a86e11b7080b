"""Block encodings as panels: 16 rows side by side, the form that products in integers read.

Dims: a panel holds 16 rows of K elements, N rows in N / 16 panels, the last filled up with zeros.
A panel takes the bytes of the blocks that it is made of. Block i of all 16 rows lies together: the
rows' scales, and their quantised elements in quads, 4 bytes of each row in turn (quads.py), with
the bit positions that they have in GGUF's blocks, so that packing moves whole words. Where one
float16 is a row's only scale, two blocks lie about the scales of both, so that no quad crosses a
cache line. The 6-bit scales and minima of q4_k and q5_k are packed two groups in 3 bytes a row.

An encoding is a token (encoding.py): `add(panel, g, x, rows, out)` adds group g of 16 weight rows,
or the `step` groups from there on, times `rows` records at x to `rows` vectors (16,) at out, the
records (groups, rows); `pack(row, i, panel, lane)` moves block i of one row into its place.
"""

from .encoding import Token
from .jit import inline, jit
from .machine_code import overload_inline
from .panel_groups import (
    between, read_q4_0, read_q4_1, read_q4_k, read_q5_k, read_q6_k, read_q8_0,
)  # fmt: skip
from .quads import (
    MINUS_8, MINUS_32_FIRST, MINUS_32_LAST, MINUS_128, RECORD, SCALE, SUM, ZERO, dot, dot_first,
    dot_last, load_quads, lower_nibbles, peek_i32, peek_u16, poke_i32, poke_u8,
    poke_u16, upper_nibbles, with_bit, with_two_bits,
)  # fmt: skip
from .simd import JIT
from .six_bits import six_bits_0, six_bits_1, six_bits_2, six_bits_3
from .vector import (
    fma,
    load_f16,
    load_f32,
    load_i8,
    mul,
    peek_f32,
    peek_u8,
    splat,
    store_f32,
)


class PanelEncoding(Token):
    """A block encoding's panels: groups a block, groups that `add` adds, bytes of 16 blocks, how
    many bytes ahead a product asks for them.

    `read(panel, g)` gives a group's quads and its scales, `form` names how they are multiplied
    (panel_gemm.py), and `start` is the field of a record that their sum starts with.
    """

    def __init__(
        self, name, block, step, nbytes, add, pack, read, form, start=ZERO, ahead=2368
    ):  # fmt: skip
        self.name, self.block, self.step, self.nbytes = name, block, step, nbytes
        self.add, self.pack, self.ahead = add, pack, ahead
        self.read, self.form, self.start = read, form, start

    def panel_bytes(self, k):
        """Bytes of a panel of K inputs."""
        return k // (32 * self.block) * self.nbytes


@jit
def add_scaled(q, scale, start, x, rows, out):
    """out (rows, 16) += scale times (q times each record, which starts with its field `start`)."""
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        factor = mul(scale, splat(peek_f32(record + SCALE)))
        store_f32(total, fma(dot(q, record, record + start), factor, load_f32(total)))


@inline
def affine(q, scale, offset, record, so_far):
    """so_far (16,) plus scale times (q times a record) plus offset times the record's sum."""
    factor = mul(scale, splat(peek_f32(record + SCALE)))
    so_far = fma(offset, splat(peek_f32(record + SUM)), so_far)
    return fma(dot(q, record, record + ZERO), factor, so_far)


@inline
def add_q8_0(panel, g, x, rows, out):
    q, scale = read_q8_0(panel, g)
    add_scaled(q, scale, MINUS_128, x, rows, out)


@inline
def add_q4_0(panel, g, x, rows, out):
    q, scale = read_q4_0(panel, g)
    add_scaled(q, scale, MINUS_8, x, rows, out)


@inline
def add_q4_1(panel, g, x, rows, out):
    q, scale, offset = read_q4_1(panel, g)
    for r in range(rows):
        total = out + 64 * r
        store_f32(total, affine(q, scale, offset, x + RECORD * r, load_f32(total)))


@inline
def add_k_pair(block, numbers, low, high, x, rows, out):
    """Two groups of a q4_k or q5_k block; `numbers` holds their 6-bit scales and minima."""
    d, least = load_f16(block), mul(load_f16(block + 32), splat(-1.0))
    first, second = mul(d, six_bits_0(numbers)), mul(d, six_bits_1(numbers))
    below_first, below_second = mul(least, six_bits_2(numbers)), mul(least, six_bits_3(numbers))
    for r in range(rows):
        record, total = x + RECORD * r, out + 64 * r
        so_far = affine(low, first, below_first, record, load_f32(total))
        so_far = affine(high, second, below_second, record + RECORD * rows, so_far)
        store_f32(total, so_far)


@inline
def add_q4_k(panel, g, x, rows, out):
    block, pair = panel + 2304 * (g >> 3), (g & 7) >> 1
    q = load_quads(block + 256 + 512 * pair)
    low, high = lower_nibbles(q), upper_nibbles(q)
    add_k_pair(block, block + 64 + 48 * pair, low, high, x, rows, out)


@inline
def add_q5_k(panel, g, x, rows, out):
    block, i = panel + 2816 * (g >> 3), g & 7
    q, bits = load_quads(block + 256 + 256 * i), load_quads(block + 2304)
    low, high = with_bit(lower_nibbles(q), bits, i), with_bit(upper_nibbles(q), bits, i + 1)
    add_k_pair(block, block + 64 + 24 * i, low, high, x, rows, out)


@inline
def in_halves(q, first, last, record, so_far):
    """so_far (16,) plus the products of a record's halves of 16 elements, each with its scale."""
    terms = mul(first, dot_first(q, record, record + MINUS_32_FIRST))
    terms = fma(last, dot_last(q, record, record + MINUS_32_LAST), terms)
    return fma(terms, splat(peek_f32(record + SCALE)), so_far)


@inline
def add_q6_k(panel, g, x, rows, out):
    """Of each four groups the first shares its bytes with the third, the second with the last."""
    block, scales = between(panel, 3360, g >> 3)
    d, half, odd = load_f16(scales), (g & 7) >> 2, (g & 3) >> 1
    q = load_quads(block + 256 + 1024 * half + 512 * odd)
    bits = load_quads(block + 2304 + 512 * half)
    low = with_two_bits(lower_nibbles(q), bits, 2 * odd)
    high = with_two_bits(upper_nibbles(q), bits, 2 * odd + 4)
    each = block + 128 * half + 32 * odd
    first, second = mul(d, load_i8(each)), mul(d, load_i8(each + 16))
    third, fourth = mul(d, load_i8(each + 64)), mul(d, load_i8(each + 80))
    before = x - RECORD * rows * odd
    for r in range(rows):
        record, total = before + RECORD * r, out + 64 * r
        so_far = in_halves(low, first, second, record, load_f32(total))
        store_f32(total, in_halves(high, third, fourth, record + 2 * RECORD * rows, so_far))


@jit
def move_words(source, count, out):
    """`count` words of 4 bytes -> one a quad."""
    for j in range(count):
        poke_i32(out + 64 * j, peek_i32(source + 4 * j))


@jit
def pack_q8_0(row, i, panel, lane):
    block, (quads, scales) = row + 34 * i, between(panel, 544, i)
    poke_u16(scales + 2 * lane, peek_u16(block))
    for j in range(8):  # plus 128: the instruction multiplies unsigned by signed bytes
        word = peek_i32(block + 2 + 4 * j) ^ 0x80808080
        poke_i32(quads + 64 * j + 4 * lane, word)


@jit
def pack_q4_0(row, i, panel, lane):
    block, (quads, scales) = row + 18 * i, between(panel, 288, i)
    poke_u16(scales + 2 * lane, peek_u16(block))
    move_words(block + 2, 4, quads + 4 * lane)


@jit
def pack_q4_1(row, i, panel, lane):
    block, out = row + 20 * i, panel + 320 * i
    poke_u16(out + 2 * lane, peek_u16(block))
    poke_u16(out + 32 + 2 * lane, peek_u16(block + 2))
    move_words(block + 4, 4, out + 64 + 4 * lane)


@jit
def k_numbers(block, i):
    """The 6-bit scale and minimum of group i of a q4_k or q5_k block."""
    at = block + 4 + (i & 3)
    scale, least = peek_u8(at), peek_u8(at + 4)
    if i < 4:
        return scale & 63, least & 63
    both = peek_u8(at + 8)
    return (both & 15) | ((scale >> 6) << 4), (both >> 4) | ((least >> 6) << 4)


@jit
def pack_k_scales(block, out, lane):
    """The two fp16 and the eight 6-bit scales and minima of a q4_k or q5_k block."""
    poke_u16(out + 2 * lane, peek_u16(block))
    poke_u16(out + 32 + 2 * lane, peek_u16(block + 2))
    for pair in range(4):
        first, below_first = k_numbers(block, 2 * pair)
        second, below_second = k_numbers(block, 2 * pair + 1)
        numbers = out + 64 + 48 * pair
        poke_u16(numbers + 2 * lane, first | (second << 6) | ((below_second & 15) << 12))
        poke_u8(numbers + 32 + lane, below_first | ((below_second >> 4) << 6))


@jit
def pack_q4_k(row, i, panel, lane):
    block, out = row + 144 * i, panel + 2304 * i
    pack_k_scales(block, out, lane)
    move_words(block + 16, 32, out + 256 + 4 * lane)


@jit
def pack_q5_k(row, i, panel, lane):
    block, out = row + 176 * i, panel + 2816 * i
    pack_k_scales(block, out, lane)
    move_words(block + 48, 32, out + 256 + 4 * lane)
    move_words(block + 16, 8, out + 2304 + 4 * lane)


@jit
def pack_q6_k(row, i, panel, lane):
    block, (out, scales) = row + 210 * i, between(panel, 3360, i)
    poke_u16(scales + 2 * lane, peek_u16(block + 208))
    for j in range(16):
        poke_u8(out + 16 * j + lane, peek_u8(block + 192 + j))
    move_words(block, 32, out + 256 + 4 * lane)
    move_words(block + 128, 16, out + 2304 + 4 * lane)


FARTHER = 5120  # bytes: a block's first group needs the upper bits behind its last one's quads
Q8_0 = PanelEncoding("q8_0_panels", 1, 1, 544, add_q8_0, pack_q8_0, read_q8_0, "scaled", MINUS_128)
Q4_0 = PanelEncoding("q4_0_panels", 1, 1, 288, add_q4_0, pack_q4_0, read_q4_0, "scaled", MINUS_8)
Q4_1 = PanelEncoding("q4_1_panels", 1, 1, 320, add_q4_1, pack_q4_1, read_q4_1, "offset")
Q4_K = PanelEncoding("q4_k_panels", 8, 2, 2304, add_q4_k, pack_q4_k, read_q4_k, "offset")
Q5_K = PanelEncoding("q5_k_panels", 8, 2, 2816, add_q5_k, pack_q5_k, read_q5_k, "offset",
                     ahead=FARTHER)  # fmt: skip
Q6_K = PanelEncoding("q6_k_panels", 8, 2, 3360, add_q6_k, pack_q6_k, read_q6_k, "halves",
                     ahead=FARTHER)  # fmt: skip


def add_group(token, panel, g, x, rows, out):
    """Add `step_groups` groups from g on of a panel times `rows` records at x to out (rows, 16)."""
    token.add(panel, g, x, rows, out)


def pack_block(token, row, i, panel, lane):
    """Move block i of a row into its lane of a panel."""
    token.pack(row, i, panel, lane)


def block_groups(token):
    """Groups a block."""
    return token.block


def step_groups(token):
    """Groups that are added at once."""
    return token.step


def bytes_ahead(token):
    """How far ahead of a group panels are prefetched: the hardware loses track of blocks."""
    return token.ahead


if JIT:

    @overload_inline(add_group)
    def _add_group(token, panel, g, x, rows, out):
        function = token.token.add
        return lambda token, panel, g, x, rows, out: function(panel, g, x, rows, out)

    @overload_inline(pack_block)
    def _pack_block(token, row, i, panel, lane):
        function = token.token.pack
        return lambda token, row, i, panel, lane: function(row, i, panel, lane)

    @overload_inline(block_groups)
    def _block_groups(token):
        groups = token.token.block
        return lambda token: groups

    @overload_inline(bytes_ahead)
    def _bytes_ahead(token):
        nbytes = token.token.ahead
        return lambda token: nbytes

    @overload_inline(step_groups)
    def _step_groups(token):
        groups = token.token.step
        return lambda token: groups


TOKENS = {"q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1, "q4_k": Q4_K, "q5_k": Q5_K, "q6_k": Q6_K}
"""What has panels, by the name of its encoding."""
