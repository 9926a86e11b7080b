"""Integers of a matrix become halves on a GPU, for products of many rows.

Dims: rows of K integers (cuda_gemv.py), one behind the other; a thread has 16 bytes of them.
"""

from .cuda_gemv import ENCODINGS, block_scale, scale_with_minimum, scale_with_zero
from .cuda_kernel import cuda_kernel, device
from .cuda_prims import (
    cuda, float32, int32, int64, nibbles, pack_halves, signed_bytes, store_128, stream_128,
)  # fmt: skip

THREADS = 256


@device
def plain_scale(scales, i):
    """A block's scale, and no offset."""
    return block_scale(scales, i), float32(0)


@device
def widen_bytes(words, to, scale, offset):
    """16 int8 -> 16 halves."""
    for i in range(2):
        a, b = signed_bytes(words[2 * i]), signed_bytes(words[2 * i + 1])
        store_128(
            to + 16 * i,
            pack_halves(a[0] * scale + offset, a[1] * scale + offset),
            pack_halves(a[2] * scale + offset, a[3] * scale + offset),
            pack_halves(b[0] * scale + offset, b[1] * scale + offset),
            pack_halves(b[2] * scale + offset, b[3] * scale + offset),
        )


@device
def widen_nibbles(words, to, scale, offset):
    """32 int4 -> 32 halves."""
    for i in range(4):
        a = nibbles(words[i])
        store_128(
            to + 16 * i,
            pack_halves(a[0] * scale + offset, a[1] * scale + offset),
            pack_halves(a[2] * scale + offset, a[3] * scale + offset),
            pack_halves(a[4] * scale + offset, a[5] * scale + offset),
            pack_halves(a[6] * scale + offset, a[7] * scale + offset),
        )


def make_widen(encoding, scale_of, widen, per):
    """The kernel for an encoding of `per` weights in 16 bytes."""

    @cuda_kernel("aaal", name=f"widen_{encoding}", threads=THREADS)
    def kernel(w, scales, y, loads):
        """w (loads, 16) bytes, and the scales of their blocks -> y (loads, PER) float16."""
        i = int64(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
        if i < loads:
            pair = scale_of(scales, i * per)
            widen(stream_128(w + 16 * i), y + 2 * per * i, pair[0], pair[1])

    return kernel


SCALES = {"i8": plain_scale, "i4": plain_scale, "i8z": scale_with_zero, "i4z": scale_with_zero,
          "i4m": scale_with_minimum}  # fmt: skip
WIDEN = {
    encoding: (
        make_widen(encoding, scale, widen_bytes if bits == 8 else widen_nibbles, per),
        per, bits, scale_bytes,
    )
    for encoding, scale in SCALES.items()
    for _, _, per, bits, scale_bytes in [ENCODINGS[encoding]]
}  # fmt: skip
"""Encoding -> the kernel, weights a load, bits a weight, bytes of a block's scale."""
