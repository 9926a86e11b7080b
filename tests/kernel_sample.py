"""A small sample of every kind of kernel against the oracles. Run as a program by the tests of
other targets and of uncompiled kernels, which a process has to choose before it imports numba."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import kernel_oracles as oracles  # noqa: E402
import panel_oracles  # noqa: E402
import quantised_models as quantised  # noqa: E402
import written_models as written  # noqa: E402
from spilled_slots import Twins  # noqa: E402
from tiled_weights import Tiled, TiledParts  # noqa: E402

from onnxstream_nb import spill  # noqa: E402
from onnxstream_nb.kernels.attention import attention_23  # noqa: E402
from onnxstream_nb.kernels.matmul import matmul  # noqa: E402
from onnxstream_nb.kernels.norm import layer_normalization, rms_normalization  # noqa: E402
from onnxstream_nb.kernels.panel_tiles import LIMIT  # noqa: E402
from onnxstream_nb.kernels.rope import rotary_embedding  # noqa: E402
from onnxstream_nb.kernels.rounding import round_to_blocks, round_with_feedback  # noqa: E402
from onnxstream_nb.kernels.threads import set_precision, set_threads, team  # noqa: E402
from onnxstream_nb.kvcache import KVSlot  # noqa: E402
from onnxstream_nb.registry import kernels  # noqa: E402
from onnxstream_nb.session import Session  # noqa: E402
from onnxstream_nb.weights import Weight  # noqa: E402

RNG = np.random.default_rng(5)


def normal(*shape: int) -> oracles.Array:
    return RNG.standard_normal(shape, np.float32)  # type: ignore[no-any-return]


def assert_close(got: oracles.Array, wanted: oracles.Array) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 5e-6 * max(1, np.abs(wanted).max())


def quant(encodings: tuple[str, ...]) -> None:
    for encoding in encodings:
        raw = oracles.random_blocks(encoding, 3, 256, RNG)
        out = np.empty((3, 256), np.float32)
        where = raw.ctypes.data, raw.shape[1], out.ctypes.data
        team().run([(kernels()[f"decode_{encoding}"], *where, 3, 256, 0)])
        assert np.array_equal(out, oracles.decoded(encoding, raw)), encoding


def products(orders: tuple[tuple[str, bool], ...]) -> None:
    for encoding, transposed in orders:
        for k, n in ((32, 5), (96, 35)) if encoding in oracles.BLOCKED else ((1, 3), (77, 35)):
            weight, dense = oracles.random_weight(encoding, k, n, RNG, transposed)
            for m in (1, 2, 13):
                x = normal(m, k)
                oracles.assert_product(matmul(x, weight), x, dense, encoding)


def tiles(orders: tuple[tuple[str, bool], ...]) -> None:
    """As the whole weight, and few rows as each of them alone; NumPy's twin of the tile that many
    rows are multiplied in adds up what it is given in an order of its own."""
    for encoding, transposed in orders:
        weight, dense = oracles.random_weight(encoding, 64, 65, RNG, transposed)
        x = normal(9, 64)
        for m in (1, 3, 9):
            whole, y = matmul(x[:m], weight), matmul(x[:m], Tiled(weight, (32,)))
            oracles.assert_product(y, x[:m], dense, encoding)
            assert np.array_equal(y, whole) or (m == 9 and not transposed), encoding
        assert np.array_equal(matmul(x[:3], weight)[1:2], matmul(x[1:2], weight)), encoding


def panels(encodings: tuple[str, ...]) -> None:
    """Directly, whether or not this target profits by them."""
    for encoding in encodings:
        k = 256 if "_k" in encoding else 96
        weight, dense = panel_oracles.random_packed(encoding, k, 19, RNG)
        for m in (1, 3):
            x = normal(m, k)
            y = matmul(x, weight)
            oracles.assert_product(y, x, dense.values.T, packed=True)
            panel_oracles.assert_integer_product(y, x, dense)
        x = normal(9, k)
        panel_oracles.assert_integer_product(fast(x, weight), x, dense, LIMIT)


def fast(x: oracles.Array, weight: Weight) -> oracles.Array:
    """A product of 8 bits of X, whether or not this target profits by it."""
    name = f"panels_{weight.encoding}"
    set_precision("fast")
    with patch.dict(kernels(), {f"gemm_fast_{name}": kernels()[f"gemm_bytes_{name}"]}):
        y: oracles.Array = matmul(x, weight)
    set_precision("exact")
    return y


PARTS = (
    quantised.dequantised("int4", 96, 35, 32, zeros=True),
    quantised.dequantised("uint4", 64, 32, 64),
    quantised.dequantised("uint4", 64, 19, 64, turned=True),
    quantised.dequantised("int8", 96, 35, per="row"),
    quantised.nbits(8, 64, 5, 32),
    written.half_scaled("uint4", 96, 34, 32, zeros=True),
    written.half_scaled("int8", 96, 35, 32, turned=True),
)
TABLE = written.tied_integers("int8", 40, 64, 32)


def parts(samples: tuple[quantised.Quantised, ...]) -> None:
    for found in samples:
        weight = quantised.weight_of(found)
        for m in (1, 3):
            x = normal(m, found.k)
            y = matmul(x, weight)
            oracles.assert_product(y, x, found.dense, packed=True)
            if weight.ref.cut_by_rows:
                assert np.array_equal(matmul(x, TiledParts(weight)), y)
        x, dense = normal(9, found.k), found.dense.T
        known = panel_oracles.Dense(dense, np.abs(dense))
        panel_oracles.assert_integer_product(fast(x, weight), x, known, LIMIT)
    if samples is not PARTS:
        return
    with Session(TABLE.model, load="ram") as session:
        ids = np.array([[39, 0, 7]])
        rows = session.run({"ids": ids})["e"]
    assert np.array_equal(rows, TABLE.dense[ids].astype(np.float32))


def attention(head_sizes: tuple[int, ...]) -> None:
    for size in head_sizes:
        q, k, v = normal(1, 3, 5, size), normal(1, 1, 5, size), normal(1, 1, 5, size)
        mask = RNG.random((5, 5)) > 0.5
        assert_close(attention_23(q, k, v, mask), oracles.attention(q, k, v, mask))
        slots = [KVSlot("key", 1, size), KVSlot("value", 1, size)]
        for t in range(0, 5, 4):
            part = [x[:, :, t : t + 4] for x in (q, k, v)]
            y, *slots = attention_23(*part, None, *slots, is_causal=1, n_outputs=3)
            keys, values = np.asarray(slots[0]), np.asarray(slots[1])
            assert np.array_equal(keys, k[:, :, : t + 4].astype(np.float16))
            assert_close(y, oracles.attention(part[0], keys, values, causal=True, before=t))


def spilled() -> None:
    """Beyond the first of the smallest slices."""
    with TemporaryDirectory() as folder, patch.object(spill, "SLICE_BYTES", 1):
        for encoding in ("f16", "q8"):
            twins = Twins(Path(folder), 1, 2, (16, 33), encoding)
            twins.step(0, 130)
            twins.step(1)
            twins.step(3)
            twins.assert_same_contents()


def norms() -> None:
    x, scale, bias = normal(3, 45), normal(45), normal(45)
    assert_close(rms_normalization(x, scale), oracles.rms_norm(x, scale, 1e-5))
    y = layer_normalization(x, scale, bias)
    assert_close(y, oracles.layer_norm(x, scale, bias, 1e-5))


def rope() -> None:
    x, turn = normal(1, 2, 3, 36), normal(1, 3, 18)
    cos, sin = np.cos(turn), np.sin(turn)
    for interleaved in (0, 1):
        y = rotary_embedding(x, cos, sin, interleaved=interleaved)
        assert_close(y, oracles.rotary(x, cos, sin, bool(interleaved)))


def rounding() -> None:
    """Scales that are searched, and errors that are fed back, each to the next column."""
    x = normal(3, 50)
    for low, high in ((-8, 7), (0, 15)):
        errors = []
        for search in (False, True):
            found = round_to_blocks(x, None, 32, low, high, search, True)
            zeros = 0 if found.zeros is None else found.zeros.repeat(32, 1)[:, :50]
            values = (found.integers.astype(np.float32) - zeros) * found.scales.repeat(32, 1)[
                :, :50
            ]
            errors.append(np.square(values - x).sum())
            step = np.abs(found.scales).max()
            assert np.abs(values - x).max() <= (2.5 if search else 1.01) * step
        assert errors[1] <= errors[0]
    fed = round_with_feedback(x, np.eye(50) - np.eye(50, k=1), None, 32, -8, 7, False, False)
    left = x - fed.integers * fed.scales.repeat(32, 1)[:, :50]
    assert np.abs(left.sum(axis=1)).max() <= np.abs(fed.scales).max()  # each error was passed on


FEW: dict[str, Callable[[], None]] = {
    "products": lambda: products((("float16", True), ("q4_0", True))),
    "panels": lambda: panels(("q4_1", "q6_k")),
    "parts": lambda: parts(PARTS[:1]),
    "attention": lambda: attention((33,)),
}
ALL: dict[str, Callable[[], None]] = {
    "quant": lambda: quant(oracles.BLOCKED),
    "products": lambda: products(
        (("float16", True), ("q4_0", True), ("bfloat16", False), ("uint8", False))
    ),
    "tiles": lambda: tiles((("float16", True), ("q4_0", True), ("uint8", False))),
    "panels": lambda: panels(oracles.BLOCKED),
    "parts": lambda: parts(PARTS),
    "attention": lambda: attention((16, 33)),
    "spilled": spilled,
    "norms": norms,
    "rope": rope,
    "rounding": rounding,
}

if __name__ == "__main__":
    for threads in (1, 2):
        set_threads(threads)
        for name, check in (FEW if sys.argv[1:] == ["few"] else ALL).items():
            check()
            print(name, threads)
