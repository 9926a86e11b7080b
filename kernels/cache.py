"""Writing new keys and values into a cache.

Dims: KV key/value heads, T new positions, D size of keys, E size of values. A cache holds keys as
(KV, capacity / 32, D, 32) and values as (KV, E / 32, capacity, 32), E padded to 32, in float16; or
in int8 with float32 scales (KV, capacity) for each, one a position and head: its largest element is
127 times its scale, so each is off by half a scale at most.
"""

import numpy as np
from numba import types

from .jit import arg, jit, kernel, share
from .simd import FLOAT, I8, VF32, VI8, address, call, f32x16, primitive, store, write_memory
from .vector import (
    absolute, add, load_f32_n, max_lanes, maximum, mul, peek_f32, poke_f16, poke_f32, splat,
    store_f16, sum_lanes, zero,
)  # fmt: skip

# Arguments of cache_append, in order. Strides are in bytes.
(NEW_K, NEW_K_HEAD, NEW_K_TOKEN, NEW_V, NEW_V_HEAD, NEW_V_TOKEN, K, V, K_SCALES, V_SCALES,
 KV_HEADS, TOKENS, SIZE, VALUE_SIZE, CAPACITY, AT, QUANTISED) = range(17)  # fmt: skip


def _twin_byte(p, x):
    write_memory(p, np.nan_to_num(np.clip(np.rint(x), -128, 127)).astype(np.int8))


@primitive(types.void, address, types.float32, twin=_twin_byte)
def poke_i8(b, p, x):
    """The nearest int8, even when between two; 0 for a NaN."""
    nearest = call(b, "llvm.rint.f32", FLOAT, [x])
    store(b, call(b, "llvm.fptosi.sat.i8.f32", I8, [nearest]), p)


@primitive(types.void, address, f32x16, twin=_twin_byte)
def store_i8(b, p, v):
    """As poke_i8, 16 lanes."""
    nearest = call(b, "llvm.rint.v16f32", VF32, [v])
    store(b, call(b, "llvm.fptosi.sat.v16i8.v16f32", VI8, [nearest]), p)


@jit
def scale_of(x, size):
    """What one step of int8 stands for in (size,) floats; NaN when one is infinite or a NaN."""
    largest, poison = zero(), zero()
    for i in range(0, size, 16):
        value = load_f32_n(x + 4 * i, size - i)
        largest = maximum(absolute(value), largest)
        poison = add(poison, mul(value, zero()))
    return max_lanes(largest) / np.float32(127) + sum_lanes(poison)


@jit
def store_key(quantised, k, size, at, keys, scales):
    """A key (D,) -> position `at` of its head's keys (capacity / 32, D, 32)."""
    lane = at % 32
    if quantised:
        keys += (at - lane) * size + lane
        scale = scale_of(k, size)
        poke_f32(scales + 4 * at, scale)
        steps = np.float32(1) / scale if scale > 0 else np.float32(0)
        for d in range(size):
            poke_i8(keys + 32 * d, peek_f32(k + 4 * d) * steps)
    else:
        keys += 2 * ((at - lane) * size + lane)
        for d in range(size):
            poke_f16(keys + 64 * d, peek_f32(k + 4 * d))


@jit
def store_value(quantised, v, size, capacity, at, values, scales):
    """A value (E,) -> position `at` of its head's values (E / 32, capacity, 32)."""
    if quantised:
        scale = scale_of(v, size)
        poke_f32(scales + 4 * at, scale)
        steps = splat(np.float32(1) / scale if scale > 0 else np.float32(0))
        for e in range(0, size, 32):
            to = values + capacity * e + 32 * at
            store_i8(to, mul(load_f32_n(v + 4 * e, size - e), steps))
            store_i8(to + 16, mul(load_f32_n(v + 4 * e + 64, size - e - 16), steps))
    else:
        for e in range(0, size, 32):
            to = values + 2 * (capacity * e + 32 * at)
            store_f16(to, load_f32_n(v + 4 * e, size - e))
            store_f16(to + 32, load_f32_n(v + 4 * e + 64, size - e - 16))


@jit
def store_position(args, head, token, at):
    """Key and value `token` of one head -> position `at`; args as cache_append's."""
    size, value_size, capacity = arg(args, SIZE), arg(args, VALUE_SIZE), arg(args, CAPACITY)
    quantised, width = arg(args, QUANTISED), 1 if arg(args, QUANTISED) else 2
    k = arg(args, NEW_K) + arg(args, NEW_K_HEAD) * head + arg(args, NEW_K_TOKEN) * token
    v = arg(args, NEW_V) + arg(args, NEW_V_HEAD) * head + arg(args, NEW_V_TOKEN) * token
    keys = arg(args, K) + width * head * capacity * size
    values = arg(args, V) + width * head * capacity * ((value_size + 31) // 32 * 32)
    scales = 4 * capacity * head
    store_key(quantised, k, size, at, keys, arg(args, K_SCALES) + scales)
    store_value(quantised, v, value_size, capacity, at, values, arg(args, V_SCALES) + scales)


@kernel
def cache_append(args, thread, threads):
    """K (KV, T, D) and V (KV, T, E) by strides -> a cache, from position AT on.

    args: as listed above. Shares are cut at blocks of 32 positions.
    """
    at, tokens = arg(args, AT), arg(args, TOKENS)
    blocks = (at + tokens + 31) // 32 - at // 32
    start, stop = share(arg(args, KV_HEADS) * blocks, 1, thread, threads)
    for unit in range(start, stop):
        head, first = unit // blocks, (at // 32 + unit % blocks) * 32
        for position in range(max(at, first), min(at + tokens, first + 32)):
            store_position(args, head, position - at, position)
