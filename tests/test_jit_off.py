"""Every kernel also runs uncompiled, by the NumPy twins of its primitives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def uncompiled(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=HERE.parent, text=True,
        capture_output=True, timeout=240, env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_sample_of_the_kernels() -> None:
    names = (
        "quant", "products", "tiles", "panels", "parts", "attention", "spilled", "norms",
        "rope", "rounding",
    )  # fmt: skip
    wanted = [f"{name} {threads}" for threads in (1, 2) for name in names]
    assert uncompiled(str(HERE / "kernel_sample.py")).splitlines() == wanted


@pytest.mark.parametrize(
    "file",
    ["test_vector.py", "test_quads.py", "test_bf16.py", "test_buffers.py", "test_cuda_ops.py"],
)
def test_the_twins_of_the_primitives(file: str) -> None:
    out = uncompiled("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file))
    assert " passed" in out and "failed" not in out
