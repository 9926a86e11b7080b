"""What context costs: prefill time a token and decode speed, as the context grows.

python bench/attention.py [MODEL] [--prompt 512,1024,2048,4096,8000] [--depths 128,...,8000]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from harness import (
    Peer,
    parser,
    report,
    spread,
    start_engine,
    thread_count,
    tokens_per_second,
    whole_numbers,
)
from weights import locate

PROMPTS = [512, 1024, 2048, 4096, 8000]
DEPTHS = [128, 512, 1024, 2048, 4096, 8000]


def lengths(engine: Peer, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill at every length, then decode at every depth."""
    found = []
    for tokens in given.prompt:
        speeds = tokens_per_second(engine, given.runs, do="prefill", tokens=tokens)
        found.append({"test": "prefill", "length": tokens, "samples": speeds})
    for depth in given.depths:
        speeds = tokens_per_second(engine, given.runs, do="decode", tokens=given.gen, depth=depth)
        found.append({"test": "decode", "length": depth, "samples": speeds})
    for case in found:
        case["tokens_per_s"] = statistics.median(case["samples"])
        case["ms_per_token"] = 1e3 / case["tokens_per_s"]
    return found


def main() -> None:
    arguments = parser(__doc__, ["smollm2-135m"])
    arguments.add_argument("--prompt", type=whole_numbers, default=PROMPTS)
    arguments.add_argument("--depths", type=whole_numbers, default=DEPTHS)
    arguments.add_argument("--gen", type=int, default=32)
    arguments.add_argument("--precision", help="of onnxstream_nb")
    given = arguments.parse_args()
    context = max(*given.prompt, *(depth + given.gen for depth in given.depths))
    rows, results = [], []
    for name in given.models:
        with start_engine(locate(name), context, given) as engine:
            cases = lengths(engine, given)
        least = {c["test"]: c["ms_per_token"] for c in reversed(cases)}
        for case in cases:
            case["to_shortest"] = case["ms_per_token"] / least[case["test"]]
            rows.append([
                name, case["test"], str(case["length"]), f"{case['ms_per_token']:.3f}",
                f"{case['to_shortest']:.2f}", spread(case["samples"]),
            ])  # fmt: skip
        results.append({"model": name, "cases": cases})
    titles = ("model", "test", "length", "ms a token", "to the shortest", "t/s (range)")
    document = {"benchmark": "attention", "threads": thread_count(given), "models": results}
    report(titles, rows, document)


if __name__ == "__main__":
    main()
