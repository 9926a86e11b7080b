"""Independent references for the kernels' tests: encoded weights by the `gguf` package, attention,
norms and rotary embedding in float64 NumPy."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from onnxstream_nb.graph import ENCODINGS, WeightRef
from onnxstream_nb.kernels.quads import LIMIT
from onnxstream_nb.kernels.tile_bf16 import AMX
from onnxstream_nb.weights import Weight

Array = np.ndarray[Any, Any]

PLAIN = ("float32", "float16", "bfloat16")
BLOCKED = ("q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
ORDERS = [(name, True) for name in (*PLAIN, *BLOCKED)] + [(n, False) for n in (*PLAIN, "uint8")]
"""(encoding, transposed) of every matrix product there is."""
UINT8_SCALE, UINT8_ZERO = 0.01, 117


def normal(rng: Any, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)  # type: ignore[no-any-return]


def random_blocks(encoding: str, rows: int, k: int, rng: Any, scales: Any = None) -> Array:
    """(rows, bytes a row) uint8: random blocks whose fp16 scales are random, or those given."""
    block, nbytes = ENCODINGS[encoding].block, ENCODINGS[encoding].nbytes
    raw = rng.integers(0, 256, (rows, k // block, nbytes), dtype=np.uint8)
    if scales is None:
        scales = rng.standard_normal((rows, k // block, 2)) * 0.05
    halves = np.broadcast_to(np.asarray(scales, np.float16), (rows, k // block, 2)).copy()
    halves = halves.view(np.uint8)
    if encoding == "q6_k":
        raw[..., -2:] = halves[..., :2]
    elif encoding in ("q8_0", "q4_0"):
        raw[..., :2] = halves[..., :2]
    else:
        raw[..., :4] = halves
    return raw.reshape(rows, k // block * nbytes)


def decoded(encoding: str, raw: Array) -> Array:
    """The float32 values of encoded rows, as the `gguf` package has them."""
    result: Array = dequantize(raw, getattr(gguf.GGMLQuantizationType, encoding.upper()))
    return result


def widened(bits: Array) -> Array:
    """uint16 bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored_matrix(encoding: str, rows: int, k: int, rng: Any) -> tuple[Array, Array]:
    """A random matrix (rows, k) as stored, and its float32 values."""
    if encoding in BLOCKED:
        raw = random_blocks(encoding, rows, k, rng)
        return raw, decoded(encoding, raw) if raw.size else np.zeros((rows, k), np.float32)
    if encoding == "uint8":
        raw = rng.integers(0, 256, (rows, k), dtype=np.uint8)
        return raw, ((raw.astype(np.float64) - UINT8_ZERO) * UINT8_SCALE).astype(np.float32)
    values = rng.standard_normal((rows, k)).astype(np.float32)
    if encoding == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, widened(bits)
    raw = values.astype(encoding)
    return raw, raw.astype(np.float32)


def as_weight(encoding: str, raw: Array, shape: tuple[int, int], transposed: bool) -> Weight:
    """Stored rows as a native weight of the logical shape (K, N)."""
    buffer = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    ref = WeightRef(
        "w", shape, "float32", b"", nbytes=buffer.nbytes, encoding=encoding,
        transposed=transposed, scale=UINT8_SCALE, zero_point=UINT8_ZERO,
    )  # fmt: skip
    return Weight(ref, buffer)


def random_weight(
    encoding: str, k: int, n: int, rng: Any, transposed: bool
) -> tuple[Weight, Array]:
    """A native weight (K, N) stored in either order, and its float32 values (K, N)."""
    raw, values = stored_matrix(encoding, n if transposed else k, k if transposed else n, rng)
    weight = as_weight(encoding, raw, (k, n), transposed)
    return weight, values.T if transposed else values


