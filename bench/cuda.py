"""A GPU: whether its kernels are right, how near they come to what it can do, and models on it.

    python bench/cuda.py [--model smollm2.gguf] [--models tinyllama,mistral-7b] [--parts ids,models]

The ceiling is the driver's own copy from memory to memory, what it reads and writes, in the same
run; PyTorch, where it is installed, runs models of the same geometry, products and copies on the
same GPU, in a process of its own. Exit codes: 0, 1 if something was wrong, 2 where there is no GPU.
`--dry-run` runs all of it on the tests' stand-in for a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_torch
from cuda_models import SHORT, TINY_MODEL, cases, same_ids
from cuda_trials import ODD, OFFLOADED, TIMED, TINY_ODD, TINY_TIMED, Kernels
from harness import ROOT, report, whole_numbers

from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import offload
from onnxstream_nb.gpu.device import DeviceError
from onnxstream_nb.hub import CATALOGUE

# From here on `cuda` is the package of NVIDIA's bindings, and not this file beside the others.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "bench"]

PARTS = ("checks", "kernels", "trips", "ids", "models", "torch")


def fake_devices() -> Callable[[], Any]:
    """The tests' stand-in, also for what opens a GPU by itself."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fake_device import FakeDevice

    def make() -> Any:
        return FakeDevice(memory=1 << 30)

    offload._first = make
    return make


