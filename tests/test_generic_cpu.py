"""The same kernels compiled for other processors: AVX2 without AVX-512, and plain x86-64.

numba compiles for the host unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import pytest

HERE = Path(__file__).parent
V3 = [
    "sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cx16", "sahf", "avx", "avx2", "bmi", "bmi2",
    "f16c", "fma", "lzcnt", "movbe", "xsave",
]  # fmt: skip
TARGETS = {
    "x86-64-v3": [f"+{f}" for f in V3],
    # No such processor: halves are decoded by integer arithmetic beside AVX2.
    "haswell": [f"+{f}" for f in V3 if f != "f16c"] + ["-f16c"],
    "x86-64": ["+sse2"],
}

UNPACKED = """
import sys
sys.path[:0] = ["tests"]
import numpy as np
from kernel_oracles import assert_product
from packing_models import one_product
from onnxstream_nb.kernels.quads import SUPPORTED
from onnxstream_nb.registry import kernels
from onnxstream_nb.session import Session
for name, kernel in kernels().items():
    if name.startswith(("gemm_fast_", "attention_fast")):
        assert kernel is kernels()[name.replace("_fast", "_exact")], name
        assert "bf16" not in kernel.name and "split" not in kernel.name
graph, dense = one_product("q4_0", 96, 21)
for precision in ("exact", "fast"):
    with Session(graph, load="ram", precision=precision) as session:
        print(SUPPORTED, type(session.provider).__name__)
        print(session.provider.get(graph.initializers["w"]).order)
        for m in (1, 3):
            x = np.random.default_rng(1).standard_normal((m, 96), np.float32)
            assert_product(session.run({"x": x})["y"], x, dense)
        print("near")
"""

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the targets are x86-64's"
)


Caches = Callable[[str], Path]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """For each processor a folder of compiled kernels, which its tests share."""
    return cache(tmp_path_factory.mktemp)


def compiled_for(name: str, caches: Caches, *command: str) -> str:
    features, host = TARGETS[name], llvm.get_host_cpu_features()
    if missing := [f for f in features if f[0] == "+" and not host.get(f[1:])]:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=HERE.parent, text=True,
        capture_output=True, timeout=480,
        env={**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ",".join(features),
             "ONNXSTREAM_CACHE": str(caches(name))},
    )  # fmt: skip
    assert done.returncode == 0, f"rc {done.returncode}\n" + (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64"])
def test_products_and_attention(name: str, caches: Caches) -> None:
    out = compiled_for(name, caches, str(HERE / "kernel_sample.py"), "few")
    names = ("products", "panels", "parts", "attention")
    assert out.splitlines() == [f"{name} {threads}" for threads in (1, 2) for name in names]


@pytest.mark.parametrize("name", ["haswell", "x86-64"])
def test_primitives(name: str, caches: Caches) -> None:
    pytest_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_vector.py"))
    out = compiled_for(name, caches, *pytest_run)
    assert " passed" in out and "failed" not in out


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64"])
def test_quads_without_the_instruction(name: str, caches: Caches) -> None:
    pytest_run = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_quads.py"))
    out = compiled_for(name, caches, *pytest_run)
    assert " passed" in out and "failed" not in out


def test_nothing_is_packed_or_rounded_without_the_instructions(caches: Caches) -> None:
    out = compiled_for("x86-64-v3", caches, "-c", UNPACKED)
    assert out.split() == 2 * ["False", "RamProvider", "rows", "near"]
