"""Matrix products on a GPU: matrices that lie in its memory, and MatMul with one of them.

Dims: M rows, K common, N columns; leading dims as NumPy's.

A matrix is uploaded once, as N rows of K filled up to a multiple of 32: halves, or integers of 8 or
4 bits with float16 scales where it is stored as such. A product begins at once and goes on by
itself: what comes back is waited for when somebody looks at it, so that products of one input
overlap, and the CPU works meanwhile.
"""

import math

import numpy as np

from ..registry import op
from .buffers import contiguous
from .cuda_elementwise import THREADS, to_half
from .cuda_gemm import GEMM, GEMM_75, GEMM_SMALL
from .cuda_gemv import BLOCK, GEMV, ROWS, WARPS
from .lowered import FEW_ROWS
from .matmul import USES, lower_matmul, matmul, packing_bytes
from .weight import decode

TILES = {GEMM: (128, 128), GEMM_SMALL: (64, 64), GEMM_75: (128, 64)}  # rows and columns of a block


def padded(k):
    """K as the kernels take it."""
    return -(-k // BLOCK) * BLOCK


def as_halves(weight):
    """A weight (K, N) as (N, padded K) float16, and no scales."""
    matrix = decode(weight)
    k, n = matrix.shape
    found = np.zeros((n, padded(k)), np.float16)
    with np.errstate(over="ignore"):
        found[:, :k] = matrix.T
    return found, np.zeros(0, np.float16)


def _blocks(weight, nbytes):
    """A block encoding's rows of blocks: their float16 scales (N, K / 32), the rest as bytes."""
    n, k = weight.ref.stored_shape
    blocks = weight.buffer.reshape(n, k // BLOCK, nbytes)
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0], blocks[..., 2:]


def as_bytes(weight):
    """A Q8_0 weight as (N, K) int8 and its scales (N, K / 32)."""
    scales, rest = _blocks(weight, 34)
    return np.ascontiguousarray(rest).view(np.int8).reshape(len(rest), -1), scales


def as_nibbles(weight):
    """A Q4_0 weight as (N, K / 8) words (cuda_gemv.py) and its scales (N, K / 32)."""
    scales, rest = _blocks(weight, 18)
    elements = np.concatenate([rest & 15, rest >> 4], axis=-1)
    return words_of(elements.reshape(len(rest), -1)), scales


def words_of(elements):
    """(N, K) in 0 .. 15 -> (N, K / 8) words: of eight, 2 j and 2 j + 1 are nibbles j and j + 4."""
    eights = elements.astype(np.uint32).reshape(*elements.shape[:-1], -1, 4, 2)
    shifts = np.array([[4 * j, 4 * j + 16] for j in range(4)], np.uint32)
    return np.bitwise_or.reduce(eights << shifts, axis=(-2, -1))


FORMS = {"q8_0": ("i8", as_bytes, 34), "q4_0": ("i4", as_nibbles, 18)}


def form_of(ref):
    """How a reference is kept: the kernels' encoding, the function that makes it, bytes of it."""
    k, n = ref.shape
    if ref.encoding in FORMS and ref.transposed:
        encoding, make, each = FORMS[ref.encoding]
        return encoding, make, n * k // BLOCK * each
    return "f16", as_halves, 2 * n * padded(k)


class DeviceMatrix:
    """A matrix (K, N) in a GPU's memory; `lanes` run its products, `host` gives it as a Weight
    when the GPU cannot."""

    lasting = True

    def __init__(self, ref, lanes, host, address, scales, encoding):
        self.ref, self.lanes, self.host = ref, lanes, host
        self.address, self.scales, self.encoding = address, scales, encoding
        self.shape = ref.shape

    def product(self, x):
        """x (..., M, K) -> something that becomes an array (..., M, N) float32."""
        k, n = self.shape
        rows = contiguous(x.reshape(-1, k), np.float32)
        return self.lanes.run(self, rows, (*x.shape[:-1], n))

    def on_host(self, rows):
        """rows (M, K) -> (M, N), by the CPU."""
        return matmul(rows, self.host())

    def launches(self, x, y, half, m, capability):
        """The launches for y (M, N) = x (M, padded K), both float32, and what they need: (kernel,
        grid, block, arguments). `half` is room for x in float16."""
        k, n = padded(self.shape[0]), self.shape[1]
        if m <= FEW_ROWS or self.encoding != "f16":
            return list(self._few(x, y, m, n, k))
        kernel = GEMM_75 if capability < (8, 0) else GEMM if m > 64 and n > 1024 else GEMM_SMALL
        tall, wide = TILES[kernel]
        return [
            (to_half, (-(-m * k // THREADS),), (THREADS,), (x, half, m * k)),
            (kernel, (-(-n // wide), -(-m // tall)), (kernel.threads,),
             (half, self.address, y, m, n, k)),
        ]  # fmt: skip

    def _few(self, x, y, m, n, k):
        done = 0
        while done < m:
            rows = max(r for r in ROWS if r <= m - done)
            where = (x + 4 * k * done, self.address, self.scales, y + 4 * n * done)
            yield GEMV[self.encoding, rows], (-(-n // WARPS),), (32, WARPS), (*where, n, k)
            done += rows


@op("DeviceMatrix", domain="onnxstream_nb")
def device_matrix(ref, weight, lanes, host, allocate):
    """Place a weight: a DeviceMatrix, its bytes uploaded to where `allocate(array)` says."""
    encoding, make, _ = form_of(ref)
    stored, scales = make(weight)
    where = allocate(stored), allocate(scales) if scales.size else 0
    return DeviceMatrix(ref, lanes, host, *where, encoding)


@op("DeviceMatrixBytes", domain="onnxstream_nb")
def device_matrix_bytes(ref):
    """The bytes that a matrix takes in a GPU's memory."""
    return form_of(ref)[2]


@op("DevicePadding", domain="onnxstream_nb")
def device_padding(k):
    """K as products on a GPU take it."""
    return padded(k)


def lower_device_matmul(a, b):
    """What is on the GPU is no business of a table."""
    return None if isinstance(b, DeviceMatrix) else lower_matmul(a, b)


@op("MatMul", since=1, device="cuda", native=("b",), packs=("b",), uses=USES,
    lower=lower_device_matmul, working=packing_bytes)  # fmt: skip
def device_matmul(a, b):
    """a (..., M, K) times b (K, N), on the GPU if b lies there, else on the CPU."""
    if isinstance(b, DeviceMatrix):
        return b.product(np.asarray(a))
    return matmul(a, b)


assert math.lcm(*ROWS) == FEW_ROWS
