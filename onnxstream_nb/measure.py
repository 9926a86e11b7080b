"""How fast a model runs: llama-bench's tests and columns, beside the memory's own speed.

`ppN` reads N tokens at once, `tgN` feeds N tokens one by one; neither tokenising nor sampling is
timed. The yardstick of decoding is the read bandwidth, measured in the same run over a buffer as
large as what one token reads.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from . import __version__, device, registry, ui
from .errors import UsageError
from .gpu import asked
from .graph import Graph
from .progress import Report, of_download

if TYPE_CHECKING:
    from .llm import LanguageModel
    from .streaming import StreamProvider


@dataclass(frozen=True, slots=True)
class Case:
    """One test: `prompt` tokens read at once or `generate` tokens fed singly, after `depth`."""

    prompt: int
    generate: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg64, tg64 @ d128."""
        test = f"pp{self.prompt}" if self.prompt else f"tg{self.generate}"
        return f"{test} @ d{self.depth}" if self.depth else test

    @property
    def context(self) -> int:
        """Tokens in the cache when the test ends."""
        return self.depth + self.prompt + self.generate


@dataclass(frozen=True, slots=True)
class Result:
    """A test and its speed in tokens per second: each run, their mean and standard deviation."""

    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    samples_ts: tuple[float, ...]
    avg_ts: float
    stddev_ts: float

    @classmethod
    def of(cls, case: Case, samples: Sequence[float]) -> Result:
        """Mean and sample standard deviation (0.0 of one run) of `samples`."""
        return cls(
            case.name, case.prompt, case.generate, case.depth, tuple(samples),
            statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0,
        )  # fmt: skip


def bench(options: Mapping[str, Any]) -> int:
    """Measure a model, and print a table or one JSON document."""
    cases = plan(options["n_prompt"], options["n_gen"], options["n_depth"])
    with ui.progress() as report_to, model_graph(options, report_to) as (name, graph):
        report = measure(name, graph, cases, options, report_to)
    print(json.dumps(report) if options["json"] else table(report))
    return 0


