"""Seconds from process start to the first token on stdout, with every kernel compiled before.

    python bench/start.py [MODEL] [--runs 5]

Beside it: the bare interpreter and --help, which must not import the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from harness import engine, report, timed

PROMPT = "What is the capital of France?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    command = ["generate", given.model, "--prompt", PROMPT, "--temperature", "0"]
    command += ["--max-tokens", "8"]
    figures = json.loads(engine(*command, "--json").output)  # also compiles what is missing
    measured = {
        "interpreter": [timed([sys.executable, "-c", ""]).total_s for _ in range(given.runs)],
        "--help": [engine("--help").total_s for _ in range(given.runs)],
        "first token": [engine(*command).first_output_s for _ in range(given.runs)],
    }
    rows = [
        (name, f"{min(times):.3f}", f"{statistics.median(times):.3f}", f"{max(times):.3f}")
        for name, times in measured.items()
    ]
    help_s = min(measured["--help"]) - min(measured["interpreter"])
    document = {
        "benchmark": "start", "model": given.model, "seconds": measured,
        "help_over_interpreter_s": help_s, "generate": figures,
    }  # fmt: skip
    report(("seconds to", "best", "median", "worst"), rows, document)


if __name__ == "__main__":
    main()
