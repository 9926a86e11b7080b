"""Matrices that lie in a GPU's memory, and the launches that multiply with them.

Dims: M rows, K common, N columns; leading dims as NumPy's.

A matrix is uploaded once (cuda_forms.py). Few rows are multiplied with what is stored; for more of
them integers become halves first, some rows of the matrix at a time.
"""

import math
from itertools import groupby

import numpy as np

from ..registry import op
from .buffers import contiguous
from .cuda_elementwise import THREADS, to_half
from .cuda_forms import form_of, padded
from .cuda_gemm import GEMM, GEMM_75, GEMM_SMALL
from .cuda_gemv import JOINED, ROWS, gemv_launch
from .cuda_rope import rows_f16, rows_i4, rows_i8
from .cuda_widen import WIDEN
from .lowered import FEW_ROWS
from .matmul import matmul

TILES = {GEMM: (128, 128), GEMM_SMALL: (64, 64), GEMM_75: (128, 64)}  # rows and columns of a block
TABLES = {"f16": rows_f16, "i8": rows_i8, "i4": rows_i4}  # what looks up single rows
STRIP = 16 << 20  # bytes of halves that integers are made into at a time


class DeviceMatrix:
    """A matrix (K, N) in a GPU's memory; `lanes` run its products beside the CPU, or with a `board`
    they are one step of many there; `host` gives it as a Weight when the GPU cannot."""

    lasting = True

    def __init__(self, ref, lanes, host, address, scales, encoding, board=None):
        self.ref, self.lanes, self.host, self.board = ref, lanes, host, board
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

    def scratch(self, m):
        """The bytes of room that products of M rows need for rows of the matrix in float16."""
        if m <= FEW_ROWS or self.encoding == "f16":
            return 0
        return 2 * padded(self.shape[0]) * self._strip()

    def _strip(self):
        """How many rows of the matrix are made into halves at a time."""
        whole, row = self.shape[1], 2 * padded(self.shape[0])
        return min(whole, max(128, STRIP // row // 128 * 128))

    def launches(self, x, y, half, m, capability, scratch=0):
        """The launches for y (M, N) = x (M, padded K): see product_launches."""
        return product_launches([self], x, [y], m, capability, half, scratch)

    def widened(self, half, scratch, y, m, capability):
        """The launches for y (M, N) of x (M, padded K) in float16 at `half`."""
        k, n = padded(self.shape[0]), self.shape[1]
        if self.encoding == "f16":
            yield _gemm(half, self.address, y, m, n, k, n, capability)
            return
        for first in range(0, n, self._strip()):
            rows = min(self._strip(), n - first)
            yield self._widen(first, rows, scratch, k)
            yield _gemm(half, scratch, y + 4 * first, m, rows, k, n, capability)

    def _widen(self, first, rows, scratch, k):
        """The launch that makes rows from `first` on into halves."""
        kernel, per, bits, scale_bytes = WIDEN[self.encoding]
        loads = rows * k // per
        where = self.address + first * k * bits // 8, self.scales + first * k // 32 * scale_bytes
        grid = (-(-loads // kernel.threads),)
        return kernel, grid, (kernel.threads,), (*where, scratch, loads)


def product_launches(matrices, x, results, m, capability, half=0, scratch=0):
    """The launches for results y (M, N) = x (M, padded K), float32, of matrices with one K:
    (kernel, grid, block, arguments). For more than a few rows `half` is room for x in float16,
    `scratch` as much as the matrices say."""
    k, pairs = padded(matrices[0].shape[0]), list(zip(matrices, results, strict=True))
    if m <= FEW_ROWS:
        return [launch for joined in _joined(pairs) for launch in _few(joined, x, m, k)]
    found = [(to_half, (-(-m * k // THREADS),), (THREADS,), (x, half, m * k))]
    for matrix, y in pairs:
        found += matrix.widened(half, scratch, y, m, capability)
    return found


def _joined(pairs):
    """Matrices and results in groups that a launch takes: of one encoding, JOINED at most."""
    for _, group in groupby(pairs, key=lambda pair: pair[0].encoding):
        alike = list(group)
        for first in range(0, len(alike), JOINED):
            yield alike[first : first + JOINED]


def _few(pairs, x, m, k):
    """The launches for few rows, as many at a time as there are kernels for."""
    done = 0
    while done < m:
        rows = max(r for r in ROWS if r <= m - done)
        parts = [(a.address, a.scales, y + 4 * a.shape[1] * done, a.shape[1]) for a, y in pairs]
        yield gemv_launch(pairs[0][0].encoding, rows, x + 4 * k * done, k, parts)
        done += rows


class DeviceLookup:
    """A table (V, K) in a GPU's memory of which rows are looked up, as a matrix has them: `kernel`
    does it from `addresses`. `host` gives it as a Weight."""

    lasting = True

    def __init__(self, ref, matrix, host, dtype):
        self.ref, self.host, self.board = ref, host, matrix.board
        self.shape, self.ndim, self.dtype = ref.shape, len(ref.shape), dtype
        self.kernel = TABLES[matrix.encoding]
        self.addresses = tuple(a for a in (matrix.address, matrix.scales) if a)


def _gemm(x, w, y, m, n, k, pitch, capability):
    """The launch of a product of halves."""
    kernel = GEMM_75 if capability < (8, 0) else GEMM if m > 64 and n > 1024 else GEMM_SMALL
    tall, wide = TILES[kernel]
    grid = -(-n // wide), -(-m // tall)
    return kernel, grid, (kernel.threads,), (x, w, y, m, n, k, pitch)


@op("DeviceMatrix", domain="onnxstream_nb")
def device_matrix(ref, weight, lanes, host, allocate, board=None):
    """Place a weight: a DeviceMatrix, its bytes uploaded to where `allocate(array)` says."""
    encoding, stored, scales = form_of(ref).make(weight)
    where = allocate(stored), allocate(scales) if scales.size else 0
    return DeviceMatrix(ref, lanes, host, *where, encoding, board)


@op("DeviceLookup", domain="onnxstream_nb")
def device_lookup(ref, matrix, host, dtype):
    """The table (V, K) of a type whose rows a DeviceMatrix has as its own; None where no kernel
    looks them up."""
    exact = padded(ref.shape[1]) == ref.shape[1]
    return DeviceLookup(ref, matrix, host, dtype) if exact and matrix.encoding in TABLES else None


@op("DeviceMatrixBytes", domain="onnxstream_nb")
def device_matrix_bytes(ref):
    """The bytes that a matrix takes in a GPU's memory."""
    return form_of(ref).nbytes


@op("DevicePadding", domain="onnxstream_nb")
def device_padding(k):
    """K as products on a GPU take it."""
    return padded(k)


assert math.lcm(*ROWS) == FEW_ROWS
