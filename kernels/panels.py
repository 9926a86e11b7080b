"""Block encodings as panels: 16 rows side by side, the form that products in integers read.

Dims: a panel holds 16 rows of K elements, N rows in N / 16 panels, the last filled up with zeros.
A panel takes the bytes of the blocks that it is made of. Block i of all 16 rows lies together: the
rows' scales, and their quantised elements in quads, 4 bytes of each row in turn (quads.py), with
the bit positions that they have in GGUF's blocks, so that packing moves whole words. Where one
float16 is a row's only scale, two blocks lie about the scales of both, so that no quad crosses a
cache line. The 6-bit scales and minima of q4_k and q5_k are packed two groups in 3 bytes a row.

An encoding is a token (encoding.py): `read(panel, g)` gives group g of the 16 rows, its quads and
its scales, and `pack(row, i, panel, lane)` moves block i of one row into its place.
"""

from .encoding import Token
from .gemv import ONE_STREAM
from .jit import jit
from .machine_code import overload_inline
from .panel_groups import (
    between, read_q4_0, read_q4_1, read_q4_k, read_q5_k, read_q6_k, read_q8_0,
)  # fmt: skip
from .quads import MINUS_8, MINUS_128, ZERO, peek_i32, peek_u16, poke_i32, poke_u8, poke_u16
from .simd import JIT
from .vector import peek_u8

AHEAD = 2368 if ONE_STREAM else 1024  # bytes of each panel: the hardware loses track of blocks
FARTHER = 4096  # a block's first group needs the upper bits behind its last one's quads


class PanelEncoding(Token):
    """A block encoding's panels: groups a block, bytes of 16 blocks, how many bytes ahead a product
    asks for them.

    `form` names how what `read` gives is multiplied (panel_products.py, panel_gemm.py), and `start`
    is the field of a record that the sum of products starts with.
    """

    def __init__(self, name, block, nbytes, pack, read, form, start=ZERO, ahead=AHEAD):
        self.name, self.block, self.nbytes = name, block, nbytes
        self.pack, self.read, self.form, self.start, self.ahead = pack, read, form, start, ahead

    def panel_bytes(self, k):
        """Bytes of a panel of K inputs."""
        return k // (32 * self.block) * self.nbytes


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


Q8_0 = PanelEncoding("q8_0_panels", 1, 544, pack_q8_0, read_q8_0, "scaled", MINUS_128)
Q4_0 = PanelEncoding("q4_0_panels", 1, 288, pack_q4_0, read_q4_0, "scaled", MINUS_8)
Q4_1 = PanelEncoding("q4_1_panels", 1, 320, pack_q4_1, read_q4_1, "offset")
Q4_K = PanelEncoding("q4_k_panels", 8, 2304, pack_q4_k, read_q4_k, "offset")
Q5_K = PanelEncoding("q5_k_panels", 8, 2816, pack_q5_k, read_q5_k, "offset", ahead=FARTHER)
Q6_K = PanelEncoding("q6_k_panels", 8, 3360, pack_q6_k, read_q6_k, "halves", ahead=FARTHER)


def read_group(token, panel, g):
    """Group g of a panel: what the token's form multiplies."""
    return token.read(panel, g)


def pack_block(token, row, i, panel, lane):
    """Move block i of a row into its lane of a panel."""
    token.pack(row, i, panel, lane)


def block_groups(token):
    """Groups a block."""
    return token.block


def bytes_ahead(token):
    """How far ahead of a group a panel is prefetched."""
    return token.ahead


if JIT:

    @overload_inline(read_group)
    def _read_group(token, panel, g):
        function = token.token.read
        return lambda token, panel, g: function(panel, g)

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


TOKENS = {"q8_0": Q8_0, "q4_0": Q4_0, "q4_1": Q4_1, "q4_k": Q4_K, "q5_k": Q5_K, "q6_k": Q6_K}
"""What has panels, by the name of its encoding."""
