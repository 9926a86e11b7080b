"""Biases and penalties of logits on a GPU, before a token is drawn (onnxstream_nb/sampling.py).

Dims: V logits of one position, W tokens that are looked back at, B biases.
"""

from .cuda_kernel import cuda_kernel
from .cuda_prims import cuda, float32, int32, load_f32, load_i64, store_f32

THREADS = 256


@cuda_kernel("aaai", threads=THREADS)
def add_biases(logits, ids, biases, count):
    """logits (V,) float32, in place: to those of ids (B,) int64, each once, biases (B,) float32 are
    added."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < count:
        at = logits + 4 * load_i64(ids + 8 * i)
        store_f32(at, load_f32(at) + load_f32(biases + 4 * i))


@cuda_kernel("aaiifff", threads=THREADS)
def penalise(logits, window, count, v, repeat, presence, frequency):
    """logits (V,) float32, in place: those of ids in window (W,) int64, if they are in 0 .. V - 1,
    are divided by `repeat` if positive, else multiplied; then frequency times how often they are
    there, and presence, are taken away. The first of equal ids does it."""
    i = int32(cuda.blockIdx.x) * THREADS + int32(cuda.threadIdx.x)
    if i < count:
        token, before, times = load_i64(window + 8 * i), 0, 0
        for j in range(count):
            if load_i64(window + 8 * j) == token:
                times += 1
                before += 1 if j < i else 0
        if before == 0 and token >= 0 and token < v:
            at = logits + 4 * token
            value = load_f32(at)
            value = value / repeat if value > float32(0) else value * repeat
            store_f32(at, value - float32(times) * frequency - presence)
