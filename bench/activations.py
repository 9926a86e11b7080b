"""Memory of a prompt's pass beside weights and cache, against its liveness bound.

    python bench/activations.py [MODEL ...] [--prompt 512] [--depth 0] [--precision fast]

`bound` is the most bytes of values alive at one step, as `inspect` prints it, `live` the most that
arrays in the arena took, working memory of operators included, `touched` its high-water mark, and
`elsewhere` the most that NumPy and Python took besides.
"""

from __future__ import annotations

import argparse
import tracemalloc
from typing import Any

from harness import parser, report, thread_count
from weights import locate

DEFAULT = ["smollm2-135m", "tinyllama:f16"]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """One model: the third of three passes over as many tokens as one takes."""
    from onnxstream_nb.liveness import token_bound
    from onnxstream_nb.llm import LanguageModel
    from onnxstream_nb.session import internal

    arena = internal("Arena")()
    model = LanguageModel(
        locate(name), threads=thread_count(given), context=given.depth + given.prompt,
        precision=given.precision or "auto",
    )  # fmt: skip
    tokens = min(given.prompt, model.chunk)
    ids = [(7 * i) % (model.vocab_size or 1) for i in range(given.depth + tokens)]
    if given.depth:
        model.feed(ids[: given.depth])
    for _ in range(2):
        model.feed(ids[given.depth :])
        model.rewind(given.depth)
    arena.trim()
    before = arena.usage().live
    arena.reset_peaks()
    tracemalloc.start()
    model.feed(ids[given.depth :])
    elsewhere = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used, plan = arena.usage(), model.session.plan
    bound = token_bound(plan.graph, plan.constants, tokens, given.depth)
    precision = model.precision
    model.close()
    return {
        "model": name, "precision": precision, "tokens": tokens, "depth": given.depth,
        "bound_bytes": bound.nbytes, "bound_with_working_memory_bytes": bound.working,
        "step": bound.step, "operator": bound.op_type, "unknown": list(bound.unknown),
        "live_bytes": used.peak_live - before, "touched_bytes": used.peak_touched - before,
        "touched_over_bound": (used.peak_touched - before) / bound.nbytes,
        "elsewhere_bytes": elsewhere,
    }  # fmt: skip


def row(result: dict[str, Any]) -> list[str]:
    sizes = ("bound_bytes", "live_bytes", "touched_bytes", "elsewhere_bytes")
    return [
        result["model"], result["precision"], str(result["tokens"]), str(result["depth"]),
        *(f"{result[size] / 1e6:.2f}" for size in sizes), f"{result['touched_over_bound']:.3f}",
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--prompt", type=int, default=512, help="tokens, one pass at most")
    arguments.add_argument("--depth", type=int, default=0, help="tokens in the cache before")
    arguments.add_argument("--precision", help="exact or fast")
    given = arguments.parse_args()
    results = [measured(name, given) for name in given.models]
    titles = (
        "model", "precision", "tokens", "depth", "bound MB", "live MB", "touched MB",
        "elsewhere MB", "touched/bound",
    )  # fmt: skip
    report(titles, [row(r) for r in results], {"benchmark": "activations", "models": results})


if __name__ == "__main__":
    main()
