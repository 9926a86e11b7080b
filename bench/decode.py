"""Decode speed at given depths, against the limit that the memory's read bandwidth sets.

    python bench/decode.py [MODEL ...] [--depths 0,512] [--gen 64] [--runs 5]

A token reads all weights and the cache behind it, so bandwidth / bytes is the most tokens a second
there can be. The bandwidth is read over a buffer as large before and after every run, and each run
is held against the mean of its two: what a machine reads varies within seconds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from harness import (
    parser,
    report,
    spread,
    start_engine,
    start_yardstick,
    thread_count,
    whole_numbers,
)
from weights import locate

DEFAULT = ["smollm2-135m", *(f"tinyllama:{dtype}" for dtype in ("f16", "q8_0", "q4_0", "q4_k"))]


def cases(name: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model at every depth, with a yardstick of its own: its buffer is as large as the model,
    and gone before the next one is loaded."""
    context = max(given.depths) + given.gen
    with start_engine(locate(name), context, given) as engine, start_yardstick(given) as yardstick:
        weights = engine.facts["bytes_per_token"]
        for depth in given.depths:
            # Half of the tokens are behind the depth when the middle one is read.
            cache = engine.facts["cache_bytes_per_position"] * (depth + given.gen // 2)
            read = weights + cache
            request = {"do": "decode", "tokens": given.gen, "depth": depth}
            engine.ask(**request)
            speeds, limits = [], [yardstick.ask("bandwidth", nbytes=read)["speed"]]
            for _ in range(given.runs):
                speeds.append(given.gen / engine.ask(**request)["seconds"])
                limits.append(yardstick.ask("bandwidth", nbytes=read)["speed"])
            around = [(a + b) / 2 for a, b in pairwise(limits)]
            share = statistics.median(s * read / b for s, b in zip(speeds, around, strict=True))
            bandwidth = statistics.median(around)
            yield {
                "model": name, "depth": depth, "tokens": given.gen,
                "tokens_per_s": statistics.median(speeds),
                "samples": speeds, "weight_bytes": weights, "cache_bytes": cache,
                "bandwidths": limits, "bandwidth": bandwidth,
                "limit_tokens_per_s": bandwidth / (weights + cache),
                "share_of_weights": share * weights / read, "share_with_cache": share,
            }  # fmt: skip


def row(case: dict[str, Any]) -> list[str]:
    return [
        case["model"], str(case["depth"]), spread(case["samples"]),
        f"{case['weight_bytes'] / 1e6:.0f} + {case['cache_bytes'] / 1e6:.1f}",
        f"{case['bandwidth'] / 1e9:.1f}", f"{case['share_of_weights']:.0%}",
        f"{case['share_with_cache']:.0%}",
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--depths", type=whole_numbers, default=[0, 512])
    arguments.add_argument("--gen", type=int, default=64)
    arguments.add_argument("--precision", help="of onnxstream_nb")
    given = arguments.parse_args()
    results = [case for name in given.models for case in cases(name, given)]
    titles = (
        "model", "depth", "t/s (range)", "MB a token: weights + cache", "read GB/s",
        "of it: weights", "with cache",
    )  # fmt: skip
    document = {"benchmark": "decode", "threads": thread_count(given), "cases": results}
    report(titles, [row(case) for case in results], document)


if __name__ == "__main__":
    main()