def assert_product(
    y: Array, x: Array, w: Array, encoding: str = "float32", packed: bool = False
) -> None:
    """Y = X W within a millionth of the sum of its terms' magnitudes, each element.

    uint8 subtracts scale zero sum(x) from scale sum(x q): those are its terms. A product with a
    packed weight is one of integers: a group of 32 activations is rounded to 1 / 16256 of its
    largest, half of that at most for each. In AMX tiles many rows times plain floats are three
    products in bfloat16, which leave out 2 ** -15 of each term (gemm_bf16.py).
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    assert y.shape == (*x.shape[:-1], w.shape[-1])
    terms = np.abs(w) + (2 * UINT8_SCALE * UINT8_ZERO if encoding == "uint8" else 0)
    slack = 1e-6 * (np.abs(x) @ terms) + 1e-30
    if packed:
        largest = np.abs(x).reshape(-1, 32).max(axis=1).repeat(32).reshape(x.shape)
        slack = slack + (largest / (2 * LIMIT)) @ terms
    if AMX and encoding in PLAIN and x.size > x.shape[-1]:
        slack = slack + 2.0**-15 * (np.abs(x) @ terms)
    error = np.abs(y.astype(np.float64) - x @ w)
    assert (error <= slack).all(), f"{(error / slack).max()} times the bound"


def attention_scores(
    q: Array, k: Array, mask: Array | None, causal: bool, before: Any, scale: float, softcap: float,
    lengths: Any = None, left: int = -1, right: int = -1,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """q (B, H, T, D), k (B, KV, S, D) -> scores (B, H, T, S) raw, soft-capped, with bias, softmax.

    `before` is the number of keys before the first query, an int or one a batch.
    """
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    raw = np.einsum("bhtd,bhsd->bhts", q.astype(np.float64), k.astype(np.float64)) * scale
    capped = np.tanh(raw / softcap) * softcap if softcap else raw
    at, queries = np.arange(k.shape[2]), np.arange(q.shape[2])[:, None]
    position = queries + np.reshape(before, (-1, 1, 1, 1))
    allowed = np.ones(raw.shape, bool)
    if causal:
        allowed &= at <= position
    if left >= 0:
        allowed &= at >= position - left
    if right >= 0:
        allowed &= at <= position + right
    if lengths is not None:
        allowed &= at < np.reshape(lengths, (-1, 1, 1, 1))
    biased = np.where(allowed, capped, -np.inf)
    if mask is not None:
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, k.shape[2] - mask.shape[-1])]
        if mask.dtype == np.bool_:
            biased = np.where(np.pad(mask, missing), biased, -np.inf)
        else:
            biased = biased + np.pad(mask.astype(np.float64), missing, constant_values=-np.inf)
    top = biased.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(biased - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return raw, capped, biased, weights / np.where(total == 0, 1, total)


def attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, causal: bool = False,
    before: Any = 0, scale: float | None = None, softcap: float = 0.0, **limits: Any,
) -> Array:  # fmt: skip
    """q (B, H, T, D), k (B, KV, S, D), v (B, KV, S, E) -> (B, H, T, E), float64."""
    factor = 1 / np.sqrt(q.shape[3]) if scale is None else scale
    weights = attention_scores(q, k, mask, causal, before, factor, softcap, **limits)[3]
    return weights @ np.repeat(v, q.shape[1] // v.shape[1], axis=1).astype(np.float64)


def rms_norm(x: Array, scale: Array, epsilon: float, axes: tuple[int, ...] = (-1,)) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt(np.square(x).mean(axis=axes, keepdims=True) + epsilon) * scale


def layer_norm(
    x: Array, scale: Array, bias: Any, epsilon: float, axes: tuple[int, ...] = (-1,)
) -> Array:
    x = x.astype(np.float64)
    spread = np.sqrt(x.var(axis=axes, keepdims=True) + epsilon)
    return (x - x.mean(axis=axes, keepdims=True)) / spread * scale + bias


def rotary(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """x (B, H, T, D), cos and sin (B, T, R / 2): complex rotation of pairs, the rest as it is."""
    half = cos.shape[-1]
    turned = x.astype(np.float64).copy()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    pairs = x[..., first].astype(np.float64) + 1j * x[..., second]
    pairs = pairs * (cos.astype(np.float64) + 1j * sin)[:, None]
    turned[..., first], turned[..., second] = pairs.real, pairs.imag
    return turned
