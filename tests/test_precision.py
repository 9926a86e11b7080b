"""Fast and exact products: which kernels run, what they may be off, who chooses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bf16_oracles import assert_rounded, assert_split
from kernel_oracles import ORDERS, PLAIN, assert_product, normal, random_weight
from llama_fixtures import write_gguf
from llama_oracle import Tiny, logits
from llm_checks import exact_model, near
from onnx_models import refusal

from onnxstream_nb.errors import UsageError
from onnxstream_nb.kernels.lowered import FEW_ROWS
from onnxstream_nb.kernels.matmul import gemm, matmul
from onnxstream_nb.kernels.simd import JIT
from onnxstream_nb.kernels.threads import precision, set_precision, set_threads
from onnxstream_nb.kernels.tile_bf16 import AMX, SUPPORTED
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.registry import kernels
from onnxstream_nb.session import Session

Array = np.ndarray[Any, Any]

TINY = Tiny(vocab=67, hidden=96, intermediate=160, heads=6, kv_heads=2, head_dim=16, layers=3)
IDS = [3, 1, 41, 59, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 32, 7, 50]
FAST_LOGITS = 0.04
"""Of the largest logit. Rounding both factors to 8 bits is off by 0.0023 of a term (each by 2 ** -8
over the root of 6, on average), and so is a sum of random terms; a logit is the end of some 20 such
products, whose errors add up to 0.011 on average and 0.022 at worst in this model."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(47)


@pytest.fixture(autouse=True)
def exact_afterwards(one_thread_afterwards: None) -> Iterator[None]:
    yield
    set_precision("exact")


def assert_fast(y: Array, x: Array, w: Array, encoding: str) -> None:
    if SUPPORTED and len(x) > FEW_ROWS and encoding in PLAIN:
        assert_rounded(y, x, w)
    else:
        assert_exact(y, x, w, encoding)


def assert_exact(y: Array, x: Array, w: Array, encoding: str) -> None:
    if AMX and len(x) > FEW_ROWS and encoding in PLAIN:
        assert_split(y, x, w)
    else:
        assert_product(y, x, w, encoding)


CHECKS: dict[str, Callable[[Array, Array, Array, str], None]] = {
    "fast": assert_fast,
    "exact": assert_exact,
}


# -- which kernels


@pytest.mark.parametrize("rest", [f"{o}_{e}" for o in ("rows", "columns") for e in PLAIN])
def test_names_stand_for_what_the_processor_has(rest: str) -> None:
    fast, exact = kernels()[f"gemm_fast_{rest}"], kernels()[f"gemm_exact_{rest}"]
    assert fast.name == (f"gemm_bf16_{rest}" if SUPPORTED else f"gemm_{rest}")
    assert exact.name == (f"gemm_split_{rest}" if AMX else f"gemm_{rest}")


def test_every_product_of_many_rows_has_both_names() -> None:
    names = {n.removeprefix("gemm_fast_") for n in kernels() if n.startswith("gemm_fast_")}
    assert names == {n.removeprefix("gemm_exact_") for n in kernels() if "gemm_exact_" in n}
    products = {k.name.removeprefix("gemm_") for k in kernels().values() if "gemm" in k.name}
    assert names == {n for n in products if not n.startswith(("bf16_", "split_", "bytes_"))}


# -- the operators


@pytest.mark.parametrize("wanted", ["fast", "exact"])
@pytest.mark.parametrize(("encoding", "transposed"), ORDERS)
def test_every_encoding_at_both_precisions(
    encoding: str, transposed: bool, wanted: str, rng: Any
) -> None:
    set_precision(wanted)
    for threads in (1, 2):
        set_threads(threads)
        for k, n in ((256, 35), (512, 5), *([(77, 33)] if encoding in PLAIN else [])):
            weight, dense = random_weight(encoding, k, n, rng, transposed)
            for m in (1, 2, 8, 9, 13, 40):
                x = normal(rng, m, k)
                CHECKS[wanted](matmul(x, weight), x, dense, encoding)


@pytest.mark.parametrize("wanted", ["fast", "exact"])
def test_arrays_leading_axes_and_gemm(wanted: str, rng: Any) -> None:
    set_precision(wanted)
    check = CHECKS[wanted]
    x, w = normal(rng, 2, 3, 77), normal(rng, 77, 33)
    check(matmul(x, w).reshape(6, 33), x.reshape(6, 77), w, "float32")
    batch = normal(rng, 2, 77, 5)
    for i in range(2):
        check(matmul(x, batch)[i], x[i], batch[i], "float32")
    check(gemm(x[0], w.T, transB=1), x[0], w, "float32")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        short = x[0].astype(dtype), w.astype(dtype)
        y = matmul(*short)
        assert y.dtype == dtype
        error = np.abs(y.astype(np.float64) - short[0].astype(float) @ short[1].astype(float))
        assert (error <= 2.0**-6 * (np.abs(x[0]) @ np.abs(w))).all()


