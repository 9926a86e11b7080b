"""Decoding encoded weights to float32: whole tensors, or rows of them (an embedding's lookup).

Dims: a tensor is N rows of K elements.
"""

from .encoding import element, unpack
from .jit import arg, jit, kernel, share
from .quant import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, UINT8
from .vector import peek_i64, poke_f32, store_f32


@jit
def decode_row(token, row, out, k0, k1):
    """Elements k0 .. k1 of a row (k0 a multiple of 32) -> (k1 - k0,) float32 at out."""
    last = k0 + (k1 - k0) // 32 * 32
    for k in range(k0, last, 32):
        low, high = unpack(token, row, k >> 5)
        store_f32(out + 4 * (k - k0), low)
        store_f32(out + 4 * (k - k0) + 64, high)
    for k in range(last, k1):
        poke_f32(out + 4 * (k - k0), element(token, row, k))


@jit
def decode(token, args, thread, threads):
    """args: weights (V, K), bytes a row, out (N, K), N, K, ids (N,) int64 or 0 for all rows."""
    weights, stride, out = arg(args, 0), arg(args, 1), arg(args, 2)
    n, k, ids = arg(args, 3), arg(args, 4), arg(args, 5)
    start, stop = share(n, 1, thread, threads)
    for i in range(start, stop):
        row = peek_i64(ids + 8 * i) if ids else i
        decode_row(token, weights + stride * row, out + 4 * k * i, 0, k)


@kernel
def decode_float32(args, thread, threads):
    """(V, K) float32 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(FLOAT32, args, thread, threads)


@kernel
def decode_float16(args, thread, threads):
    """(V, K) float16 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(FLOAT16, args, thread, threads)


@kernel
def decode_bfloat16(args, thread, threads):
    """(V, K) bfloat16 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(BFLOAT16, args, thread, threads)


@kernel
def decode_uint8(args, thread, threads):
    """(V, K) uint8 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(UINT8, args, thread, threads)


@kernel
def decode_q8_0(args, thread, threads):
    """(V, K) q8_0 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q8_0, args, thread, threads)


@kernel
def decode_q4_0(args, thread, threads):
    """(V, K) q4_0 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q4_0, args, thread, threads)


@kernel
def decode_q4_1(args, thread, threads):
    """(V, K) q4_1 -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q4_1, args, thread, threads)


@kernel
def decode_q4_k(args, thread, threads):
    """(V, K) q4_k -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q4_K, args, thread, threads)


@kernel
def decode_q5_k(args, thread, threads):
    """(V, K) q5_k -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q5_K, args, thread, threads)


@kernel
def decode_q6_k(args, thread, threads):
    """(V, K) q6_k -> (N, K) float32: all rows, or those that `ids` names."""
    decode(Q6_K, args, thread, threads)


@kernel
def pick_rows(args, thread, threads):
    """(V, K) float32, ids (N,) int64 -> (N, K): rows by number, a negative one from the end.

    args: table, out, N, K, ids, V. Numbers out of range pick some row: who calls it looks at them.
    """
    table, out, n, k = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    ids, rows = arg(args, 4), arg(args, 5)
    start, stop = share(n, 1, thread, threads)
    for i in range(start, stop):
        row = peek_i64(ids + 8 * i)
        row = max(0, min(row + rows if row < 0 else row, rows - 1))
        decode_row(FLOAT32, table + 4 * k * row, out + 4 * k * i, 0, k)
