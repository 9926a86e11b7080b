"""Conversions: their peak memory, and how fast they are beside the disk that they read and write.

    python bench/convert.py [NAME[@LAYERS] ...] [--routes ROUTE,ROUTE] [--folder DIR] [--runs 1]

A NAME is a catalogue model, whose geometry (with LAYERS layers, if so many are told) is filled with
random float16 weights, as a GGUF and as a folder of safetensors; or a path of a model. Each
conversion is a process of its own, whose peak is the kernel's, and reads its source anew: the page
cache is told to forget it. Before and after each the disk is measured: PROBE bytes written past the
page cache and flushed, then read so. `at least` is what the source's bytes take to read and the
output's to write at those rates; `ratio` is the conversion's seconds by that.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, parser, report, thread_count

PROBE = 512 << 20  # bytes
PIECE = 8 << 20  # bytes of a system call

ROUTES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "gguf->onnx fp16": ("gguf", ("--to", "onnx", "--dtype", "fp16")),
    "gguf->onnx int8": ("gguf", ("--to", "onnx", "--dtype", "int8")),
    "gguf->onnx int4": ("gguf", ("--to", "onnx", "--dtype", "int4")),
    "gguf->onnxstream fp16": ("gguf", ("--to", "onnxstream", "--dtype", "fp16")),
    "safetensors->onnx fp16": ("safetensors", ("--to", "onnx", "--dtype", "fp16")),
    "onnx->onnxstream fp16": ("onnx", ("--to", "onnxstream", "--dtype", "fp16")),
}
"""Route -> the kind of its source, the flags of `convert`."""

CHILD = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
taken = {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024,
         "cpu_s": usage.ru_utime + usage.ru_stime, "code": os.waitstatus_to_exitcode(status)}
print(json.dumps(taken))
"""
"""Runs a command from a process so small that its own memory does not count as the command's."""


