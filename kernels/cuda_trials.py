"""Kernels of the GPU put to trial on made-up arrays: for tests on one, and to measure it.

Dims: as the kernels' own. What is expected is computed by NumPy in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..registry import op
from .cuda_attention import combine_splits, decode_attention, partial_bytes, queries_of_block
from .cuda_flash import prefill_attention
from .cuda_gemm import GEMM, GEMM_75, GEMM_SMALL
from .cuda_gemv import ENCODINGS, gemv_launch
from .cuda_matrix import TILES
from .cuda_norm import rms_norm, softmax_rows
from .cuda_sampling import SHARE_BITS, draw
from .cuda_survey import CHUNK, LOWEST, PART, SURVEYED, survey, take_largest
from .cuda_widen import WIDEN

TALL = 32  # rows of a matrix that are made up; larger ones repeat them


@dataclass
class Trial:
    """`launches` takes the arrays' addresses by name; what it makes of them is in `output`, of
    which `wanted` is what it should be, within `tolerance` times the largest of it.

    `nbytes` is what has to be read and written, `products` how many multiplications there are.
    """

    name: str
    arrays: dict[str, np.ndarray]
    launches: Callable
    output: str
    wanted: Callable
    tolerance: float = 1e-5
    products: int = 0
    turning: tuple[str, ...] = field(default=("w", "scales"))

    @property
    def nbytes(self):
        """Bytes of all arrays but spare room: each is read, or written, once."""
        return sum(array.nbytes for name, array in self.arrays.items() if name != "room")


def _normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def _poison(*shape):
    return np.full(shape, np.nan, np.float32)


def _matrix(encoding, n, k):
    """Rows, scales, and what they stand for (N, K) float32."""
    _, _, per, bits, scale_bytes = ENCODINGS[encoding]
    rng, few = np.random.default_rng(k), min(n, TALL)
    if encoding == "f16":
        stored = rng.standard_normal((few, k)).astype(np.float16)
        meant, scales = stored.astype(np.float32), np.zeros((few, 0), np.float16)
    else:
        half = 1 << bits - 1
        q = rng.integers(-half, half, (few, k)).astype(np.int8)
        pairs = rng.uniform(0.5, 1.5, (few, k // 32, scale_bytes // 2)).astype(np.float16)
        d = pairs[..., 0].astype(np.float32)
        offset = np.zeros_like(d)
        if encoding.endswith("z"):
            offset = d * pairs[..., 1].astype(np.float32)
        elif encoding.endswith("m"):
            offset = 8 * d + pairs[..., 1].astype(np.float32)
        meant = q * np.repeat(d, 32, axis=1) + np.repeat(offset, 32, axis=1)
        eights = (q + 8).astype(np.uint32).reshape(few, -1, 4, 2)
        shifts = np.array([[4 * j, 4 * j + 16] for j in range(4)], np.uint32)
        words = np.bitwise_or.reduce(eights << shifts, axis=(-2, -1))
        stored, scales = (q if bits == 8 else words), pairs.reshape(few, -1)
    return tuple(np.resize(a, (n, a.shape[1])) for a in (stored, scales, meant))


def gemv(encoding, rows, n, k):
    """A product of few rows."""
    w, scales, meant = _matrix(encoding, n, k)
    x = _normal(rows, k)

    def launches(a):
        return [gemv_launch(encoding, rows, a["x"], k, [(a["w"], a["scales"], a["y"], n)])]

    arrays = {"x": x, "w": w, "scales": scales, "y": _poison(rows, n)}
    return Trial(
        f"gemv_{encoding}_{rows}", arrays, launches, "y", lambda: x.astype(np.float64) @ meant.T,
        products=rows * n * k,
    )  # fmt: skip


def gemm(kind, m, n, k):
    """A product of many rows; `kind` is large, small or older."""
    kernel = {"large": GEMM, "small": GEMM_SMALL, "older": GEMM_75}[kind]
    tall, wide = TILES[kernel]
    x, w = _normal(m, k).astype(np.float16), _matrix("f16", n, k)[0]

    def launches(a):
        grid = -(-n // wide), -(-m // tall)
        return [(kernel, grid, (kernel.threads,), (a["x"], a["w"], a["y"], m, n, k, n))]

    arrays = {"x": x, "w": w, "y": _poison(m, n)}
    return Trial(
        kernel.name, arrays, launches, "y", lambda: x.astype(np.float64) @ w.astype(np.float64).T,
        products=m * n * k,
    )  # fmt: skip


def widen(encoding, n, k):
    """Integers that become halves."""
    kernel, per, _, _ = WIDEN[encoding]
    w, scales, meant = _matrix(encoding, n, k)
    loads = n * k // per

    def launches(a):
        grid = (-(-loads // kernel.threads),)
        return [(kernel, grid, (kernel.threads,), (a["w"], a["scales"], a["y"], loads))]

    arrays = {"w": w, "scales": scales, "y": _poison(n, k).astype(np.float16)}
    return Trial(kernel.name, arrays, launches, "y", lambda: meant, 2**-10)


def attention(tokens, heads, kv, size, past, splits=0):
    """Attention over `past` positions and the tokens' own: of few tokens, split, or of many."""
    q, positions, group = _normal(tokens, heads, size), past + tokens, heads // kv
    keys = _normal(kv, positions, size).astype(np.float16)
    values = keys[:, ::-1].copy()
    arrays = {
        "q": q, "keys": keys, "values": values, "past": np.array([past]),
        "parts": _poison(partial_bytes(tokens, heads, size, max(splits, 1)) // 4),
        "y": _poison(tokens, heads, size),
    }  # fmt: skip
    end, scale = (positions, 0, size**-0.5, 0.0), size**-0.5

    def split_launches(a):
        each = queries_of_block(group)
        kernel = decode_attention(size, each)
        given = *(a[x] for x in ("q", "keys", "values", "past", "parts")), heads, group
        return [
            (kernel, (splits, tokens, heads // each), (kernel.threads,),
             (*given, positions, splits, *end[1:])),
            (combine_splits, (tokens * heads,), (128,), (a["parts"], a["y"], splits, size)),
        ]  # fmt: skip

    def whole_launches(a):
        kernel = prefill_attention(size)
        given = *(a[x] for x in ("q", "keys", "values", "past", "y")), tokens, heads, group
        return [(kernel, (-(-tokens // 64), heads), (kernel.threads,), (*given, *end))]

    def wanted():
        found = np.zeros(q.shape)
        for t, h in np.ndindex(tokens, heads):
            k, v = (a[h // group, : past + t + 1].astype(np.float64) for a in (keys, values))
            scores = k @ q[t, h] * scale
            weights = np.exp(scores - scores.max())
            found[t, h] = weights @ v / weights.sum()
        return found

    launches = split_launches if splits else whole_launches
    return Trial(
        f"{'decode' if splits else 'prefill'}_attention_{size}", arrays, launches, "y", wanted,
        1e-5 if splits else 3e-3, 2 * tokens * heads * size * (past + (tokens + 1) // 2),
        ("keys", "values"),
    )  # fmt: skip


def norm(rows, columns):
    """RMS norm of rows."""
    x, weight = _normal(rows, columns), _normal(columns)

    def wanted():
        wide = x.astype(np.float64)
        return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight

    def launches(a):
        where = a["x"], a["weight"], a["y"]
        return [(rms_norm, (rows,), (rms_norm.threads,), (*where, columns, 1e-5))]

    arrays = {"x": x, "weight": weight, "y": _poison(rows, columns)}
    return Trial("rms_norm", arrays, launches, "y", wanted, turning=())


def softmax(rows, columns):
    """Softmax of rows."""
    x = _normal(rows, columns)

    def wanted():
        weights = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def launches(a):
        return [(softmax_rows, (rows,), (softmax_rows.threads,), (a["x"], a["y"], columns))]

    arrays = {"x": x, "y": _poison(rows, columns)}
    return Trial("softmax_rows", arrays, launches, "y", wanted, turning=())


def sampling(v, top_k):
    """The largest logit (top_k 0), or one drawn of the top_k."""
    logits, blocks = 3 * _normal(v), -(-v // SURVEYED)
    arrays = {
        "logits": logits, "maxima": _poison(-(-v // CHUNK)), "parts": _poison(blocks, PART // 4),
        "room": _poison(2 * v), "uniform": np.array([1 << SHARE_BITS - 1]), "y": np.array([-1]),
    }  # fmt: skip

    def launches(a):
        where = a["logits"], a["maxima"], a["parts"]
        first = survey, (blocks,), (survey.threads,), (*where, v)
        if not top_k:
            return [first, (take_largest, (1,), (32,), (a["parts"], a["y"], blocks))]
        options = v, top_k, 1 << SHARE_BITS, LOWEST, 1.0
        given = (*where, a["room"], a["uniform"], a["y"], *options)
        return [first, (draw, (1,), (draw.threads,), given)]

    def wanted():
        if not top_k:
            return np.array([np.argmax(logits)])
        ids = np.sort(np.argsort(-logits, kind="stable")[:top_k])
        weights = np.exp(logits[ids].astype(np.float64) - logits.max())
        summed = np.cumsum(weights)
        return ids[[np.searchsorted(summed, summed[-1] / 2, side="right")]]

    name = "draw" if top_k else "take_largest"
    return Trial(name, arrays, launches, "y", wanted, 0.0, turning=())


TRIALS = {
    "gemv": gemv, "gemm": gemm, "widen": widen, "attention": attention, "norm": norm,
    "softmax": softmax, "sampling": sampling,
}  # fmt: skip


@op("CudaTrial", domain="onnxstream_nb")
def cuda_trial(kind, *sizes):
    """A Trial of TRIALS, of these sizes."""
    return TRIALS[kind](*sizes)
