"""What the machine itself can do: reading memory, and numpy's float32 matrix product."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from protocol import seconds

from onnxstream_nb.measure import bandwidth_reader

RUNS = 5


def sgemm(m: int, k: int, n: int) -> float:
    """Operations a second of (m, k) times (k, n), the median of several runs."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    out = np.empty((m, n), np.float32)
    times = [seconds(lambda: np.matmul(a, b, out=out)) for _ in range(RUNS + 1)]
    return 2 * m * k * n / statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    threads = parser.parse_args().threads
    print(json.dumps({"numpy": np.__version__}), flush=True)
    readers: dict[int, Callable[[], float]] = {}  # the last one: its buffer stays
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if request.pop("do") == "bandwidth":
            nbytes = request["nbytes"]
            if nbytes not in readers:
                readers.clear()  # before there is another buffer
                readers[nbytes] = bandwidth_reader(nbytes, threads)
            speed = readers[nbytes]()
        else:
            speed = sgemm(**request)
        print(json.dumps({"speed": speed}), flush=True)


if __name__ == "__main__":
    main()