def measured(bench: Kernels, models: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All parts that were asked for, as the document that is printed. Kernels first: a model
    afterwards has the GPU's memory to itself."""
    given, dry, ceiling = bench.given, bench.dry, bench.copy_ceiling()
    parts = {part: part in given.parts for part in PARTS}
    found: dict[str, Any] = {
        "benchmark": "cuda", "gpu": bench.device.name, "dry_run": dry, "copy": ceiling,
        "dtype": given.dtype, "tests": bench.tests() if parts["checks"] else None,
        "checked": [bench.error(s) for s in (TINY_ODD if dry else ODD) if parts["checks"]],
        "kernels": [
            bench.speed(s, ceiling) for s in (TINY_TIMED if dry else TIMED) if parts["kernels"]
        ],
        "round_trips": [
            bench.round_trip(*s) for s in ([(64, 8)] if dry else OFFLOADED) if parts["trips"]
        ],
    }  # fmt: skip
    bench.close()
    found["ids"] = same_ids(given, folder) if parts["ids"] else []
    found["models"] = [
        case
        for name, geometry in models.items() if parts["models"]
        for case in cases(name, geometry, folder, ceiling, given)
    ]  # fmt: skip
    found["torch"] = list(cuda_torch.found(models, folder, given)) if parts["torch"] else []
    cuda_torch.beside(found)
    return found


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """The document's parts as a table."""
    yield ["copy", "", f"{found['copy'] / 1e9:.0f} GB/s", ""]
    if found["tests"]:
        right = "right" if found["tests"]["right"] else "WRONG"
        ran = f"{len(found['tests']['kernels'])} kernels"
        yield ["tests of kernels", ran, right, found["tests"]["said"]]
    for case in found["checked"]:
        right = "right" if case["right"] else "WRONG"
        yield [case["kernel"], str(case["sizes"]), right, f"error {float(case['error']):.1e}"]
    for case in found["kernels"]:
        more = f"{case['share']:.0%} of the copy, {case['tflops']:.1f} TFLOP/s{of_torch(case)}"
        yield [case["kernel"], str(case["sizes"]), f"{case['us']:.1f} us", more]
    for case in found["round_trips"]:
        yield ["round trip", f"{case['k']} x {case['n']}", f"{case['us']:.1f} us", ""]
    for case in found["ids"]:
        first, right = case["first_difference"], "right" if case["right"] else "WRONG"
        more = f"from token {first}" if first is not None else ""
        more += "" if case["gpu_bytes"] else " by the CPU"
        yield [f"greedy ids, {case['model']}", f"{case['tokens']} tokens", right, more]
    yield from map(model_row, found["models"])
    yield from map(torch_row, found["torch"])


def model_row(case: dict[str, Any]) -> list[str]:
    """A model on the GPU, in part or whole."""
    budget = case["budget"] if case["budget"] == "all" else f"{case['budget'] / 1e9:.1f}GB"
    what = f"{case['model']} --cuda {budget}"
    there = f"{case['gpu_bytes'] / 1e9:.1f} of {case['of'] / 1e9:.1f} GB there"
    speed = f"{case['tokens_per_s']:.1f} tokens/s"
    if case["kind"] == "prefill":
        share = case.get("of_torch_product")
        product = "" if share is None else f" ({share:.0%} of torch's product)"
        more = f"{case['tflops']:.1f} TFLOP/s{product}{of_torch(case)}"
        return [what, f"prompt {case['prompt']}", speed, more]
    bound = f"{case['share']:.0%} of {case['bound_tokens_per_s']:.0f} by bandwidth"
    return [what, f"depth {case['depth']}", speed, f"{bound}{of_torch(case)}; {there}"]


def of_torch(case: dict[str, Any]) -> str:
    """How fast it is beside PyTorch, if that was measured."""
    return f", {case['of_torch']:.2f} of torch" if "of_torch" in case else ""


def torch_row(case: dict[str, Any]) -> list[str]:
    """The same by PyTorch."""
    what = f"torch {case['model']}{' compiled' if case['compiled'] else ''}"
    if case["kind"] == "error":
        return [what, "", "not measured", case["error"]]
    if case["kind"] == "copy":
        return ["torch copy", "", f"{case['bytes_per_s'] / 1e9:.0f} GB/s", ""]
    if case["kind"] == "product":
        return ["torch product", str(tuple(case["sizes"])), "", f"{case['tflops']:.1f} TFLOP/s"]
    key = "depth" if case["kind"] == "decode" else "prompt"
    return [what, f"{key} {case[key]}", f"{case['tokens_per_s']:.1f} tokens/s", case["settings"]]


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; a dry run has sizes of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a file whose greedy ids are to be the CPU's")
    parser.add_argument("--models", default="tinyllama,mistral-7b", help="of the catalogue")
    parser.add_argument("--dtype", default="f16", help="of their random weights")
    parser.add_argument("--runs", type=int, default=5, help="timed runs; the median counts")
    parser.add_argument("--gen", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--depth", type=int, default=1024, help="tokens before those, once")
    parser.add_argument("--prompt", type=whole_numbers, default=[512, 2048], help="lengths")
    parser.add_argument("--parts", default=",".join(PARTS), help="what is measured")
    parser.add_argument("--dry-run", action="store_true", help="on the tests' stand-in for a GPU")
    given = parser.parse_args(arguments)
    given.parts, given.short = given.parts.split(","), SHORT
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"--parts {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if given.dry_run:
        given.gen, given.short, given.depth, given.prompt = 1, 2, 2, [3]
    return given


def main(arguments: list[str] | None = None) -> int:
    given = read_arguments(arguments)
    models = {n: CATALOGUE[n].geometry for n in given.models.split(",") if n}
    if given.dry_run:
        models = {"tiny": TINY_MODEL}
    try:
        bench = Kernels(fake_devices() if given.dry_run else offload._first, given)
    except (UnsupportedError, DeviceError) as error:
        print(f"nothing to measure: {error}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = measured(bench, models, Path(folder))
    report(("what", "sizes", "found", ""), list(rows(found)), found)
    checks = [*found["checked"], *found["ids"], *([found["tests"]] if found["tests"] else [])]
    absent = [c for c in found["models"] if c["budget"] and not c["gpu_bytes"]]  # the CPU went on
    return 0 if all(case["right"] for case in checks) and not absent else 1


if __name__ == "__main__":
    sys.exit(main())
