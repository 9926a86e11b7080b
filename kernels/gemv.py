"""Matrix times a few vectors: Y = X W, for every encoding and both storage orders.

Dims: N outputs, K inputs, M vectors. Row order (`rows`): W is stored (N, K), as GGUF and
safetensors hold it. Column order (`columns`): W is stored (K, N), as ONNX's MatMul has it. X (M, K)
and Y (M, N) are float32. Each weight is read from memory once; the threads own contiguous ranges of
stored rows. Each vector's result is, to the last bit, what it is alone.
"""

from .encoding import element, unpack
from .jit import arg, inline, jit, kernel, share
from .quant import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, UINT8
from .simd import host_has
from .vector import (
    add, fma, load_f32, peek_f32, poke_f32, prefetch, splat, store_f32, store_f32_n,
    sum_lanes, zero,
)  # fmt: skip

ONE_STREAM = host_has("sse4a")
"""AMD's cores follow one row after the other (Zen 4: 17 GB/s a thread, all that there is) faster
than some side by side (16), and fastest when no software prefetch comes between; Intel's want
both."""
RESIDENT = 16384 if ONE_STREAM else 0
"""Bytes of x that stay in the first cache beside a row. Where x comes from the second each time, it
is a second stream that hides the first from the hardware (Zen 4, K = 14336: 12 GB/s a thread, and
17 with eight rows, for which it comes once)."""
AHEAD = 384  # bytes: far enough for a line to arrive, near enough to stay in the first cache
PARTS = 16  # of a matrix in column order, that threads share


@jit
def dot(token, row, x, k):
    """One row (K,) times x (K,) -> float32, to the last bit what it is among others: a row's result
    does not depend on how a matrix is cut."""
    a, b = zero(), zero()
    for g in range(k >> 5):
        low, high = unpack(token, row, g)
        a = fma(low, load_f32(x + 128 * g), a)
        b = fma(high, load_f32(x + 128 * g + 64), b)
    total = sum_lanes(add(a, b))
    for i in range(k >> 5 << 5, k):
        total += element(token, row, i) * peek_f32(x + 4 * i)
    return total


@inline
def add_four(token, row, away, g, ahead, x0, x1, sums):
    """Group g of four rows, `away` bytes apart, times that of x, (16,) and (16,), added to `sums`,
    two of each row."""
    a0, b0, a1, b1, a2, b2, a3, b3 = sums
    r1, r2, r3 = row + away, row + 2 * away, row + 3 * away
    prefetch(row + ahead)
    low, high = unpack(token, row, g)
    a0, b0 = fma(low, x0, a0), fma(high, x1, b0)
    prefetch(r1 + ahead)
    low, high = unpack(token, r1, g)
    a1, b1 = fma(low, x0, a1), fma(high, x1, b1)
    prefetch(r2 + ahead)
    low, high = unpack(token, r2, g)
    a2, b2 = fma(low, x0, a2), fma(high, x1, b2)
    prefetch(r3 + ahead)
    low, high = unpack(token, r3, g)
    a3, b3 = fma(low, x0, a3), fma(high, x1, b3)
    return a0, b0, a1, b1, a2, b2, a3, b3


@inline
def nothing():
    """The sums of four rows before the first group."""
    return zero(), zero(), zero(), zero(), zero(), zero(), zero(), zero()


@inline
def store_four(sums, y, away):
    """The sums of four rows -> four floats, `away` bytes apart from y on."""
    a0, b0, a1, b1, a2, b2, a3, b3 = sums
    poke_f32(y, sum_lanes(add(a0, b0)))
    poke_f32(y + away, sum_lanes(add(a1, b1)))
    poke_f32(y + 2 * away, sum_lanes(add(a2, b2)))
    poke_f32(y + 3 * away, sum_lanes(add(a3, b3)))


@jit
def dot4(token, row, stride, x, y, k, count):
    """Four rows of K, `count` rows apart, times x (K,) -> four of y; K a multiple of 32."""
    sums, away, step = nothing(), stride * count, (stride << 5) // k
    for g in range(k >> 5):
        x0, x1 = load_f32(x + 128 * g), load_f32(x + 128 * g + 64)
        sums = add_four(token, row, away, g, g * step + AHEAD, x0, x1, sums)
    store_four(sums, y, 4 * count)