def plan(prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """Every prompt and generation length, at every depth; lengths of 0 are left out."""
    lengths = [(p, 0) for p in prompts if p] + [(0, n) for n in generates if n]
    if not lengths:
        raise UsageError("--n-prompt and --n-gen are both 0: nothing to measure")
    return [Case(p, n, d) for d in depths for p, n in lengths]


@contextmanager
def model_graph(options: Mapping[str, Any], report: Report) -> Iterator[tuple[str, Graph]]:
    """The model's name and graph: from its files, or made up for --random-weights."""
    from . import hub

    name = options["model"]
    if not options["random_weights"]:
        from .formats import load

        found = hub.resolve(name, progress=of_download(report))
        yield found.name, load(found.path)
        return
    from .packed_file import remove_orphans
    from .synthetic import random_model

    entry = hub.CATALOGUE.get(name)
    if entry is None or entry.geometry is None:
        known = ", ".join(n for n, e in hub.CATALOGUE.items() if e.geometry)
        raise UsageError(f"--random-weights: {name!r} is no catalogue model; known: {known}")
    dtype = options["dtype"] or "f16"
    report(f"writing random weights of {name} in {dtype}", None)
    try:
        with random_model(name, entry.geometry, dtype, hub.cache_dir() / "tmp") as graph:
            yield f"{name} {dtype} (random weights)", graph
    finally:
        if options["keep_packed"]:
            remove_orphans(hub.packed_dir())


def measure(
    name: str, graph: Graph, cases: Sequence[Case], options: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """Run all cases and the yardstick; the JSON document of `bench`."""
    from . import hub
    from .llm import LanguageModel

    threads = options["threads"] or device.physical_cores()
    size, params = weights_size(graph)
    started = time.perf_counter()
    llm = LanguageModel(
        graph,
        load=options["load"],
        ram=options["ram"],
        threads=threads,
        precision=options["precision"],
        kv_cache=options["kv_cache"],
        kv_spill=hub.spill_dir(options["kv_spill"]),
        packed=hub.packed_dir() if options["keep_packed"] else None,
        context=max(case.context for case in cases),
        progress=report,
        **asked(options["cuda"]),
    )
    load_s = time.perf_counter() - started
    try:
        results = [run_case(llm, case, options["repetitions"], report) for case in cases]
        per_token, precision = int(llm.bytes_per_token), llm.precision
        spilled, on_device = llm.spilled_bytes, llm.gpu_bytes
    finally:
        llm.close()
    report("measuring read bandwidth", None)
    bandwidth = bandwidth_reader(per_token, threads)()
    return {
        "model": name, "size_bytes": size, "params": params,
        "backend": "CUDA" if on_device else "CPU", "gpu_bytes": on_device,
        "threads": threads, "precision": precision, "load": options["load"],
        "kv_cache": options["kv_cache"], "kv_spilled_bytes": spilled, "load_s": round(load_s, 3),
        "repetitions": options["repetitions"],
        "tests": [asdict(r) for r in results],
        "bytes_per_token": per_token, "read_bandwidth": bandwidth,
        # What lies on a GPU is not read at the speed of this memory.
        "decode_share": None if on_device else decode_share(results, per_token, bandwidth),
        "peak_rss_mb": round(device.peak_rss() / 1e6, 1),
        "cpu": device.cpu_name(), "version": __version__,
    }  # fmt: skip


def run_case(llm: LanguageModel, case: Case, repetitions: int, report: Report) -> Result:
    """Time one case after one untimed run, from the same random ids each time."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, llm.vocab_size or 1, case.context).tolist()
    before, after = ids[: case.depth], ids[case.depth :]
    llm.rewind(0)
    if before:
        report(f"{case.name}: reading {case.depth} tokens", None)
        llm.feed(before)
    samples = []
    for run in range(repetitions + 1):
        what = f"run {run} of {repetitions}" if run else "warming up"
        report(f"{case.name}: {what}", run / (repetitions + 1))
        llm.rewind(case.depth)
        seconds = _timed(llm, after, single=not case.prompt)
        if run:
            samples.append(len(after) / seconds)
    return Result.of(case, samples)


def _timed(llm: LanguageModel, ids: Sequence[int], *, single: bool) -> float:
    started = time.perf_counter()
    if single:
        for i in ids:
            llm.feed([i])
    else:
        llm.feed(ids)
    return time.perf_counter() - started


def bandwidth_reader(nbytes: int, threads: int) -> Callable[[], float]:
    """What measures the bytes a second that `threads` threads read from a buffer of `nbytes`, or of
    half of the free memory when that is less: the same buffer every time."""
    operator = registry.lookup("ReadBandwidth", "onnxstream_nb", 1)
    if operator is None:
        raise UsageError("this installation lacks its ReadBandwidth kernel: install it again")
    room = max(1 << 20, device.memory_available() // 2)
    reader: Callable[[], float] = operator.function(min(nbytes, room), threads)
    return reader


def stream_rate(provider: StreamProvider, seconds: float = 0.2) -> float:
    """Bytes per second that a stream reads when nobody computes: through its own buffers, with as
    many reads under way. Whole passes, for at least so many seconds; 0.0 when nothing is read."""
    if not provider.bytes_a_pass:
        return 0.0
    before, started = provider.bytes_read, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        provider.read_through()
    return (provider.bytes_read - before) / passed


def decode_share(results: Sequence[Result], per_token: int, bandwidth: float) -> float | None:
    """The share of `bandwidth` that the fastest generation test reached, None without one."""
    speeds = [r.avg_ts for r in results if r.n_gen]
    return max(speeds) * per_token / bandwidth if speeds and bandwidth else None


def weights_size(graph: Graph) -> tuple[int, int]:
    """Stored bytes and number of parameters of the weights, tied ones counted once."""
    from .passes import with_quantised_weights

    unique = {ref.key: ref for ref in with_quantised_weights(graph).initializers.values()}
    floats = [ref for ref in unique.values() if "float" in ref.dtype]
    return sum(ref.nbytes for ref in floats), sum(math.prod(ref.shape) for ref in floats)


def table(report: Mapping[str, Any]) -> str:
    """llama-bench's table, and a line about the memory under it."""
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    rows = [
        (
            report["model"], f"{report['size_bytes'] / 2**30:.2f} GiB",
            f"{report['params'] / 1e6:.2f} M", report["backend"], str(report["threads"]),
            test["test"], f"{test['avg_ts']:.2f} ± {test['stddev_ts']:.2f}",
        )
        for test in report["tests"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_row(header, widths), _row(["-" * w for w in widths], widths)]
    lines += [_row(row, widths) for row in rows]
    share = report["decode_share"]
    reached = "" if share is None else f"; decoding reaches {share:.0%} of it"
    lines.append(
        f"\nread bandwidth {report['read_bandwidth'] / 1e9:.1f} GB/s{reached}"
        f" ({report['bytes_per_token'] / 1e6:.0f} MB a token);"
        f" peak memory {report['peak_rss_mb']:.0f} MB; load {report['load_s']:.1f} s"
    )
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"
