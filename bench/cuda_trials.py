"""A GPU's kernels: whether they are right, and how near they come to what it can do."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT

from onnxstream_nb.gpu.provider import CudaProvider
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.registry import lookup
from onnxstream_nb.weights import DiskProvider

ROTATED = 2 << 30  # bytes of copies of a matrix: more than any cache
TESTS = [f"tests/test_cuda_{n}.py" for n in
         ("gemv", "gemm", "attention", "rows", "elementwise", "sampling")]  # fmt: skip
TINY_TESTS = ["tests/test_cuda_rows.py", "-k", "rows_of_a_table"]
ODD = [
    *(
        ("gemv", encoding, m, 37, 416)
        for encoding in ("f16", "i8", "i4", "i8z", "i4z", "i4m") for m in (1, 2, 4, 8)
    ),
    ("gemm", "small", 33, 45, 104), ("gemm", "large", 131, 137, 72), ("gemm", "older", 33, 45, 104),
    *(("widen", e, 5, 416) for e in ("i8", "i4", "i8z", "i4z", "i4m")),
    ("attention", 1, 6, 2, 64, 37, 3), ("attention", 2, 4, 4, 128, 0, 2),
    ("attention", 35, 2, 1, 64, 21), ("norm", 3, 577), ("softmax", 3, 577),
    ("sampling", 2085, 0), ("sampling", 2085, 40),
]  # fmt: skip
TINY_ODD = [
    ("gemv", "i4m", 2, 5, 64), ("gemm", "small", 3, 5, 40), ("widen", "i4z", 2, 64),
    ("attention", 1, 2, 1, 16, 9, 2), ("attention", 5, 1, 1, 16, 4), ("norm", 2, 33),
    ("softmax", 2, 33), ("sampling", 70, 0), ("sampling", 70, 3),
]  # fmt: skip
PRODUCTS = [("gemm", "large", m, 14336, 4096) for m in (128, 512, 2048)]
TIMED = [
    *(
        ("gemv", encoding, 1, n, 4096)
        for encoding in ("f16", "i8", "i4", "i4m") for n in (1024, 4096, 14336, 32000)
    ),
    *(("gemv", "f16", m, 14336, 4096) for m in (2, 4, 8)),
    *PRODUCTS,
    *(("attention", 1, 32, 8, 128, past, 32) for past in (512, 4096, 16384)),
    *(("attention", tokens, 32, 8, 128, 0) for tokens in (512, 2048)),
    ("sampling", 32000, 0), ("sampling", 128256, 40), ("sampling", 262144, 40),
]  # fmt: skip
TINY_TIMED = [
    ("gemv", "f16", 1, 5, 64), ("gemm", "small", 3, 5, 40), ("attention", 1, 2, 1, 16, 9, 2),
]  # fmt: skip
OFFLOADED = [(2048, 2048), (4096, 14336)]


class Kernels:
    """Measures with devices that `make` gives; a dry run takes tiny sizes."""

    def __init__(self, make: Callable[[], Any], given: argparse.Namespace) -> None:
        self.make, self.given, self.dry = make, given, given.dry_run
        self.device = make()
        self.stream = self.device.stream()

    def close(self) -> None:
        self.device.close()

    def seconds(self, work: Callable[[], None], count: int) -> float:
        """Of one of `count` things that `work` gives the stream; the median of all runs."""
        graph, times = self.device.capture(self.stream, work), []
        for _ in range(self.given.runs + 1):
            started = time.perf_counter()
            self.device.replay(graph, self.stream)
            self.device.synchronize(self.stream)
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:]) / count

    def place(self, array: Any) -> int:
        """Upload an array."""
        address: int = self.device.allocate(array.nbytes)
        self.device.upload(address, array, self.stream)
        self.device.synchronize(self.stream)
        return address

    def launch(self, trial: Any, where: dict[str, int]) -> None:
        for kernel, grid, block, arguments in trial.launches(where):
            self.device.launch(kernel, grid, block, arguments, self.stream)

    def tests(self) -> dict[str, Any]:
        """What the tests of kernels say, run on the device, and which kernels they ran."""
        files, device = (TINY_TESTS, "fake") if self.dry else (TESTS, "gpu")
        with tempfile.TemporaryDirectory() as folder:
            names = Path(folder, "launched")
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "on_gpu", "--device", device,
                 "--launched", str(names), *files],
                cwd=ROOT, capture_output=True, text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
            )  # fmt: skip
            launched = json.loads(names.read_text()) if names.exists() else []
        counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)
        said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        return {
            "right": not done.returncode, "said": said[-1], "kernels": launched,
            "counts": {word: int(number) for number, word in counts},
        }  # fmt: skip

    def error(self, sizes: tuple[Any, ...]) -> dict[str, Any]:
        """A kernel's largest error, of the largest result; its output was poisoned."""
        trial = made(sizes)
        where = {name: self.place(array) for name, array in trial.arrays.items()}
        self.launch(trial, where)
        found = np.empty_like(trial.arrays[trial.output])
        self.device.download(found, where[trial.output], self.stream)
        self.device.synchronize(self.stream)
        for address in where.values():
            self.device.release(address)
        wanted = trial.wanted()
        error = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        right = bool(error <= trial.tolerance)  # of what is no number, neither
        return {"kernel": trial.name, "sizes": sizes[1:], "error": repr(error), "right": right}

    def copy_ceiling(self) -> float:
        """Bytes a second that the driver's copy reads and writes."""
        nbytes = 1 << 10 if self.dry else 1 << 30
        source, to = self.device.allocate(nbytes), self.device.allocate(nbytes)
        took = self.seconds(lambda: self.device.copy(to, source, nbytes, self.stream), 1)
        self.device.release(source)
        self.device.release(to)
        return 2 * nbytes / took

    def speed(self, sizes: tuple[Any, ...], ceiling: float) -> dict[str, Any]:
        """A kernel's bandwidth and products a second, as a graph of launches over copies of its
        matrix that no cache holds."""
        trial = made(sizes)
        turning = sum(trial.arrays[name].nbytes for name in trial.turning if name in trial.arrays)
        copies = 2 if self.dry else min(200, max(2, ROTATED // turning)) if turning else 20
        where = {name: self.place(array) for name, array in trial.arrays.items()}
        places = [where]
        for _ in range(copies - 1):
            more = {n: self.place(trial.arrays[n]) for n in trial.turning if n in trial.arrays}
            places.append({**where, **more})
        self.launch(trial, where)  # compiled and loaded before anything is captured
        self.device.synchronize(self.stream)

        def work() -> None:
            for each in places:
                self.launch(trial, each)

        took = self.seconds(work, copies)
        for address in {address for each in places for address in each.values()}:
            self.device.release(address)
        return {
            "kernel": trial.name, "sizes": sizes[1:], "us": took * 1e6,
            "share": trial.nbytes / took / ceiling, "tflops": 2 * trial.products / took / 1e12,
        }  # fmt: skip

    def round_trip(self, k: int, n: int) -> dict[str, Any]:
        """One product with a matrix on the GPU of a row that comes from the CPU."""
        data = np.zeros(2 * k * n, np.uint8).tobytes()
        ref = WeightRef("w", (k, n), "float32", data, 0, len(data), "float16", transposed=True)
        provider = CudaProvider(DiskProvider(), self.make(), [ref], print)
        matrix, x, times = provider.get(ref), np.ones((1, k), np.float32), []
        for _ in range(3 if self.dry else 200):
            started = time.perf_counter()
            np.asarray(matrix.product(x))
            times.append(time.perf_counter() - started)
        provider.close()
        return {"k": k, "n": n, "us": statistics.median(times) * 1e6}


def made(sizes: tuple[Any, ...]) -> Any:
    """A trial of a kernel."""
    trial = lookup("CudaTrial", "onnxstream_nb", 1)
    assert trial is not None
    return trial.function(*sizes)
