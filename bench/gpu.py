"""A GPU's kernels: whether they are right, and how near they come to what it can do.

    python bench/gpu.py [--models tinyllama,mistral-7b] [--dtype q8_0] [--runs 5] [--gen 64]

The ceiling is the driver's own copy from memory to memory, what it reads and writes, in the same
run, and torch's where it is installed. A kernel is timed as a captured graph of launches over
copies of its matrix that no cache holds. Without a GPU it says so, and exits with 2. `--dry-run`
runs all of it on the tests' stand-in for a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, report

from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import offload
from onnxstream_nb.gpu.provider import CudaProvider
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.hub import CATALOGUE
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.registry import lookup
from onnxstream_nb.synthetic import random_model
from onnxstream_nb.weights import DiskProvider

ROTATED = 2 << 30  # bytes of copies of a matrix: more than any cache
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
TIMED = [
    *(
        ("gemv", encoding, 1, n, 4096)
        for encoding in ("f16", "i8", "i4", "i4m") for n in (1024, 4096, 14336, 32000)
    ),
    *(("gemv", "f16", m, 14336, 4096) for m in (2, 4, 8)),
    *(("gemm", "large", m, 14336, 4096) for m in (128, 512, 2048)),
    *(("attention", 1, 32, 8, 128, past, 32) for past in (512, 4096, 16384)),
    *(("attention", tokens, 32, 8, 128, 0) for tokens in (512, 2048)),
    ("sampling", 32000, 0), ("sampling", 128256, 40), ("sampling", 262144, 40),
]  # fmt: skip
TINY_TIMED = [("gemv", "f16", 1, 5, 64), ("attention", 1, 2, 1, 16, 9, 2)]
OFFLOADED = [(2048, 2048), (4096, 14336)]
TINY_MODEL = {
    "vocab": 67, "hidden": 64, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96,
    "rope_theta": 1e4, "context": 64, "norm_epsilon": 1e-5, "tied_embeddings": False,
}  # fmt: skip


class Bench:
    """Measures with devices that `make` gives; `dry` takes tiny sizes."""

    def __init__(self, make: Callable[[], Any], given: argparse.Namespace) -> None:
        self.make, self.given, self.dry = make, given, given.dry_run
        self.device = make()
        self.stream = self.device.stream()

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

    def error(self, sizes: tuple[Any, ...]) -> dict[str, Any]:
        """A kernel's largest error, in units of what it is allowed."""
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
        """A kernel's bandwidth and products a second."""
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
        product, matrix, x = (
            lookup("MatMul", "", 13, "offload"),
            provider.get(ref),
            np.ones((1, k), "f"),
        )
        assert product is not None
        times = []
        for _ in range(3 if self.dry else 200):
            started = time.perf_counter()
            np.asarray(product.function(x, matrix))
            times.append(time.perf_counter() - started)
        provider.close()
        return {"k": k, "n": n, "us": statistics.median(times) * 1e6}

    def decode(self, name: str, geometry: Any, folder: Path) -> Iterator[dict[str, Any]]:
        """Tokens a second with nothing, some and all of the matrices on the GPU."""
        with random_model(name, geometry, self.given.dtype, folder) as graph:
            whole = sum(ref.nbytes for ref in graph.initializers.values())
            budgets = [0, "all"] if self.dry else [0, whole // 4, whole // 2, 3 * whole // 4, "all"]
            for budget in budgets:
                llm = LanguageModel(graph, device="cuda", cuda=budget, context=512 - 448 * self.dry)
                llm.feed([1, 2, 3])
                tokens = 2 if self.dry else self.given.gen
                started = time.perf_counter()
                for token in range(tokens):
                    np.asarray(llm.feed([token]))
                took = time.perf_counter() - started
                llm.close()
                yield {"model": name, "budget": budget, "of": whole, "tokens_per_s": tokens / took}


def made(sizes: tuple[Any, ...]) -> Any:
    """A trial of a kernel."""
    trial = lookup("CudaTrial", "onnxstream_nb", 1)
    assert trial is not None
    return trial.function(*sizes)


def torch_speeds() -> dict[str, float]:
    """torch's copy in bytes a second, and its product of halves in TFLOP/s; nothing without it."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}

    def seconds(work: Callable[[], Any]) -> float:
        work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / 20

    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(block)
    x, w = (torch.ones(n, 4096, dtype=torch.float16, device="cuda") for n in (2048, 14336))
    products = 2 * 2048 * 14336 * 4096
    return {
        "copy": 2 * block.numel() / seconds(lambda: to.copy_(block)),
        "tflops": products / seconds(lambda: x @ w.T) / 1e12,
    }


def fake_devices() -> Callable[[], Any]:
    """The tests' stand-in, also for what opens a GPU by itself."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fake_device import FakeDevice

    def make() -> Any:
        return FakeDevice(memory=1 << 30)

    offload._first = make
    return make


def measured(bench: Bench, models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Everything, as the document that is printed."""
    dry, ceiling = bench.dry, bench.copy_ceiling()
    return {
        "benchmark": "gpu", "gpu": bench.device.name, "dry_run": dry, "copy": ceiling,
        "torch": torch_speeds(),
        "checked": [bench.error(sizes) for sizes in (TINY_ODD if dry else ODD)],
        "kernels": [bench.speed(sizes, ceiling) for sizes in (TINY_TIMED if dry else TIMED)],
        "round_trips": [bench.round_trip(*s) for s in ([(64, 8)] if dry else OFFLOADED)],
        "decode": [c for name, g in models.items() for c in bench.decode(name, g, folder)],
    }  # fmt: skip


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The document's parts as a table."""
    yield ["copy", "", f"{found['copy'] / 1e9:.0f} GB/s", ""]
    for name, value in found["torch"].items():
        yield [f"torch {name}", "", f"{value:.3g}", ""]
    for case in found["checked"]:
        right = "right" if case["right"] else "WRONG"
        yield [case["kernel"], str(case["sizes"]), right, f"error {float(case['error']):.1e}"]
    for case in found["kernels"]:
        more = f"{case['share']:.0%} of the copy, {case['tflops']:.1f} TFLOP/s"
        yield [case["kernel"], str(case["sizes"]), f"{case['us']:.1f} us", more]
    for case in found["round_trips"]:
        yield ["round trip", f"{case['k']} x {case['n']}", f"{case['us']:.1f} us", ""]
    for case in found["decode"]:
        placed = case["budget"] if case["budget"] == "all" else f"{case['budget'] / 1e9:.1f} GB"
        yield [case["model"], f"--cuda {placed}", f"{case['tokens_per_s']:.1f} tokens/s", ""]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="tinyllama,mistral-7b", help="of the catalogue")
    parser.add_argument("--dtype", default="f16", help="of their random weights")
    parser.add_argument("--runs", type=int, default=5, help="timed runs; the median counts")
    parser.add_argument("--gen", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--dry-run", action="store_true", help="on the tests' stand-in for a GPU")
    given = parser.parse_args(arguments)
    names = given.models.split(",") if given.models else []
    try:
        make = fake_devices() if given.dry_run else offload._first
        bench = Bench(make, given)
    except UnsupportedError as error:
        print(f"nothing to measure: {error}")
        return 2
    models = {name: CATALOGUE[name].geometry for name in names}
    if given.dry_run:
        models = {"tiny": TINY_MODEL}
    with tempfile.TemporaryDirectory() as folder:
        found = measured(bench, models, Path(folder))
    report(("what", "sizes", "found", ""), list(rows(found)), found)
    return 0 if all(case["right"] for case in found["checked"]) else 1


if __name__ == "__main__":
    sys.exit(main())
