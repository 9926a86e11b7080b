"""Weights streamed from disk within budgets of memory, from the least that will do to all of it.

    python bench/streaming.py [MODEL] [--points 6 | --budgets 200MB,2GB] [--context 512]
                              [--prompt 256] [--tokens 8] [--cold]

Each budget has a process of its own, whose peak is the kernel's VmHWM. Before and after every
token the disk is read through the stream's own buffers, with nothing computed: `disk` is what it
gives. A token can take no less than its bytes take to read at that rate (the mean of the two), nor
than it takes to compute with all weights in memory (another process, turn by turn); `ratio` is its
seconds by the larger of the two. `same` says that the logits after the prompt and after each token
are those of the other process, to the last bit, its prompt read in passes as long.

A model that is not on this disk and whose weights take more than 4 GB (`mistral-7b:f16`) is written
to a file of random weights that is deleted in the end. `--cold` gives each budget's process an
empty folder for compiled kernels. Direct reads pass the page cache by. bench/speculation.py has the
guesses.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from harness import Peer, PeerError, parser, report, spread, thread_count
from weights import locate

LARGE = 4_000_000_000  # bytes of weights that are not kept for the next time
PACKING = 1.2  # of stored bytes: the most that packed panels take


@contextmanager
def prepared(name: str) -> Iterator[list[str]]:
    """A model as the peer takes it: a path, or a file of random weights and its geometry."""
    from onnxstream_nb.hub import CATALOGUE, cache_dir
    from onnxstream_nb.synthetic import DTYPES, random_model

    model, _, dtype = name.rpartition(":")
    entry = CATALOGUE.get(model)
    if Path(name).exists() or entry is None or dtype not in DTYPES or entry.size_bytes < LARGE:
        yield [str(locate(name))]
        return
    assert entry.geometry is not None
    print(f"writing random weights of {name}", file=sys.stderr, flush=True)
    with random_model(model, entry.geometry, dtype, cache_dir() / "bench") as graph:
        [path] = {r.source for r in graph.initializers.values() if isinstance(r.source, Path)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
        yield [str(path), "--geometry", model, "--dtype", dtype]


class Bench:
    """One model: what its processes are started with, and where their logits go."""

    def __init__(self, model: Sequence[str], folder: Path, given: argparse.Namespace) -> None:
        self.model, self.folder, self.given = model, folder, given

    def start(self, *more: str, cold: bool = False) -> Peer:
        """A process with the model; a cold one has no compiled kernels."""
        variables = {}
        if cold:
            variables["ONNXSTREAM_CACHE"] = tempfile.mkdtemp(dir=self.folder)
        context = ["--context", str(self.given.context)]
        threads = thread_count(self.given)
        return Peer(
            "streamed.py", *self.model, *context, *more, threads=threads, variables=variables
        )

    def least(self) -> int:
        """The smallest budget, from the error that names it."""
        from onnxstream_nb.device import parse_size

        try:
            self.start("--ram", "1").close()
        except PeerError as error:
            if found := re.search(r"at least (.*?) is needed", str(error)):
                return parse_size(found[1])
            raise
        raise AssertionError("one byte was enough")

    def weights(self) -> int:
        """Bytes of weights that a token reads when none are kept."""
        with self.start() as peer:
            return int(peer.facts["weight_bytes"])

    def run(self, peer: Peer, chunk: int) -> dict[str, Any]:
        """A prompt, then tokens one by one; `logits` are those after it and after each of them."""
        files = [str(self.folder / f"{what}.npy") for what in ("prompt", "tokens")]
        given = self.given
        prompt = peer.ask("prompt", tokens=given.prompt, chunk=chunk, logits=files[0])
        tokens = peer.ask("tokens", tokens=given.tokens, logits=files[1])
        logits = [np.load(file) for file in files]
        return {"prompt": prompt, **tokens, "logits": logits}


def budgets(bench: Bench, given: argparse.Namespace) -> list[int]:
    """Those that were asked for, or from the least, in steps of as many bytes of weights, to what
    surely holds all of them."""
    if given.budgets:
        return list(given.budgets)
    least, weights, steps = bench.least(), bench.weights(), given.points - 1
    return [*(least + weights * i // steps for i in range(steps)), least + int(PACKING * weights)]


def case(bench: Bench, ram: int, reference: Peer | None) -> dict[str, Any]:
    """One budget, beside the process that holds all weights if there is one."""
    with bench.start("--ram", str(ram), cold=bench.given.cold) as peer:
        facts = peer.facts
        if reference is not None:
            wanted = bench.run(reference, facts["chunk"])
        found = bench.run(peer, facts["chunk"])
        peak = max(facts["peak_load_bytes"], peer.ask("memory")["peak_run_bytes"])
    computing, same = 0.0, None
    if reference is not None:
        computing = statistics.median(s["seconds"] for s in wanted["samples"])
        pairs = zip(found["logits"], wanted["logits"], strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
    return {
        "ram": ram, "peak_bytes": peak, "within": peak <= ram, "load_s": facts["load_s"],
        "weight_bytes": facts["weight_bytes"], "bytes_a_pass": facts["bytes_a_pass"],
        "chunk": facts["chunk"], "prompt": found["prompt"], "samples": found["samples"],
        "rates": found["rates"], "same_logits": same,
    } | against_bound(found["samples"], found["rates"], computing)  # fmt: skip


def against_bound(
    samples: Sequence[Mapping[str, float]], rates: Sequence[float], computing: float
) -> dict[str, Any]:
    """Medians of what tokens took, and of what each took by the least that it can take."""
    around = [(a + b) / 2 for a, b in pairwise(rates)]
    reading = [s["bytes"] / r if r else 0.0 for s, r in zip(samples, around, strict=True)]
    bounds = [max(seconds, computing) for seconds in reading]
    seconds = [s["seconds"] for s in samples]
    ratio = None
    if all(bounds):
        ratio = statistics.median(s / b for s, b in zip(seconds, bounds, strict=True))
    return {
        "token_s": statistics.median(seconds), "disk_bps": statistics.median(around),
        "waited_s": statistics.median(s["waited"] for s in samples),
        "reading_s": statistics.median(reading), "computing_s": computing or None, "ratio": ratio,
    }  # fmt: skip


def row(found: Mapping[str, Any]) -> list[str]:
    prompt, ratio = found["prompt"], found["ratio"]
    kept = 1 - found["bytes_a_pass"] / found["weight_bytes"]
    computing = found["computing_s"]
    return [
        f"{found['ram'] / 1e6:.0f}", f"{found['peak_bytes'] / 1e6:.0f}",
        "yes" if found["within"] else "NO", f"{kept:.0%}",
        f"{prompt['seconds']:.2f} in {prompt['passes']}", f"{found['bytes_a_pass'] / 1e6:.0f}",
        spread([s["seconds"] for s in found["samples"]], 3), f"{1 / found['token_s']:.2f}",
        f"{found['waited_s']:.3f}", f"{found['disk_bps'] / 1e9:.2f}", f"{found['reading_s']:.3f}",
        "-" if computing is None else f"{computing:.3f}", "-" if ratio is None else f"{ratio:.2f}",
        {True: "yes", False: "NO", None: "-"}[found["same_logits"]],
    ]  # fmt: skip


TITLES = (
    "MB", "peak MB", "within", "kept", "prompt s", "MB a pass", "s a token (range)", "t/s",
    "waited s", "disk GB/s", "reading s", "computing s", "ratio", "same",
)  # fmt: skip


def sizes(text: str) -> list[int]:
    """`200MB,2GB` in bytes."""
    from onnxstream_nb.device import parse_size

    return [parse_size(size) for size in text.split(",")]


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__, ["tinyllama:f16"], runs=False)
    result.add_argument("--points", type=int, default=6, help="budgets from the least to all")
    result.add_argument("--budgets", type=sizes, help="these budgets instead")
    result.add_argument("--context", type=int, default=512, help="tokens that a budget is for")
    result.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    result.add_argument("--tokens", type=int, default=8, help="tokens that are timed")
    result.add_argument("--cold", action="store_true", help="no kernels are compiled before")
    result.add_argument(
        "--reference", default="ram", choices=("ram", "mmap", "none"),
        help="how the process holds all weights that tokens are compared with",
    )  # fmt: skip
    return result


def cases(name: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One model at every budget."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streaming-")))
        bench = Bench(stack.enter_context(prepared(name)), folder, given)
        asked = budgets(bench, given)
        reference = None
        if given.reference != "none":
            reference = stack.enter_context(bench.start("--load", given.reference))
        for ram in asked:
            found = {"model": name} | case(bench, ram, reference)
            print(" ".join(row(found)), file=sys.stderr, flush=True)
            yield found


def main() -> None:
    given = arguments().parse_args()
    if given.points < 2:
        sys.exit("--points must be at least 2; --budgets takes a single one")
    if given.prompt + given.tokens >= given.context:
        sys.exit(f"--context {given.context} is too short for --prompt and --tokens")
    results = [found for name in given.models for found in cases(name, given)]
    rows = [[found["model"], *row(found)] for found in results]
    document = {
        "benchmark": "streaming", "threads": thread_count(given), "context": given.context,
        "prompt": given.prompt, "cold": given.cold, "cases": results,
    }  # fmt: skip
    report(("model", *TITLES), rows, document)


if __name__ == "__main__":
    main()
