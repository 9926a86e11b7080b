"""Prefill speed for prompts of given lengths, beside numpy's float32 matrix product.

    python bench/prefill.py [MODEL ...] [--prompt 128,512] [--precision fast,exact] [--runs 5]

The share is of what sgemm would take for the matrix products of the prompt alone: attention is not
counted as work, so it lowers the share. sgemm is timed before and after each case.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

from decode import DEFAULT
from harness import (
    Peer,
    parser,
    report,
    spread,
    start_engine,
    start_yardstick,
    thread_count,
    tokens_per_second,
    whole_numbers,
)
from weights import locate

SGEMM = {"m": 512, "k": 2048, "n": 5632}  # a large product of a model of 1.1 billion parameters


def cases(name: str, yardstick: Peer, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model with one precision, at every length."""
    with start_engine(locate(name), max(given.prompt), given) as engine:
        operations = engine.facts["operations_per_token"]
        for tokens in given.prompt:
            before = yardstick.ask("sgemm", **SGEMM)["speed"]
            speeds = tokens_per_second(engine, given.runs, do="prefill", tokens=tokens)
            sgemm = statistics.median((before, yardstick.ask("sgemm", **SGEMM)["speed"]))
            speed = statistics.median(speeds)
            yield {
                "model": name, "precision": given.precision, "prompt": tokens,
                "tokens_per_s": speed, "samples": speeds, "operations_per_token": operations,
                "sgemm": sgemm, "limit_tokens_per_s": sgemm / operations,
                "share_of_sgemm": speed * operations / sgemm,
            }  # fmt: skip


def row(case: dict[str, Any]) -> list[str]:
    return [
        case["model"], case["precision"] or "default", str(case["prompt"]),
        spread(case["samples"]),
        f"{case['tokens_per_s'] * case['operations_per_token'] / 1e9:.0f}",
        f"{case['sgemm'] / 1e9:.0f}", f"{case['share_of_sgemm']:.2f}",
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--prompt", type=whole_numbers, default=[128, 512])
    arguments.add_argument("--precision", help="one or more of onnxstream_nb's, with commas")
    given = arguments.parse_args()
    results = []
    with start_yardstick(given) as yardstick:
        for name in given.models:
            for precision in (given.precision or "").split(","):
                one = argparse.Namespace(**vars(given) | {"precision": precision or None})
                results += cases(name, yardstick, one)
    titles = (
        "model", "precision", "prompt", "t/s (range)", "GFLOP/s", "sgemm GFLOP/s", "of sgemm",
    )  # fmt: skip
    document = {"benchmark": "prefill", "threads": thread_count(given), "cases": results}
    report(titles, [row(case) for case in results], document)


if __name__ == "__main__":
    main()
