"""How matrices are kept in a GPU's memory (cuda_gemv.py), and how they are made of stored ones.

Dims: a matrix (K, N) is kept as N rows of K, filled up to a multiple of BLOCK: halves, or integers
of 8 or 4 bits with float16 scales for each BLOCK of them, where that is exactly what is stored (of
Q4_K but for the rounding of its scales to float16, which is no more than that of weights to it).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .cuda_gemv import BLOCK
from .weight import decode

NOTHING = np.zeros(0, np.float16)
NUMBERS = ("int4", "uint4", "int8", "uint8")


@dataclass(frozen=True)
class Form:
    """`make` gives the kernels' encoding, rows and scales of a weight, at most `nbytes`."""

    make: Callable
    nbytes: int


def padded(k):
    """K as the kernels take it."""
    return -(-k // BLOCK) * BLOCK


def form_of(ref):
    """The form that a matrix gets."""
    k, n = ref.shape
    if ref.encoding in FORMS and ref.transposed:
        make, each = FORMS[ref.encoding]
        return Form(make, n * k // BLOCK * each)
    if affine_fits(ref):
        scale_bytes = 4 if len(ref.parts) > 2 or _unsigned(ref) else 2
        bits = 4 if ref.parts[0].dtype in ("int4", "uint4") else 8
        whole = n * padded(k) * bits // 8 + n * padded(k) // BLOCK * scale_bytes
        return Form(as_affine, whole if ref.parts[1].dtype == "float16" else 2 * n * padded(k))
    return Form(as_halves, 2 * n * padded(k))


def as_halves(weight):
    """A weight (K, N) as (N, padded K) float16, and no scales."""
    matrix = decode(weight)
    k, n = matrix.shape
    found = np.zeros((n, padded(k)), np.float16)
    with np.errstate(over="ignore"):
        found[:, :k] = matrix.T
    return "f16", found, NOTHING


def _blocks(weight, head, nbytes):
    """A block encoding's rows of blocks of so many bytes: what each begins with as float16, the
    rest as bytes."""
    n, k = weight.ref.stored_shape
    blocks = weight.buffer.reshape(n, k // BLOCK, nbytes)
    return np.ascontiguousarray(blocks[..., :head]).view(np.float16), blocks[..., head:]


def as_bytes(weight):
    """A Q8_0 weight as (N, K) int8 and its scales (N, K / 32, 1)."""
    scales, rest = _blocks(weight, 2, 34)
    return "i8", np.ascontiguousarray(rest).view(np.int8).reshape(len(rest), -1), scales


def _split_nibbles(rest):
    """Blocks of 16 bytes, whose lower halves come first, as words."""
    elements = np.concatenate([rest & 15, rest >> 4], axis=-1)
    return words_of(elements.reshape(len(rest), -1))


def as_nibbles(weight):
    """A Q4_0 weight as (N, K / 8) words (cuda_gemv.py) and its scales (N, K / 32, 1)."""
    scales, rest = _blocks(weight, 2, 18)
    return "i4", _split_nibbles(rest), scales


def as_nibbles_with_minima(weight):
    """A Q4_1 weight as the same, its scales and offsets (N, K / 32, 2)."""
    scales, rest = _blocks(weight, 4, 20)
    return "i4m", _split_nibbles(rest), scales


def as_nibbles_of_k(weight):
    """A Q4_K weight as the same: each BLOCK's scale, and its offset, are products of two numbers,
    rounded to float16."""
    n, k = weight.ref.stored_shape
    blocks = weight.buffer.reshape(n, k // 256, 144)
    both = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    low, high, mixed = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([high & 63, mixed >> 4 | high >> 6 << 4], axis=-1)
    pairs = np.stack([both[..., :1] * scales, -both[..., 1:] * minima], axis=-1)
    rest = blocks[..., 16:].reshape(n, k // 256, 4, 32)
    elements = np.stack([rest & 15, rest >> 4], axis=-2).reshape(n, k)
    with np.errstate(over="ignore"):
        return "i4m", words_of(elements), pairs.reshape(n, k // BLOCK, 2).astype(np.float16)


def words_of(elements):
    """(N, K) in 0 .. 15 -> (N, K / 8) words: of eight, 2 j and 2 j + 1 are nibbles j and j + 4."""
    eights = elements.astype(np.uint32).reshape(*elements.shape[:-1], -1, 4, 2)
    shifts = np.array([[4 * j, 4 * j + 16] for j in range(4)], np.uint32)
    return np.bitwise_or.reduce(eights << shifts, axis=(-2, -1))


FORMS = {
    "q8_0": (as_bytes, 34), "q4_0": (as_nibbles, 18), "q4_1": (as_nibbles_with_minima, 20),
    "q4_k": (as_nibbles_of_k, 20),
}  # fmt: skip


def _unsigned(ref):
    return ref.parts[0].dtype.startswith("u")


def affine_fits(ref):
    """Whether a matrix is integers in parts, in blocks of a multiple of BLOCK along K."""
    if not ref.parts or ref.block_axis or ref.block % BLOCK:
        return False
    integers, scales, *zeros = ref.parts
    numbers = all(part.dtype in NUMBERS for part in (integers, *zeros))
    return numbers and scales.dtype in ("float16", "float32")


def as_affine(weight):
    """Integers less zero points, times scales -> integers, each BLOCK's scale with, where a zero
    point is not the middle, what to add to them; halves where a scale is no float16."""
    ref = weight.ref
    k, n = ref.shape
    integers, scales, *zeros = (decode(part) for part in weight.parts)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.array_equal(halves, scales):
        return as_halves(weight)
    four_bits, count = ref.parts[0].dtype in ("int4", "uint4"), padded(k) // BLOCK
    middle = (8 if four_bits else 128) if _unsigned(ref) else 0
    q = np.zeros((n, padded(k)), np.int16)
    q[:, :k] = integers[:k].T.astype(np.int16) - middle
    pairs = np.zeros((n, count, 2), np.float16)
    pairs[..., 0] = _of_blocks(halves, ref.block, count, n)
    for zero in zeros or [np.zeros((1, 1))]:
        pairs[..., 1] = _of_blocks(middle - zero.astype(np.float32), ref.block, count, n)
    stored = words_of(q + 8) if four_bits else q.astype(np.int8)
    name = "i4" if four_bits else "i8"
    if pairs[..., 1].any():
        return name + "z", stored, pairs
    return name, stored, np.ascontiguousarray(pairs[..., :1])


def _of_blocks(values, block, count, n):
    """(1 or K / block, 1 or N) -> (N, count): of each BLOCK."""
    if len(values) > 1:
        values = np.repeat(values, block // BLOCK, axis=0)[:count]
    return np.broadcast_to(values, (count, n)).T
