"""Peak resident memory of `generate`, against the weights, the cache and what Python takes.

    python bench/memory.py [MODEL ...] [--prompt 512] [--gen 32] [--load auto]

The bound is the file's weights, the cache as far as it is filled, and BASE for the interpreter, the
compiled kernels, the tokenizer and a pass's activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from harness import engine, parser, report, thread_count
from weights import locate

BASE = 170_000_000
DTYPES = ("f16", "q8_0", "q4_0", "q4_1", "q4_k")
DEFAULT = ["smollm2-135m", *(f"tinyllama:{dtype}" for dtype in DTYPES)]


def expected(path: Path, positions: int) -> tuple[int, int]:
    """Bytes of the weights, each once, and of a cache of so many positions."""
    from onnxstream_nb import formats, passes
    from onnxstream_nb.kvcache import bytes_at
    from onnxstream_nb.measure import weights_size
    from onnxstream_nb.session import decode_constant

    graph = formats.load(path)
    size, _ = weights_size(graph)
    graph = passes.optimize(graph, decode_constant)
    return size, bytes_at(graph, passes.find_cache(graph), positions)


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One model: the peaks of several processes."""
    path = locate(name)
    command = ["generate", str(path), "--prompt", "one " * given.prompt, "--raw", "--json"]
    command += ["--max-tokens", str(given.gen), "--temperature", "0", "--load", given.load]
    command += ["--threads", str(thread_count(given))]
    runs = [json.loads(engine(*command).output) for _ in range(given.runs)]
    positions = runs[0]["prompt_tokens"] + runs[0]["completion_tokens"]
    weights, cache = expected(path, positions)
    peak = int(1e6 * statistics.median(run["peak_rss_mb"] for run in runs))
    return {
        "model": name, "load": given.load, "positions": positions, "weight_bytes": weights,
        "cache_bytes": cache, "base_bytes": BASE, "bound_bytes": weights + cache + BASE,
        "peak_bytes": peak, "over_weights_and_cache": peak - weights - cache, "runs": runs,
    }  # fmt: skip


def row(result: dict[str, Any]) -> list[str]:
    sizes = ("weight_bytes", "cache_bytes", "bound_bytes", "peak_bytes", "over_weights_and_cache")
    kept = "yes" if result["peak_bytes"] <= result["bound_bytes"] else "no"
    return [result["model"], *(f"{result[size] / 1e6:.0f}" for size in sizes), kept]


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--prompt", type=int, default=512, help="words")
    arguments.add_argument("--gen", type=int, default=32)
    arguments.add_argument("--load", default="auto", help="how weights are held")
    given = arguments.parse_args()
    results = [measured(name, given) for name in given.models]
    titles = (
        "model", "weights MB", "cache MB", "bound MB", "peak MB", "beside weights and cache",
        "within",
    )  # fmt: skip
    report(titles, [row(r) for r in results], {"benchmark": "memory", "models": results})


if __name__ == "__main__":
    main()
