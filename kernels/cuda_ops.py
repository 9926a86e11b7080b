"""Operators that treat elements, rows or shapes, as launches on a GPU.

Dims: as their operators' on the CPU; a row is what lies along the last axis.
"""

import math
from functools import partial

import numpy as np

from . import arithmetic, elementwise, fused, indexing, norm, rope, shape, softmax  # noqa: F401
from .cuda_elementwise import BINARY, THREADS, UNARY, swish_multiply
from .cuda_matrix import DeviceLookup
from .cuda_norm import add_rms_norm, layer_norm, rms_norm, softmax_rows
from .cuda_rope import rotate, rows_f32
from .cuda_rows import on_gpu
from .dtypes import numpy_dtype
from .indexing import in_range

OWN = "onnxstream_nb"
MOST_ROWS = 65535  # a grid is no taller
FLOATS = ("float16", "bfloat16", "float32")


def blocks(count, threads=THREADS):
    """How many blocks have a thread for each."""
    return (-(-count // threads),)


def _unary(rows, kernel, x, parameter=1.0):
    y = rows.room(x.shape, x.dtype)
    rows.launch(kernel, blocks(x.size), rows.address(x), y.address, x.size, parameter)
    return rows.giving(y)


def _declare_unary(op_type, kernel):
    @on_gpu(op_type, 0)
    def unary(rows, x):
        """x (...) -> (...)."""
        return _unary(rows, kernel, x)


for _op_type, _name in {
    "Exp": "exponential", "Neg": "negative", "Reciprocal": "reciprocal", "Relu": "relu",
    "Sigmoid": "sigmoid", "Sqrt": "square_root", "Tanh": "tanh", "Erf": "erf", "Sin": "sin",
    "Cos": "cos",
}.items():  # fmt: skip
    _declare_unary(_op_type, UNARY[_name])


@on_gpu("Swish", 0)
def swish(rows, x, *, alpha=1.0):
    """x (...) -> (...), x sigmoid(alpha x)."""
    return _unary(rows, UNARY["swish"], x, alpha)


@on_gpu("Gelu", 0)
def gelu(rows, x, *, approximate="none"):
    """x (...) -> (...)."""
    return _unary(rows, UNARY["gelu" if approximate == "none" else "gelu_tanh"], x)


def broadcast(left, right, whole):
    """(rows, columns, step and varies of each) by which two shapes are broadcast to `whole`, or
    None where a row and a step do not say it."""
    shapes = [(1,) * (len(whole) - len(s)) + tuple(s) for s in (left, right)]
    for at in range(len(whole), -1, -1):
        found = [math.prod(whole[:at]), math.prod(whole[at:])]
        for given in shapes:
            ahead, behind = given[:at], given[at:]
            if behind not in (whole[at:], (1,) * len(behind)):
                break
            if ahead not in (whole[:at], (1,) * len(ahead)):
                break
            columns = math.prod(behind)
            found += [columns if math.prod(ahead) > 1 else 0, int(columns > 1)]
        else:
            return found
    return None


def _declare_binary(op_type, kernel):
    @on_gpu(op_type, 0, 1)
    def binary(rows, a, b, **before_opset_7):
        """a (...), b (...) -> (...)."""
        if before_opset_7:
            return None
        try:
            whole = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            return None  # the CPU says so
        steps = broadcast(a.shape, b.shape, whole)
        if steps is None or math.prod(whole) >= 1 << 31:
            return None
        z = rows.room(whole, a.dtype)
        rows.launch(kernel, blocks(z.size), rows.address(a), rows.address(b), z.address, *steps)
        return rows.giving(z)


for _op_type, _name in {
    "Add": "add", "Sub": "subtract", "Mul": "multiply", "Div": "divide",
}.items():  # fmt: skip
    _declare_binary(_op_type, BINARY[_name])


@on_gpu("RMSNormalization", 0, 1)
def rms_normalization(rows, x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """x (..., N), scale (N,) -> (..., N)."""
    if axis not in (-1, x.ndim - 1) or scale.shape != x.shape[-1:] or not scale.size:
        return None
    y, n = rows.room(x.shape, scale.dtype), x.shape[-1]
    where = rows.address(x), rows.address(scale), y.address
    rows.launch(rms_norm, (x.size // n,), *where, n, epsilon)
    return rows.giving(y)


@on_gpu("AddRMSNormalization", 0, 1, 2, domain=OWN)
def add_rms_normalization(rows, a, b, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """a and b (..., N), scale (N,) -> a + b, and its RMSNormalization."""
    if axis not in (-1, a.ndim - 1) or scale.shape != a.shape[-1:] or a.shape != b.shape:
        return None
    if not scale.size:
        return None
    total, y, n = rows.room(a.shape, a.dtype), rows.room(a.shape, scale.dtype), a.shape[-1]
    where = (rows.address(x) for x in (a, b, scale, total, y))
    rows.launch(add_rms_norm, (a.size // n,), *where, n, epsilon)
    return rows.giving(total, y)


@on_gpu("SwishMul", 0, 1, domain=OWN)
def swish_mul(rows, x, y):
    """x (...), y (...) -> (...), x sigmoid(x) y."""
    if x.shape != y.shape:
        return None
    z = rows.room(x.shape, x.dtype)
    where = rows.address(x), rows.address(y), z.address
    rows.launch(swish_multiply, blocks(x.size), *where, x.size)
    return rows.giving(z)


@on_gpu("LayerNormalization", 0, 1, 2)
def layer_normalization(rows, x, scale, b=None, *, axis=-1, epsilon=1e-5, stash_type=1,
                        n_outputs=1):  # fmt: skip
    """x (..., N), scale (N,), b (N,) or None -> (..., N)."""
    shapes = {scale.shape, scale.shape if b is None else b.shape}
    if n_outputs > 1 or axis not in (-1, x.ndim - 1) or shapes != {x.shape[-1:]} or not scale.size:
        return None
    y, n = rows.room(x.shape, x.dtype), x.shape[-1]
    bias = 0 if b is None else rows.address(b)
    where = rows.address(x), rows.address(scale), bias, y.address
    rows.launch(layer_norm, (x.size // n,), *where, n, epsilon)
    return rows.giving(y)


@on_gpu("Softmax", 0)
def softmax_there(rows, x, *, axis=None):
    """x (..., C) -> (..., C)."""
    last = -1 if rows.host.since >= 13 else 1  # before, all axes from one on are taken for one
    if (last if axis is None else axis) not in (-1, x.ndim - 1) or not x.ndim or not x.shape[-1]:
        return None
    y = rows.room(x.shape, x.dtype)
    rows.launch(softmax_rows, (x.size // x.shape[-1],), rows.address(x), y.address, x.shape[-1])
    return rows.giving(y)


@on_gpu("RotaryEmbedding", 0, 1, 2)
def rotary_embedding(rows, x, cos_cache, sin_cache, position_ids=None, *, interleaved=0,
                     num_heads=0, rotary_embedding_dim=0):  # fmt: skip
    """x (B, T, H D), or (B, H, T, D) of one token, caches (B, T, R / 2) or (P, R / 2)."""
    heads = num_heads if x.ndim == 3 else x.shape[1]
    if not heads or (x.ndim == 4 and x.shape[2] != 1):
        return None
    tokens, size = math.prod(x.shape) // x.shape[-1], x.shape[-1] // (heads if x.ndim == 3 else 1)
    tokens = tokens if x.ndim == 3 else x.shape[0]
    half = cos_cache.shape[-1]
    if position_ids is not None and position_ids.size > MOST_ROWS:
        return None
    if 2 * half != (rotary_embedding_dim or size) or size % 2:
        return None
    caches = [cos_cache, sin_cache]
    if position_ids is not None:
        if any(len(c.shape) != 2 for c in caches):
            return None
        caches = [
            _looked_up(rows, c, rows_f32, (rows.address(c),), position_ids, name="RotaryEmbedding")
            for c in caches
        ]
    if any(math.prod(cache.shape) != tokens * half for cache in caches):
        return None
    y = rows.room(x.shape, x.dtype)
    where = rows.address(x), y.address, *(rows.address(cache) for cache in caches)
    grid = blocks(tokens * heads * (size // 2))
    rows.launch(rotate, grid, *where, tokens, heads, size, 2 * half, interleaved)
    return rows.giving(y)


@on_gpu("Gather", 0)
def gather(rows, data, indices, *, axis=0):
    """Rows of a table (V, K), or of (1, ..., T, K) along the last axis but one."""
    if indices.size > MOST_ROWS:
        return None
    if isinstance(data, DeviceLookup):
        if axis not in (0, -2):
            return None
        lead, table, kernel, where = (), data, data.kernel, data.addresses
    else:
        lead = data.shape[:-2]
        if data.ndim < 2 or axis % data.ndim != len(lead) or math.prod(lead) != 1:
            return None
        table, kernel, where = data.as_shape(data.shape[-2:]), rows_f32, (rows.address(data),)
    return rows.giving(_looked_up(rows, table, kernel, where, indices, lead))


def _looked_up(rows, table, kernel, where, indices, lead=(), name="Gather"):
    """Rows of a table (V, K) that lies at addresses -> (*lead, indices' shape, K)."""
    v, k = table.shape
    check = partial(in_range, name, indices, v, len(lead))
    check()
    rows.checks.append(check)
    y = rows.room((*lead, *indices.shape, k), table.dtype)
    grid = *blocks(k), indices.size
    rows.launch(kernel, grid, *where, rows.address(indices, np.int64), y.address, v, k)
    return y


@on_gpu("Cast", 0)
def cast(rows, x, *, to, saturate=1, round_mode="up"):
    """x (...) -> (...) of another type of floats, as which the same elements count."""
    dtype = numpy_dtype(to)
    return rows.giving(x.as_type(dtype)) if dtype.name in FLOATS else None


def _declare_view(op_type):
    @on_gpu(op_type, 0)
    def view(rows, x, *others, **attributes):
        """x (...) -> the same elements in the shape that the CPU's operator gives."""
        hollow = np.empty(x.shape, np.uint8)
        return rows.giving(x.as_shape(rows.host.function(hollow, *others, **attributes).shape))


for _op_type in ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"):
    _declare_view(_op_type)
