"""MatMul and Gemm over every encoding and storage order, against float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_oracles import ORDERS, PLAIN, assert_product, normal, random_weight

from onnxstream_nb.errors import ShapeError
from onnxstream_nb.kernels.matmul import gemm, lower_matmul, matmul
from onnxstream_nb.kernels.threads import set_precision, set_threads
from onnxstream_nb.kernels.tile_bf16 import AMX, SUPPORTED

Array = np.ndarray[Any, Any]
MS = (1, 2, 3, 11, 12, 13, 25)
NS = (1, 3, 4, 5, 31, 32, 33, 67)
THREADS = (1, 2, 5)
PLAIN_KS, BLOCK_KS = (1, 31, 33, 77, 256, 259), (256, 512)

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_every_encoding_order_and_odd_size(
    encoding: str, transposed: bool, threads: int, rng: np.random.Generator
) -> None:
    set_threads(threads)
    plain = encoding in PLAIN or encoding == "uint8"
    for k in PLAIN_KS if plain else (*BLOCK_KS, 32, 96) if "_k" not in encoding else BLOCK_KS:
        x = normal(rng, max(MS), k)
        for n in NS:
            weight, dense = random_weight(encoding, k, n, rng, transposed)
            for m in MS:
                assert_product(matmul(x[:m], weight), x[:m], dense, encoding)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("encoding", [e for e, transposed in ORDERS if transposed and e != "uint8"])
def test_rows_longer_than_the_first_cache_has_room_for(
    encoding: str, threads: int, rng: np.random.Generator
) -> None:
    """Read several at a time, where shorter ones may be read singly; 37 are whole blocks of them
    and some more. Each vector alone gives the same bits, and each number of threads."""
    set_threads(threads)
    for k in (4096, 5632, 6400 if "_k" in encoding else 5664):
        x = normal(rng, 3, k)
        weight, dense = random_weight(encoding, k, 37, rng, True)
        y = matmul(x, weight)
        assert_product(y, x, dense, encoding)
        for row in range(3):
            assert np.array_equal(matmul(x[row : row + 1], weight), y[row : row + 1])
        set_threads(1)
        assert np.array_equal(matmul(x, weight), y)
        set_threads(threads)


@pytest.fixture
def fast() -> Iterator[None]:
    set_precision("fast")
    yield
    set_precision("exact")


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_fast_products_round_at_most_to_bfloat16(
    encoding: str, transposed: bool, threads: int, rng: np.random.Generator, fast: None
) -> None:
    """Plain weights and X by 2 ** -9 at most each; products with others stay exact."""
    set_threads(threads)
    k = 512
    x = normal(rng, max(MS), k)
    for n in NS:
        weight, dense = random_weight(encoding, k, n, rng, transposed)
        for m in MS:
            y = matmul(x[:m], weight)
            if m == 1 or encoding not in PLAIN:
                assert_product(y, x[:m], dense, encoding)
                continue
            size = np.abs(x[:m]).astype(np.float64) @ np.abs(dense)
            error = np.abs(y - x[:m].astype(np.float64) @ dense)
            assert (error <= (2.0**-8 + 2.0**-18 + 1e-6) * size).all()


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_every_encoding_at_every_precision(
    encoding: str, transposed: bool, precision: str, rng: np.random.Generator
) -> None:
    """What has no fast kernel runs exactly, and is packed for the kernel that runs."""
    set_precision(precision)
    x = normal(rng, 37, 512)
    weight, dense = random_weight(encoding, 512, 67, rng, transposed)
    y = matmul(x, weight)
    if precision == "exact" or encoding not in PLAIN or not SUPPORTED:
        assert_product(y, x, dense, encoding)
    else:  # both factors rounded to 8 bits
        terms = np.abs(x).astype(np.float64) @ np.abs(dense)
        assert (np.abs(y - x.astype(np.float64) @ dense) <= 2 * 2.0**-8 * terms).all()


@pytest.mark.parametrize("transposed", [True, False])
def test_leading_axes_and_vectors(transposed: bool, rng: np.random.Generator) -> None:
    weight, dense = random_weight("float16", 45, 37, rng, transposed)
    for shape in ((45,), (1, 45), (2, 3, 45), (1, 1, 45), (2, 1, 4, 45), (0, 45), (2, 0, 45)):
        x = normal(rng, *shape)
        assert_product(matmul(x, weight), x, dense)


def test_activations_in_any_layout(rng: np.random.Generator) -> None:
    weight, dense = random_weight("q8_0", 64, 21, rng, True)
    x = normal(rng, 64, 14)
    for view in (x.T, x.T[::2], x.T[::-1], np.broadcast_to(x.T[:1], (5, 64)), x[:, 3]):
        assert_product(matmul(view, weight), view, dense, "q8_0")


@pytest.mark.parametrize("m", [1, 2, 13])
def test_a_non_finite_weight_reaches_only_its_column(m: int, rng: np.random.Generator) -> None:
    for transposed in (True, False):
        weight, dense = random_weight("float32", 40, 35, rng, transposed)
        stored = weight.stored()
        stored.T[33 if not transposed else 5, 5 if not transposed else 33] = np.inf
        y = matmul(np.ones((m, 40), np.float32), weight)
        reached = ~np.isfinite(y[:, 33]) if AMX else np.isinf(y[:, 33])  # inf - inf in two parts
        assert reached.all() and np.isfinite(np.delete(y, 33, axis=1)).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3, 5, 7), (3, 7, 4)), ((5, 7), (7, 4)), ((7,), (7, 4)), ((5, 7), (7,)), ((7,), (7,)),
     ((3, 1, 5, 7), (2, 7, 4)), ((7,), (2, 3, 7, 4)), ((2, 3, 5, 7), (7,)), ((2, 5, 7), (7, 4)),
     ((1, 7), (3, 7, 4)), ((3, 5, 7), (1, 7, 33)), ((2, 13, 33), (2, 33, 65))],
)  # fmt: skip
def test_broadcast_products_are_numpy_s(
    a: tuple[int, ...], b: tuple[int, ...], rng: np.random.Generator
) -> None:
    x, w = normal(rng, *a), normal(rng, *b)
    wanted = np.matmul(x.astype(np.float64), w)
    y = matmul(x, w)
    assert y.shape == wanted.shape and y.dtype == np.float32
    assert np.abs(y - wanted).max() <= 1e-5


@pytest.mark.parametrize(
    ("a", "b"),
    [((0, 7), (7, 4)), ((3, 7), (7, 0)), ((3, 0), (0, 4)), ((2, 3, 0), (2, 0, 4)), ((0,), (0, 4)),
     ((2, 3, 0), (0, 4)), ((0, 0), (0, 4)), ((0, 3, 7), (7, 4)), ((0, 3, 7), (1, 7, 4)),
     ((2, 0, 7), (2, 7, 4)), ((0,), (0,))],
)  # fmt: skip
def test_empty_axes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    y = matmul(np.ones(a, np.float32), np.ones(b, np.float32))
    wanted = np.matmul(np.ones(a), np.ones(b))
    assert y.shape == wanted.shape and not y.any()


@pytest.mark.parametrize(("m", "k", "n"), [(0, 32, 4), (3, 32, 0), (3, 0, 4), (0, 0, 0), (1, 0, 4)])
def test_empty_axes_of_an_encoded_weight(m: int, k: int, n: int, rng: np.random.Generator) -> None:
    for encoding, transposed in (("q8_0", True), ("float16", False), ("uint8", False)):
        weight, _ = random_weight(encoding, k, n, rng, transposed)
        y = matmul(np.ones((m, k), np.float32), weight)
        assert y.shape == (m, n) and not y.any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_accumulated_in_float32(dtype: Any, rng: np.random.Generator) -> None:
    # 4096 equal terms: a float16 or bfloat16 sum would stall far below.
    x = np.full((3, 4096), 0.25, dtype)
    w = np.full((4096, 5), 0.5, dtype)
    y = matmul(x, w)
    assert y.dtype == dtype and (y.astype(np.float32) == 512).all()
    x, w = normal(rng, 3, 77).astype(dtype), normal(rng, 77, 33).astype(dtype)
    wanted = (x.astype(np.float64) @ w.astype(np.float64)).astype(np.float32)
    unit = 2.0**-8 if dtype != np.float16 else 2.0**-11
    assert (np.abs(matmul(x, w).astype(np.float32) - wanted) <= unit * np.abs(wanted) + 1e-5).all()


def test_short_activations_with_a_native_weight_keep_their_type(rng: np.random.Generator) -> None:
    weight, dense = random_weight("float16", 77, 33, rng, False)
    x = normal(rng, 3, 77).astype(np.float16)
    y = matmul(x, weight)
    wanted = x.astype(np.float64) @ dense
    assert y.dtype == np.float16
    assert (np.abs(y - wanted) <= 2.0**-10 * np.abs(wanted) + 1e-4).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64, np.float64])
def test_other_types_are_exact(dtype: Any, rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 2**14, (2, 3, 5)), rng.integers(0, 2**14, (5, 4))
    y = matmul(a.astype(dtype), b.astype(dtype))
    assert y.dtype == dtype and np.array_equal(y, a @ b)
    y = gemm(a[0].astype(dtype), b.astype(dtype), np.arange(4).astype(dtype))
    assert y.dtype == dtype and np.array_equal(y, a[0] @ b + np.arange(4))


C_SHAPES: tuple[Any, ...] = (None, (), (1,), (9,), (1, 9), (6, 1), (6, 9))


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c_shape", C_SHAPES, ids=str)
def test_gemm(trans_a: int, trans_b: int, c_shape: Any, rng: np.random.Generator) -> None:
    a = normal(rng, *((37, 6) if trans_a else (6, 37)))
    b = normal(rng, *((9, 37) if trans_b else (37, 9)))
    c = None if c_shape is None else np.asarray(normal(rng, *c_shape), np.float32)
    a64 = (a.T if trans_a else a).astype(np.float64)
    b64 = (b.T if trans_b else b).astype(np.float64)
    for alpha, beta in ((1.0, 1.0), (0.5, 2.0), (-1.25, 0.0), (0.0, 1.0), (1.0, -0.5)):
        wanted = alpha * (a64 @ b64) + (0 if c is None else beta * c.astype(np.float64))
        y = gemm(a, b, c, alpha=alpha, beta=beta, transA=trans_a, transB=trans_b)
        assert y.shape == (6, 9) and y.dtype == np.float32
        assert np.abs(y - wanted).max() <= 2e-5


@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_gemm_over_a_native_weight(
    encoding: str, transposed: bool, rng: np.random.Generator
) -> None:
    weight, dense = random_weight(encoding, 256, 33, rng, transposed)
    a, bias = normal(rng, 5, 256), normal(rng, 33)
    wanted = a.astype(np.float64) @ dense + bias
    y = gemm(a, weight, bias)
    flipped = gemm(a.T, weight.T.T, bias, transA=1)
    slack = 1e-5 * (np.abs(a) @ np.abs(dense) + np.abs(bias))
    assert (np.abs(y - wanted) <= slack).all() and (np.abs(flipped - wanted) <= slack).all()


@pytest.mark.parametrize("encoding", [*PLAIN, "q8_0", "q4_k"])
def test_gemm_with_a_transposed_native_weight(encoding: str, rng: np.random.Generator) -> None:
    weight, dense = random_weight(encoding, 256, 33, rng, True)
    stored = weight.T  # a logical (N, K) matrix, stored as it is: what transB=1 is for
    assert stored.shape == (33, 256) and not stored.transposed
    for m in (1, 4):
        a = normal(rng, m, 256)
        assert_product(gemm(a, stored, transB=1), a, dense, encoding)


def test_gemm_keeps_float16() -> None:
    a = np.full((2, 64), 0.5, np.float16)
    y = gemm(a, a.copy(), np.ones(2, np.float16), transB=1, alpha=0.5, beta=3.0)
    assert y.dtype == np.float16 and (y == 11).all()


@pytest.mark.parametrize("encoding", ["q8_0", "q4_1", "q6_k", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_x_reaches_the_result(
    encoding: str, bad: float, rng: np.random.Generator
) -> None:
    weight, _ = random_weight(encoding, 256, 9, rng, True)
    x = normal(rng, 1, 256)
    x[0, 77] = bad
    assert not np.isfinite(matmul(x, weight)).any()


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_that_do_not_meet_are_refused(
    m: int, transposed: bool, rng: np.random.Generator
) -> None:
    """Kernels take addresses: they would read behind the shorter of the two."""
    weight, _ = random_weight("float16", 64, 48, rng, transposed)
    for k in (32, 65):
        with pytest.raises(ShapeError, match=f"a product of {k} columns and 64 rows"):
            matmul(normal(rng, m, k), weight)
        assert lower_matmul(normal(rng, m, k), weight) is None
    with pytest.raises(ShapeError, match="a product of 32 columns and 64 rows"):
        matmul(normal(rng, m, 32), normal(rng, 64, 48))