@jit
def dot8(token, row, stride, x, y, k, count):
    """Eight rows of K, `count` rows apart, times x (K,) -> eight of y; K a multiple of 32."""
    first, last, away, step = nothing(), nothing(), stride * count, (stride << 5) // k
    for g in range(k >> 5):
        x0, x1 = load_f32(x + 128 * g), load_f32(x + 128 * g + 64)
        ahead = g * step + AHEAD
        first = add_four(token, row, away, g, ahead, x0, x1, first)
        last = add_four(token, row + 4 * away, away, g, ahead, x0, x1, last)
    store_four(first, y, 4 * count)
    store_four(last, y + 16 * count, 4 * count)


dot_rows, TOGETHER = (dot8, 8) if host_has("avx512f") else (dot4, 4)
"""As many rows side by side as there are registers for."""


@jit
def rows(token, args, thread, threads):
    """args: W (N, K), bytes a row, X, Y, N, K, M, bytes a row of X, of Y.

    Rows side by side are far apart, each the first of a stretch of its own: so a stream goes on
    where a row ends.
    """
    weights, stride, x, y, n, k, m, x_step, y_step = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4), arg(args, 5),
        arg(args, 6), arg(args, 7), arg(args, 8),
    )  # fmt: skip
    start, stop = share(n, TOGETHER, thread, threads)
    count = (stop - start) // TOGETHER if k & 31 == 0 and 4 * k > RESIDENT else 0
    for i in range(start, start + count):
        for v in range(m):
            out = y + y_step * v + 4 * i
            dot_rows(token, weights + stride * i, stride, x + x_step * v, out, k, count)
    for i in range(start + TOGETHER * count, stop):
        for v in range(m):
            value = dot(token, weights + stride * i, x + x_step * v, k)
            poke_f32(y + y_step * v + 4 * i, value)


@jit
def add_row(token, row, x, y, n):
    """y (N,) += x times a stored row (N,)."""
    factor = splat(x)
    for g in range(n >> 5):
        low, high = unpack(token, row, g)
        p = y + 128 * g
        store_f32(p, fma(low, factor, load_f32(p)))
        store_f32(p + 64, fma(high, factor, load_f32(p + 64)))
    for j in range(n >> 5 << 5, n):
        poke_f32(y + 4 * j, peek_f32(y + 4 * j) + element(token, row, j) * x)


@jit
def add_rows(token, row, stride, x, y, n):
    """y (N,) += x (4,) times 4 stored rows (4, N), each `stride` bytes long."""
    x0, x1 = splat(peek_f32(x)), splat(peek_f32(x + 4))
    x2, x3 = splat(peek_f32(x + 8)), splat(peek_f32(x + 12))
    r1, r2, r3 = row + stride, row + 2 * stride, row + 3 * stride
    for g in range(n >> 5):
        p = y + 128 * g
        a, b = load_f32(p), load_f32(p + 64)
        low, high = unpack(token, row, g)
        a, b = fma(low, x0, a), fma(high, x0, b)
        low, high = unpack(token, r1, g)
        a, b = fma(low, x1, a), fma(high, x1, b)
        low, high = unpack(token, r2, g)
        a, b = fma(low, x2, a), fma(high, x2, b)
        low, high = unpack(token, r3, g)
        a, b = fma(low, x3, a), fma(high, x3, b)
        store_f32(p, a)
        store_f32(p + 64, b)
    for j in range(n >> 5 << 5, n):
        total = peek_f32(y + 4 * j)
        for i in range(4):
            total += element(token, row + stride * i, j) * peek_f32(x + 4 * i)
        poke_f32(y + 4 * j, total)


