"""Single operators against their limits: memory for one token, numpy's sgemm for a prompt.

    python bench/kernels.py [--encodings float16,q8_0,...] [--runs 15] [--megabytes 256]

gemv reads a matrix larger than any cache, once a run, and memory is read as long before and after.
gemm is a product with 512 rows; sgemm has the same shapes. The others are one layer's of a model of
1.1 billion parameters, all 22 layers in one table as decoding runs them, microseconds a layer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import Peer, parser, report, start_yardstick, thread_count, whole_numbers

from onnxstream_nb.graph import ENCODINGS, Graph, Node, Value, WeightRef
from onnxstream_nb.kvcache import KVSlot
from onnxstream_nb.registry import Operator, lookup
from onnxstream_nb.session import Session

K, ROWS, LAYERS = 2048, 512, 22
HEADS, KV_HEADS, SIZE = 32, 4, 64
# A float16 scale of 2**-14 in each two bytes: no block of any encoding gets large or not a number.
FILLING = np.uint16(0x0400)


def operator(name: str, domain: str = "", version: int = 23) -> Operator:
    """An operator that there must be."""
    found = lookup(name, domain, version)
    if found is None:
        raise SystemExit(f"no operator {name}")
    return found


def median_s(work: Callable[[], Any], runs: int) -> float:
    """The median time of `work`, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def product_s(encoding: str, rows: int, columns: int, given: argparse.Namespace) -> float:
    """Seconds of (rows, K) times a weight (K, columns), as a session runs it: packed or not."""
    kind = ENCODINGS[encoding]
    data = np.full(K * columns // kind.block * kind.nbytes // 2, FILLING)
    more = {"precision": given.precision} if given.precision else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight"
        data.tofile(path)
        weight = WeightRef("w", (K, columns), "float32", path, 0, data.nbytes, encoding, True)
        node = Node("MatMul", ("x", "w"), ("y",))
        x, y = Value("x", "float32", (rows, K)), Value("y", "float32", (rows, columns))
        graph = Graph((node,), (x,), (y,), {"w": weight}, {"": 23})
        feeds = {"x": np.random.default_rng(0).random((rows, K), np.float32)}
        with Session(graph, threads=thread_count(given), **more) as session:
            return median_s(lambda: session.run(feeds), given.runs)


def gemv(encoding: str, yardstick: Peer, given: argparse.Namespace) -> dict[str, Any]:
    """One row times a matrix of --megabytes, against reading as many bytes."""
    kind = ENCODINGS[encoding]
    row_bytes = K // kind.block * kind.nbytes
    columns = given.megabytes * 10**6 // row_bytes // 64 * 64
    nbytes = columns * row_bytes
    before = yardstick.ask("bandwidth", nbytes=nbytes)["speed"]
    speed = nbytes / product_s(encoding, 1, columns, given)
    limit = statistics.median((before, yardstick.ask("bandwidth", nbytes=nbytes)["speed"]))
    return entry(f"gemv {encoding}", speed / 1e9, "GB/s", limit / 1e9)


def gemm(encoding: str, columns: int, yardstick: Peer, given: argparse.Namespace) -> dict[str, Any]:
    """512 rows times a matrix, against sgemm of these shapes."""
    shape = {"m": ROWS, "k": K, "n": columns}
    before = yardstick.ask("sgemm", **shape)["speed"]
    speed = 2 * ROWS * K * columns / product_s(encoding, ROWS, columns, given)
    limit = statistics.median((before, yardstick.ask("sgemm", **shape)["speed"]))
    return entry(f"gemm {encoding} ({ROWS}, {K}, {columns})", speed / 1e9, "GFLOP/s", limit / 1e9)


def entry(what: str, speed: float, unit: str, limit: float | None = None) -> dict[str, Any]:
    share = None if limit is None else speed / limit
    return {"kernel": what, "speed": speed, "unit": unit, "limit": limit, "share": share}


def lowered(name: str, *inputs: Any, **attributes: Any) -> Any:
    """An operator as rows of a token's table."""
    lower = operator(name).lower
    rows = lower(*inputs, **attributes) if lower else None
    if rows is None:
        raise SystemExit(f"{name} was not lowered")
    return rows


def layer_s(layers: list[Any], runs: int) -> float:
    """Seconds a layer when a table runs all of them, as for a token."""
    table = operator("Table", "onnxstream_nb", 1).function(layers)
    return median_s(lambda: table.run(0), runs) / len(layers)


def row(width: int) -> np.ndarray[Any, Any]:
    """One token's activations (1, 1, width)."""
    return np.random.default_rng(0).standard_normal((1, 1, width)).astype(np.float32)


def attention(depth: int) -> Any:
    """One layer's attention over a cache of its own with `depth` positions."""
    slots = [KVSlot(kind, KV_HEADS, SIZE, positions=depth + 1) for kind in ("key", "value")]
    for slot in slots:
        slot.array[:] = row(slot.array.size).reshape(slot.array.shape)
        slot.length = depth
    return lowered(
        "Attention", row(HEADS * SIZE), row(KV_HEADS * SIZE), row(KV_HEADS * SIZE), None, *slots,
        is_causal=1, q_num_heads=HEADS, kv_num_heads=KV_HEADS, n_outputs=3,
    )  # fmt: skip


def one_token(yardstick: Peer, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Attention at several depths, norm and rotary embedding."""
    for depth in given.depths:
        took = layer_s([attention(depth) for _ in range(LAYERS)], given.runs)
        nbytes = 2 * 2 * KV_HEADS * SIZE * depth
        limit = yardstick.ask("bandwidth", nbytes=nbytes * LAYERS)["speed"]
        found = entry(f"attention, depth {depth}", nbytes / took / 1e9, "GB/s", limit / 1e9)
        yield found | {"microseconds": 1e6 * took}
    norm = lowered("RMSNormalization", row(K), np.ones(K, np.float32))
    yield entry(f"norm ({K})", 1e6 * layer_s([norm] * LAYERS, given.runs), "us")
    rope = lowered("RotaryEmbedding", row(HEADS * SIZE), row(SIZE // 2), row(SIZE // 2),
                   num_heads=HEADS)  # fmt: skip
    yield entry(f"rope ({HEADS} heads of {SIZE})", 1e6 * layer_s([rope] * LAYERS, given.runs), "us")


def table_row(case: dict[str, Any]) -> list[str]:
    speed = f"{case['speed']:.2f} {case['unit']}"
    if "microseconds" in case:
        speed += f", {case['microseconds']:.1f} us"
    limit = "" if case["limit"] is None else f"{case['limit']:.1f}"
    return [case["kernel"], speed, limit, "" if case["share"] is None else f"{case['share']:.2f}"]


def main() -> None:
    arguments = parser(__doc__, [])
    known = ["float16", "q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k"]
    arguments.add_argument("--encodings", type=lambda text: text.split(","), default=known)
    arguments.add_argument("--precision", help="of products with many rows")
    arguments.add_argument("--megabytes", type=int, default=256, help="of the matrix of gemv")
    arguments.add_argument("--columns", type=whole_numbers, default=[2048, 5632], help="of gemm")
    arguments.add_argument("--depths", type=whole_numbers, default=[128, 2048])
    given = arguments.parse_args()
    operator("Threads", "onnxstream_nb", 1).function(thread_count(given))
    with start_yardstick(given) as yardstick:
        cases = [gemv(e, yardstick, given) for e in given.encodings]
        cases += [gemm(e, n, yardstick, given) for e in given.encodings for n in given.columns]
        cases += one_token(yardstick, given)
    document = {"benchmark": "kernels", "threads": thread_count(given), "cases": cases}
    report(("kernel", "speed", "limit", "share"), [table_row(case) for case in cases], document)


if __name__ == "__main__":
    main()
