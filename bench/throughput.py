"""Tokens per second in prefill and decode, and the share of the read bandwidth that decode reaches.

    python bench/throughput.py [MODEL[:DTYPE] ...] [--prompt 128,512] [--gen 64] [--depth 0]

MODEL:DTYPE is a catalogue model's geometry with random weights of f16, q8_0 or q4_0; MODEL alone is
the model itself. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from harness import engine, report

DEFAULT = ["smollm2-135m", "tinyllama:f16", "tinyllama:q8_0", "tinyllama:q4_0"]
DTYPES = ("f16", "q8_0", "q4_0")


def measure(name: str, arguments: list[str]) -> dict[str, Any]:
    model, _, dtype = name.rpartition(":")
    made_up = ["--random-weights", "--dtype", dtype] if model and dtype in DTYPES else []
    run = engine("bench", model if made_up else name, *made_up, *arguments, "--json")
    document: dict[str, Any] = json.loads(run.output)
    return document


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    bandwidth = result["read_bandwidth"]
    rows = []
    for test in result["tests"]:
        share = test["avg_ts"] * result["bytes_per_token"] / bandwidth
        rows.append((
            result["model"], str(result["threads"]), test["test"],
            f"{test['avg_ts']:.2f} ± {test['stddev_ts']:.2f}",
            f"{share:.0%}" if test["n_gen"] else "", f"{bandwidth / 1e9:.1f}",
            f"{result['peak_rss_mb']:.0f}",
        ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=DEFAULT)
    parser.add_argument("--prompt", default="128,512")
    parser.add_argument("--gen", default="64")
    parser.add_argument("--depth", default="0")
    parser.add_argument("--repetitions", default="5")
    parser.add_argument("--threads", default=None)
    given = parser.parse_args()
    arguments = ["-p", given.prompt, "-n", given.gen, "-d", given.depth, "-r", given.repetitions]
    arguments += ["--threads", given.threads] if given.threads else []
    results = [measure(name, arguments) for name in given.models]
    titles = ("model", "threads", "test", "t/s", "of bandwidth", "GB/s", "peak MB")
    rows = [row for result in results for row in rows_of(result)]
    report(titles, rows, {"benchmark": "throughput", "results": results})


if __name__ == "__main__":
    main()
