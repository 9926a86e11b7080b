"""Decode speed on a quiet machine against one with a busy process on every core.

    python bench/contention.py [MODEL ...] [--runs 5] [--busy N]

Quiet and busy runs take turns; each round gives one ratio. A fair share with as many busy processes
as threads is 0.5.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness import Peer, parser, report, spread, start_engine, thread_count
from weights import locate

SETTLE_S = 0.3  # for the busy processes to start spinning


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that compute and never wait."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(count)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def speed(engine: Peer, given: argparse.Namespace) -> float:
    request = {"tokens": given.gen, "depth": given.depth}
    return given.gen / float(engine.ask("decode", **request)["seconds"])


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One model: the speeds of both kinds of runs, and the ratio of each pair."""
    with start_engine(locate(name), given.depth + given.gen, given) as engine:
        speed(engine, given)
        quiet, loud = [], []
        for _ in range(given.runs):
            quiet.append(speed(engine, given))
            with busy(given.busy):
                loud.append(speed(engine, given))
    ratios = [b / a for a, b in zip(quiet, loud, strict=True)]
    return {
        "model": name, "busy": given.busy, "quiet_tokens_per_s": quiet,
        "busy_tokens_per_s": loud, "ratios": ratios, "ratio": statistics.median(ratios),
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, ["smollm2-135m"])
    arguments.add_argument("--gen", type=int, default=64)
    arguments.add_argument("--depth", type=int, default=128)
    arguments.add_argument("--busy", type=int, help="busy processes; default: one a processor")
    given = arguments.parse_args()
    if given.busy is None:
        given.busy = len(os.sched_getaffinity(0))
    results = [measured(name, given) for name in given.models]
    rows = [
        [
            r["model"], str(r["busy"]), spread(r["quiet_tokens_per_s"]),
            spread(r["busy_tokens_per_s"]), spread(r["ratios"], 2),
        ]
        for r in results
    ]  # fmt: skip
    titles = ("model", "busy processes", "quiet t/s", "busy t/s", "ratio")
    document = {"benchmark": "contention", "threads": thread_count(given), "models": results}
    report(titles, rows, document)


if __name__ == "__main__":
    main()
