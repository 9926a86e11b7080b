"""One picture of what the benchmarks found, from their JSON documents.

    python bench/decode.py | tee decode.txt
    python bench/plot.py decode.txt prefill.txt compare.txt --output docs/speed.png

A file holds a benchmark's output; the last line counts. Decode and prefill are drawn as shares of
their limits, the engines of `compare` as shares of our speed, one group a model; the numbers above
the bars are tokens a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
WIDTH = 0.8  # of a group of bars
OURS = "onnxstream_nb"
MEMORY_LIMIT, SGEMM_LIMIT = "the read bandwidth's limit", "numpy's sgemm, matrix products alone"
COLOURS = {OURS: "black", MEMORY_LIMIT: "lightgrey", SGEMM_LIMIT: "lightgrey"}


def decode(axes: Any, document: Document) -> None:
    """Measured speed under the limit of the read bandwidth."""
    cases = document["cases"]
    names = [f"{short(c['model'])}\nat {c['depth']}" for c in cases]
    series = {
        MEMORY_LIMIT: [c["limit_tokens_per_s"] for c in cases],
        OURS: [c["tokens_per_s"] for c in cases],
    }
    bars(axes, names, series, MEMORY_LIMIT)
    axes.set_title("decode, tokens/s")


def prefill(axes: Any, document: Document) -> None:
    """Measured speed beside that of numpy's sgemm."""
    cases = document["cases"]
    names = [
        "\n".join(filter(None, (short(c["model"]), f"{c['prompt']} tokens", c["precision"])))
        for c in cases
    ]
    series = {
        SGEMM_LIMIT: [c["limit_tokens_per_s"] for c in cases],
        OURS: [c["tokens_per_s"] for c in cases],
    }
    bars(axes, names, series, SGEMM_LIMIT)
    axes.set_title("prefill, tokens/s")


def compare(axes: Any, document: Document, test: str) -> None:
    """All engines at one test."""
    models = document["models"]
    engines = list(dict.fromkeys(name for model in models for name in model["peers"]))
    series = {
        engine: [
            model["peers"].get(engine, {}).get("tests", {}).get(test, {}).get("median", 0.0)
            for model in models
        ]
        for engine in engines
    }
    bars(axes, [short(model["name"]) for model in models], series, OURS)
    axes.set_title(f"{test}, tokens/s")


def bars(axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], by: str) -> None:
    """One bar a series in each group, as a share of series `by`; its own value stands above it."""
    width = WIDTH / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [group - WIDTH / 2 + (i + 0.5) * width for group in range(len(groups))]
        heights = [v / unit if unit else 0.0 for v, unit in zip(values, series[by], strict=True)]
        drawn = axes.bar(at, heights, 0.95 * width, label=name, color=COLOURS.get(name))
        labels = [f"{value:.0f}" if value >= 20 else f"{value:.1f}" for value in values]
        axes.bar_label(drawn, [label if float(label) else "" for label in labels], fontsize=6)
    axes.set_xticks(range(len(groups)), groups, fontsize=7)
    axes.set_ylabel(f"of {by}", fontsize=8)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def short(model: str) -> str:
    """A model's name, or that of its file."""
    return Path(model).stem if "/" in model else model


def panels(documents: Sequence[Document]) -> list[Callable[[Any], None]]:
    """What each document has to show."""
    found: list[Callable[[Any], None]] = []
    for document in documents:
        kind = document["benchmark"]
        if kind == "compare":
            first = [r.get("tests", {}) for m in document["models"] for r in m["peers"].values()]
            for test in dict.fromkeys(name for tests in first for name in tests):
                found.append(lambda axes, d=document, t=test: compare(axes, d, t))
        elif kind in ("decode", "prefill"):
            draw = decode if kind == "decode" else prefill
            found.append(lambda axes, d=document, f=draw: f(axes, d))
        else:
            raise SystemExit(f"{kind}: only decode, prefill and compare are drawn")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("bench/results.png"))
    given = parser.parse_args()
    documents = [json.loads(file.read_text().splitlines()[-1]) for file in given.files]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = panels(documents)
    rows = -(-len(drawings) // 2)
    figure, grid = pyplot.subplots(
        rows, min(2, len(drawings)), figsize=(14, 4.2 * rows), squeeze=False
    )
    places = list(grid.flat)
    for axes, draw in zip(places, drawings, strict=False):
        draw(axes)
    for axes in places[len(drawings) :]:
        axes.set_visible(False)
    document = documents[0]
    figure.suptitle(f"{document['cpu']}, {document['threads']} threads")
    figure.tight_layout()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.output, dpi=150)
    print(json.dumps({"benchmark": "plot", "output": str(given.output)}))


if __name__ == "__main__":
    main()
