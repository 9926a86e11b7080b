"""What the benchmarks share: running the command line in a fresh process, and reporting.

Every benchmark prints a table for people, then one JSON document as its last line.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds from the start of a process to its first output and to its end, and its output."""

    first_output_s: float
    total_s: float
    output: str


def timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Timing:
    """Run a command from the checkout; one that fails ends the benchmark with its message."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        first_s = time.perf_counter() - started
        output = (first + process.stdout.read()).decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return Timing(first_s, time.perf_counter() - started, output)


def engine(*arguments: str, environment: Mapping[str, str] | None = None) -> Timing:
    """Run one onnxstream_nb command line."""
    return timed([sys.executable, "-m", "onnxstream_nb", *arguments], environment)


def model_path(name: str) -> str:
    """Where a model's files are; what is missing is downloaded."""
    return engine("pull", name).output.strip().split(": ", 1)[1]


def report(
    titles: Sequence[str], rows: Sequence[Sequence[str]], document: Mapping[str, Any]
) -> None:
    """Print the rows under their titles, then `document` with the machine's facts as JSON."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps(dict(document) | machine))