@jit
def columns(token, args, thread, threads):
    """args: W (count, N), bytes a row, X, partial sums (PARTS, M, N), bytes of one of them, N, K,
    M, bytes a row of X, first, count: rows `first` .. `first + count` of the K rows of W.

    The stored rows are cut into PARTS whatever the number of threads, so that the result is the
    same; each part is one stretch of memory. `gemv_columns_sum` adds up their sums. A matrix may
    come in several calls, from its first row to its last.
    """
    weights, stride, x, sums, each, n, k, m, x_step, begin, end = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4), arg(args, 5),
        arg(args, 6), arg(args, 7), arg(args, 8), arg(args, 9), arg(args, 9) + arg(args, 10),
    )  # fmt: skip
    weights -= stride * begin
    first, last = share(PARTS, 1, thread, threads)
    for part in range(first, last):
        start, stop = max(begin, k * part // PARTS), min(end, k * (part + 1) // PARTS)
        if begin == 0:
            for j in range(0, m * each, 64):
                store_f32(sums + m * each * part + j, zero())
        single = start if ONE_STREAM else start + max(0, stop - start) // 4 * 4
        for i in range(start, single, 4):
            for v in range(m):
                y = sums + each * (m * part + v)
                add_rows(token, weights + stride * i, stride, x + x_step * v + 4 * i, y, n)
        for i in range(single, stop):
            for v in range(m):
                y = sums + each * (m * part + v)
                add_row(token, weights + stride * i, peek_f32(x + x_step * v + 4 * i), y, n)


def sum_bytes(n):
    """Bytes of the sums of one part, N columns."""
    return 4 * (-(-n // 16) * 16)


@kernel
def gemv_columns_sum(args, thread, threads):
    """The sums of all parts (PARTS, M, N) -> Y (M, N). args: sums, bytes of one, Y, N, M, bytes a
    row of Y."""
    sums, each, y, n, m, y_step = (
        arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4), arg(args, 5),
    )  # fmt: skip
    start, stop = share(n, 16, thread, threads)
    for v in range(m):
        for j in range(start, stop, 16):
            total = zero()
            for i in range(PARTS):
                total = add(total, load_f32(sums + each * (m * i + v) + 4 * j))
            store_f32_n(y + y_step * v + 4 * j, total, n - j)


@kernel
def gemv_rows_float32(args, thread, threads):
    """float32 W (N, K), X (M, K) -> Y (M, N)."""
    rows(FLOAT32, args, thread, threads)


@kernel
def gemv_rows_float16(args, thread, threads):
    """float16 W (N, K), X (M, K) -> Y (M, N)."""
    rows(FLOAT16, args, thread, threads)


@kernel
def gemv_rows_bfloat16(args, thread, threads):
    """bfloat16 W (N, K), X (M, K) -> Y (M, N)."""
    rows(BFLOAT16, args, thread, threads)


@kernel
def gemv_rows_q8_0(args, thread, threads):
    """q8_0 W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q8_0, args, thread, threads)


@kernel
def gemv_rows_q4_0(args, thread, threads):
    """q4_0 W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q4_0, args, thread, threads)


@kernel
def gemv_rows_q4_1(args, thread, threads):
    """q4_1 W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q4_1, args, thread, threads)


@kernel
def gemv_rows_q4_k(args, thread, threads):
    """q4_k W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q4_K, args, thread, threads)


@kernel
def gemv_rows_q5_k(args, thread, threads):
    """q5_k W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q5_K, args, thread, threads)


@kernel
def gemv_rows_q6_k(args, thread, threads):
    """q6_k W (N, K), X (M, K) -> Y (M, N)."""
    rows(Q6_K, args, thread, threads)


@kernel
def gemv_columns_float32(args, thread, threads):
    """float32 W (K, N), X (M, K) -> Y (M, N)."""
    columns(FLOAT32, args, thread, threads)


@kernel
def gemv_columns_float16(args, thread, threads):
    """float16 W (K, N), X (M, K) -> Y (M, N)."""
    columns(FLOAT16, args, thread, threads)


@kernel
def gemv_columns_bfloat16(args, thread, threads):
    """bfloat16 W (K, N), X (M, K) -> Y (M, N)."""
    columns(BFLOAT16, args, thread, threads)


@kernel
def gemv_columns_uint8(args, thread, threads):
    """uint8 W (K, N), X (M, K) -> Y (M, N)."""
    columns(UINT8, args, thread, threads)
