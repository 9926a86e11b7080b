"""The yardstick of decoding: how fast this machine reads memory.

Dims: a buffer of n bytes; the threads read contiguous shares of it.
"""

import time

import numpy as np

from ..registry import op
from .jit import arg, kernel, share
from .threads import team_of
from .vector import add, load_f32, poke_f32, sum_lanes, zero

CHUNK = 512


@kernel
def read_memory_fast(args, thread, threads):
    """n bytes -> a sum (threads,) that nobody needs. args: buffer, n (multiple of 512), sums."""
    start, stop = share(arg(args, 1), CHUNK, thread, threads)
    a, b, c, d = zero(), zero(), zero(), zero()
    for i in range(arg(args, 0) + start, arg(args, 0) + stop, CHUNK):
        a, b = add(a, load_f32(i)), add(b, load_f32(i + 64))
        c, d = add(c, load_f32(i + 128)), add(d, load_f32(i + 192))
        a, b = add(a, load_f32(i + 256)), add(b, load_f32(i + 320))
        c, d = add(c, load_f32(i + 384)), add(d, load_f32(i + 448))
    poke_f32(arg(args, 2) + 64 * thread, sum_lanes(add(add(a, b), add(c, d))))


@op("ReadBandwidth", domain="onnxstream_nb", uses=("read_memory_fast",))
def bandwidth_reader(nbytes, threads, repetitions=5):
    """What reads a buffer of `nbytes` several times by `threads`, and gives the bytes a second: the
    mean, as the speed that is held against it is one of many tokens, what disturbs the machine
    included. The buffer stays as long as it does: one that comes and goes keeps the system busy,
    which may slow down what is measured after it."""
    nbytes = max(CHUNK, nbytes // CHUNK * CHUNK)
    buffer, crew = np.ones(nbytes // 4 + 16, np.float32), team_of(threads)
    sums = np.zeros(16 * crew.shares, np.float32)

    def read():
        times = []
        for _ in range(repetitions + 1):
            begun = time.perf_counter()
            crew.run([(read_memory_fast, buffer.ctypes.data, nbytes, sums.ctypes.data)])
            times.append(time.perf_counter() - begun)
        return nbytes * repetitions / sum(times[1:])

    return read