def disk_rates(folder: Path) -> dict[str, float]:
    """Bytes a second that the folder's disk writes and reads, past the page cache if it can."""
    memory = mmap.mmap(-1, PIECE)
    memory.write(os.urandom(PIECE))
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    path = folder / f"probe-{os.getpid()}"
    try:
        try:
            file, direct = os.open(path, flags | getattr(os, "O_DIRECT", 0)), True
        except OSError:  # a file system without direct reads, such as tmpfs
            file, direct = os.open(path, flags), False
        try:
            began = time.perf_counter()
            for at in range(0, PROBE, PIECE):
                os.pwritev(file, [memory], at)
            os.fsync(file)
            written = time.perf_counter()
            if not direct:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, PROBE, PIECE):
                os.preadv(file, [memory], at)
            end = time.perf_counter()
        finally:
            os.close(file)
    finally:
        path.unlink(missing_ok=True)
    return {"write_bps": PROBE / (written - began), "read_bps": PROBE / (end - written)}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    """The file, or all of a folder."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def forget(path: Path) -> None:
    """Tell the page cache to drop a model's files, so that they are read from the disk."""
    for name in files_of(path):
        with name.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Sources:
    """A model in the forms that routes begin with, each made when it is first wanted."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._made: dict[str, Path] = {}

    def routes(self, asked: Sequence[str]) -> list[str]:
        """Those of the routes that can begin with this model."""
        if not Path(self.name).exists():
            return list(asked)
        from onnxstream_nb.formats import identify

        kind, _ = identify(Path(self.name))
        return [route for route in asked if ROUTES[route][0] == kind]

    def get(self, kind: str) -> Path:
        """The model as `kind`: gguf, safetensors or onnx."""
        if Path(self.name).exists():
            return Path(self.name)
        if kind not in self._made:
            print(f"making {self.name} as {kind}", file=sys.stderr, flush=True)
            self._made[kind] = getattr(self, f"_{kind}")()
        return self._made[kind]

    def _gguf(self) -> Path:
        from weights import locate

        return locate(f"{self.name}:f16")

    def _safetensors(self) -> Path:
        from hf_folder import write_folder
        from weights import geometry_of

        path = self.folder / "safetensors"
        write_folder(path, geometry_of(self.name))
        return path

    def _onnx(self) -> Path:
        path = self.folder / "onnx"
        converted(self.get("gguf"), path, ROUTES["gguf->onnx fp16"][1], self.folder)
        return path


def converted(source: Path, out: Path, flags: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """One conversion: its seconds, its peak, the bytes, and the disk's rates around it."""
    forget(source)
    before = disk_rates(folder)
    command = [sys.executable, "-m", "onnxstream_nb", "convert", str(source), "-o", str(out)]
    launcher = [sys.executable, "-c", CHILD, *command, *flags]
    done = subprocess.run(launcher, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    taken: dict[str, Any] = json.loads(done.stdout)
    if taken["code"]:
        sys.exit(f"{' '.join(command + list(flags))}: exit code {taken['code']}")
    after = disk_rates(folder)
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    sizes = [file.stat().st_size for file in files_of(out)]
    read, written = size_of(source), sum(sizes)
    least = read / rates["read_bps"] + written / rates["write_bps"]
    return taken | rates | {
        "read_bytes": read, "written_bytes": written, "files": len(sizes),
        "largest_file_bytes": max(sizes), "bps": (read + written) / taken["seconds"],
        "disk_s": least, "ratio": taken["seconds"] / least,
    }  # fmt: skip


def case(
    name: str, route: str, sources: Sources, folder: Path, given: argparse.Namespace
) -> dict[str, Any]:
    """One route of a model: the run of median seconds, and the largest peak."""
    kind, flags = ROUTES[route]
    source, runs = sources.get(kind), []
    for _ in range(given.runs):
        out = folder / "out"
        runs.append(converted(source, out, flags, folder))
        shutil.rmtree(out)
    runs.sort(key=lambda run: run["seconds"])
    middle = runs[len(runs) // 2]
    return {
        "model": name, "route": route, **middle,
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "all_seconds": [run["seconds"] for run in runs],
    }  # fmt: skip


@contextmanager
def working_folder(given: argparse.Namespace) -> Iterator[Path]:
    """A folder for sources and outputs on the disk that is measured, deleted in the end."""
    from onnxstream_nb.hub import cache_dir

    parent = given.folder or cache_dir() / "bench"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=parent) as folder:
        yield Path(folder)


TITLES = (
    "peak MB", "seconds", "MB in", "MB out", "files", "largest MB", "MB/s", "disk MB/s read",
    "write", "at least s", "ratio",
)  # fmt: skip


def row(found: Mapping[str, Any]) -> list[str]:
    """What the table shows of a route."""
    return [
        f"{found['peak_bytes'] / 1e6:.0f}", f"{found['seconds']:.2f}",
        f"{found['read_bytes'] / 1e6:.0f}", f"{found['written_bytes'] / 1e6:.0f}",
        str(found["files"]), f"{found['largest_file_bytes'] / 1e6:.0f}",
        f"{found['bps'] / 1e6:.0f}", f"{found['read_bps'] / 1e6:.0f}",
        f"{found['write_bps'] / 1e6:.0f}", f"{found['disk_s']:.2f}", f"{found['ratio']:.2f}",
    ]  # fmt: skip


def routes(text: str) -> list[str]:
    """`gguf->onnx fp16,onnx->onnxstream fp16` as routes; part of a name means all that have it."""
    found = [r for part in text.split(",") for r in ROUTES if part.strip() in r]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(ROUTES)}")
    return list(dict.fromkeys(found))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__, ["tinyllama", "mistral-7b@2"])
    result.set_defaults(runs=1)
    result.add_argument("--routes", type=routes, default=list(ROUTES), help="these alone")
    result.add_argument("--folder", type=Path, help="on the disk to measure; default: the cache")
    return result


def main() -> None:
    given = arguments().parse_args()
    results = []
    for name in given.models:
        with working_folder(given) as folder:
            sources = Sources(name, folder)
            for route in sources.routes(given.routes):
                found = case(name, route, sources, folder, given)
                print(name, route, *row(found), file=sys.stderr, flush=True)
                results.append(found)
    rows = [[found["model"], found["route"], *row(found)] for found in results]
    document = {
        "benchmark": "convert", "threads": thread_count(given),
        "disk_read_bps": statistics.median(found["read_bps"] for found in results),
        "disk_write_bps": statistics.median(found["write_bps"] for found in results),
        "cases": results,
    }  # fmt: skip
    report(("model", "route", *TITLES), rows, document)


if __name__ == "__main__":
    main()