def test_nothing_to_multiply() -> None:
    set_precision("fast")
    for m, k, n in ((0, 32, 4), (3, 32, 0), (3, 0, 4)):
        y = matmul(np.ones((m, k), np.float32), np.ones((k, n), np.float32))
        assert y.shape == (m, n) and not y.any()


@pytest.mark.skipif(not SUPPORTED, reason="this processor has no products in bfloat16")
def test_each_thread_has_its_own_precision(rng: Any) -> None:
    x, w = normal(rng, 15, 64), normal(rng, 64, 7)
    exact = matmul(x, w)
    seen: list[Any] = []

    def other() -> None:
        seen.append(precision())
        set_precision("fast")
        seen.append(matmul(x, w))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == "exact" == precision()
    assert not np.array_equal(seen[1], exact) and np.array_equal(matmul(x, w), exact)


# -- sessions and language models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """A model in float32, and the oracle's logits (T, V) of IDS."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return path, logits(TINY, write_gguf(path, TINY, "F32"), IDS)


@pytest.mark.parametrize("wrong", ["", "half", "FAST", "bf16"])
def test_other_names_are_refused(wrong: str, tiny: tuple[Path, Array]) -> None:
    for kind in (Session, LanguageModel):
        message = refusal(partial(kind, tiny[0], precision=wrong), UsageError)
        assert repr(wrong) in message and "fast" in message and "exact" in message


def prompts(model: LanguageModel) -> Array:
    """The logits after 2, 3 .. all IDS, each fed at once."""
    rows = []
    for count in range(2, len(IDS) + 1):
        model.rewind(0)
        rows.append(model.feed(IDS[:count]))
    model.rewind(0)
    return np.stack(rows)


@pytest.mark.skipif(not JIT, reason="takes long uncompiled")
def test_a_model_is_fast_unless_told(tiny: tuple[Path, Array]) -> None:
    path, wanted = tiny
    made = {"default": LanguageModel(path, threads=2), "exact": exact_model(path, threads=2)}
    made["fast"] = LanguageModel(path, threads=2, precision="fast")
    rows = {name: prompts(model) for name, model in made.items()}
    near(rows["exact"], wanted[1:])
    assert np.array_equal(rows["default"], rows["fast"])
    error = np.abs(rows["fast"] - wanted[1:]).max(axis=1) / np.abs(wanted[1:]).max(axis=1)
    assert error.max() <= FAST_LOGITS and np.sqrt(np.mean(error**2)) <= FAST_LOGITS / 2
    assert np.array_equal(rows["fast"], rows["exact"]) != SUPPORTED
    for i, token in enumerate(IDS):  # one row is never rounded, and each model keeps its own way
        near(made["fast"].feed([token]), wanted[i])
        near(made["exact"].feed([token]), wanted[i])
    made["fast"].rewind(0)
    made["exact"].rewind(0)
    assert np.array_equal(made["fast"].feed(IDS), rows["fast"][-1])
    assert np.array_equal(made["exact"].feed(IDS), rows["exact"][-1])
    for model in made.values():
        model.close()


@pytest.mark.skipif(not JIT, reason="takes long uncompiled")
@pytest.mark.parametrize("load", ["ram", "mmap", "stream"])
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0", "BF16"])
def test_fast_prompts_however_weights_are_held(encoding: str, load: str, tmp_path: Path) -> None:
    wanted = logits(TINY, write_gguf(tmp_path / "m.gguf", TINY, encoding), IDS)[-1]
    model = LanguageModel(tmp_path / "m.gguf", load=load, threads=2)
    near(model.feed(IDS), wanted, FAST_LOGITS)
    model.close()


def test_a_session_is_exact_unless_told(tiny: tuple[Path, Array]) -> None:
    set_precision("fast")  # the thread's own choice is none of a session's
    ids, positions = np.array([IDS]), np.arange(len(IDS))[None]
    results = {}
    ways: dict[str, Any] = {"default": {}}
    ways |= {name: {"precision": name} for name in ("exact", "fast")}
    for name, options in ways.items():
        with Session(tiny[0], **options) as session:
            past = {
                v.name: np.zeros((1, TINY.kv_heads, 0, TINY.head_dim), np.float32)
                for v in session.inputs
                if v.name.startswith("past")
            }
            feeds = {"input_ids": ids, "position_ids": positions} | past
            results[name] = session.run(feeds, ["logits"])["logits"][0]
    assert np.array_equal(results["default"], results["exact"])
    near(results["exact"], tiny[1])
    near(results["fast"], tiny[1], FAST_LOGITS)
    assert np.array_equal(results["fast"], results["exact"]) != SUPPORTED
