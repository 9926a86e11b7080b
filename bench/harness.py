"""What the benchmarks share: fresh processes, engines that answer requests, tables and JSON.

Every benchmark prints a table for people, then one JSON document as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


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


class PeerError(Exception):
    """An engine could not be started, or could not do what it was asked."""


class Peer:
    """An engine in a process of its own (a file of peers/) that answers one request at a time.

    Between requests it is stopped, so that no spinning thread of one disturbs another. `facts` is
    what it said of itself when its model was loaded. Raises PeerError when it fails.
    """

    def __init__(
        self, file: str, *arguments: str, threads: int, variables: Mapping[str, str] | None = None
    ) -> None:
        command = [sys.executable, str(PEERS / file), *arguments, "--threads", str(threads)]
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
        environment |= variables or {}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - close() does
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stderr=self._errors,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._signal("SIGCONT")
        try:
            print(json.dumps({"do": do} | values), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        self._signal("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'no message'}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # what was left in the buffer has no reader any more
                continue

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def start_engine(path: str | Path, context: int, given: argparse.Namespace) -> Peer:
    """onnxstream_nb with a model and room for `context` tokens."""
    precision = getattr(given, "precision", None)
    more = ["--precision", precision] if precision else []
    return Peer("ours.py", str(path), "--context", str(context), *more, threads=thread_count(given))


def start_yardstick(given: argparse.Namespace) -> Peer:
    """The machine's own speeds: `bandwidth` of reading memory, `sgemm` of numpy."""
    return Peer("yardstick.py", threads=thread_count(given))


def tokens_per_second(peer: Peer, runs: int, **request: Any) -> list[float]:
    """Speeds of `runs` timed prefills or decodes, after one that is not counted."""
    speeds = [request["tokens"] / peer.ask(**request)["seconds"] for _ in range(runs + 1)]
    return speeds[1:]


def parser(
    description: str | None, models: Sequence[str], *, runs: bool = True
) -> argparse.ArgumentParser:
    """The arguments that all have: models (a path, a catalogue name, or NAME:DTYPE for its
    geometry with random weights), runs where there are `runs`, threads."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "a path, a catalogue name, or NAME:DTYPE for its geometry with random weights"
    result.add_argument("models", nargs="*", default=list(models), metavar="MODEL", help=what)
    if runs:
        result.add_argument("--runs", type=int, default=5, help="timed runs; the median counts")
    result.add_argument("--threads", type=int, help="default: the physical cores")
    return result


def whole_numbers(text: str) -> list[int]:
    """`128,512` as numbers."""
    return [int(number) for number in text.split(",")]


def thread_count(given: argparse.Namespace) -> int:
    """--threads, or the physical cores."""
    from onnxstream_nb.device import physical_cores

    return int(given.threads or physical_cores())


def spread(samples: Sequence[float], digits: int = 1) -> str:
    """The median and the range, as tables show it."""
    low, high = min(samples), max(samples)
    return f"{statistics.median(samples):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def report(
    titles: Sequence[str], rows: Sequence[Sequence[str]], document: Mapping[str, Any]
) -> None:
    """Print the rows under their titles, then `document` with the machine's facts as JSON."""
    from onnxstream_nb import __version__, device

    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    machine = {
        "python": platform.python_version(), "machine": platform.machine(),
        "cpu": device.cpu_name(), "cores": device.physical_cores(), "version": __version__,
    }  # fmt: skip
    print(json.dumps(dict(document) | machine))
