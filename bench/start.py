"""Seconds from process start to the first token on stdout, and what the first run ever adds.

    python bench/start.py [MODEL] [--runs 5] [--first-runs 1]

Beside it: the bare interpreter and --help, which must not import the engine. The first run ever
has an empty folder for compiled kernels, and compiles those that the model needs. Python's bytecode
is there in all of them: pip writes it when it installs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import engine, parser, report, spread, timed
from weights import locate

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # it would compile our sources at every start
PROMPT = "What is the capital of France?"


def first_run(command: list[str]) -> dict[str, float]:
    """A run without and a run with compiled kernels, in a cache folder of their own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"ONNXSTREAM_CACHE": cache}
        first = engine(*command, environment=environment).first_output_s
        second = engine(*command, environment=environment).first_output_s
        kept = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file())
    return {"first_s": first, "second_s": second, "compile_s": first - second, "bytes": kept}


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    command = ["generate", str(locate(name)), "--prompt", PROMPT, "--temperature", "0"]
    command += ["--max-tokens", "8"]
    command += ["--threads", str(given.threads)] if given.threads else []
    figures = json.loads(engine(*command, "--json").output)  # also compiles what is missing
    seconds: dict[str, list[float]] = {"interpreter": [], "--help": [], "first token": []}
    for _ in range(given.runs):
        seconds["interpreter"].append(timed([sys.executable, "-c", ""]).total_s)
        seconds["--help"].append(engine("--help").total_s)
        seconds["first token"].append(engine(*command).first_output_s)
    firsts = [first_run(command) for _ in range(given.first_runs)]
    seconds["first token of the first run ever"] = [f["first_s"] for f in firsts]
    help_s = min(seconds["--help"]) - min(seconds["interpreter"])
    return {
        "model": name, "seconds": {k: v for k, v in seconds.items() if v}, "first_runs": firsts,
        "help_over_interpreter_s": help_s, "generate": figures,
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, ["smollm2-135m"])
    arguments.add_argument("--first-runs", type=int, default=1, help="each compiles all kernels")
    given = arguments.parse_args()
    results = [measured(name, given) for name in given.models]
    rows = [
        [result["model"], what, spread(times, 3)]
        for result in results
        for what, times in result["seconds"].items()
    ]
    titles = ("model", "from process start to", "seconds (range)")
    report(titles, rows, {"benchmark": "start", "models": results})


if __name__ == "__main__":
    main()
