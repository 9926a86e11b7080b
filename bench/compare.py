"""Other engines on the same weights in the same run, turn by turn: prefill, decode, memory.

    python bench/compare.py [MODEL.gguf ...] [--peers NAME,NAME] [--llama-library libllama.so]

Every engine has a process of its own and the same number of threads. In each round every engine
does the same test once, one after the other, each round in another order; the ratio of a round is
our speed by the engine's, and the median of the ratios is shown. What is not installed, or cannot
run a model, is said so. Needs the packages of the `bench` extra.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import Peer, PeerError, parser, report, thread_count, whole_numbers
from weights import locate

DEFAULT = ["smollm2-135m", "tinyllama:f16", "tinyllama:q8_0", "tinyllama:q4_0"]
OURS = "onnxstream_nb"
PEERS: Mapping[str, tuple[str, ...]] = {
    OURS: ("ours.py",),
    "llama.cpp": ("llama_cpp.py",),
    "torch fp32": ("torch_eager.py", "--dtype", "float32"),
    "torch bf16": ("torch_eager.py", "--dtype", "bfloat16"),
    "openvino-genai": ("openvino_genai_cpu.py",),
    "onnxruntime fp32": ("onnxruntime_cpu.py", "--kind", "fp32"),
    "onnxruntime int8": ("onnxruntime_cpu.py", "--kind", "int8"),
    "onnxruntime int4": ("onnxruntime_cpu.py", "--kind", "int4"),
    "onnxruntime-genai int4": ("onnxruntime_genai_cpu.py", "--kind", "int4"),
}
"""Name in the tables -> the file of peers/ and its arguments after the model."""

GREEDY, GREEDY_PROMPT = 8, 32


def measured(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All engines on one model."""
    tests: list[dict[str, Any]] = [{"do": "prefill", "tokens": n} for n in given.prompt]
    tests += [{"do": "decode", "tokens": given.gen, "depth": given.depth}]
    context = max(*given.prompt, given.depth + given.gen, GREEDY_PROMPT + GREEDY)
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        # Conversions first: they take memory of their own.
        for _, peer in starting(path, context, given, results, "--prepare"):
            peer.close()
        running = {}
        for name, peer in starting(path, context, given, results):
            running[name] = stack.enter_context(peer)
        results |= {name: peer.facts | {"tests": {}} for name, peer in running.items()}
        for test in tests:
            run_rounds(test, running, results, given.runs)
        for name, peer in running.items():
            finish(peer, results[name])
    return {"model": str(path), "peers": {name: results[name] for name in given.peers}}


def starting(
    path: Path, context: int, given: argparse.Namespace, failed: dict[str, Any], *more: str
) -> Iterator[tuple[str, Peer]]:
    """Start every engine that has not failed; one that fails now is added to `failed`."""
    for name in given.peers:
        file, *own = chosen(given)[name]
        arguments = [str(path), "--context", str(context), *own, *more]
        try:
            if name not in failed:
                yield name, Peer(file, *arguments, threads=thread_count(given))
        except PeerError as error:
            failed[name] = {"error": str(error)}


def run_rounds(
    test: Mapping[str, Any],
    running: Mapping[str, Peer],
    results: Mapping[str, dict[str, Any]],
    runs: int,
) -> None:
    """Each engine does the test once a round; the first round is not counted. One that fails is
    left out of the rest of the test."""
    names = list(running)
    for turn in range(runs + 1):
        first = turn % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            entry = results[name]["tests"].setdefault(title(test), {"samples": []})
            if "error" in entry:
                continue
            try:
                took = running[name].ask(**test)["seconds"]
            except PeerError as error:
                entry["error"] = str(error)
                continue
            if turn:
                entry["samples"].append(test["tokens"] / took)


def finish(peer: Peer, result: dict[str, Any]) -> None:
    """What is asked when the speeds are known."""
    for question in ({"do": "memory"}, {"do": "greedy", "tokens": GREEDY, "prompt": GREEDY_PROMPT}):
        try:
            result |= peer.ask(**question)
        except PeerError as error:
            result[f"{question['do']}_error"] = str(error)


def title(test: Mapping[str, Any]) -> str:
    """As llama-bench writes it."""
    if test["do"] == "prefill":
        return f"pp{test['tokens']}"
    return f"tg{test['tokens']} @ d{test['depth']}"


def add_ratios(document: dict[str, Any]) -> None:
    """Our speed by each engine's, round by round, and the median."""
    ours = document["peers"].get(OURS, {}).get("tests", {})
    for result in document["peers"].values():
        for name, entry in result.get("tests", {}).items():
            mine = ours.get(name, {}).get("samples", [])
            ratios = [a / b for a, b in zip(mine, entry["samples"], strict=False)]
            if entry["samples"]:
                entry["median"] = statistics.median(entry["samples"])
            if ratios:
                entry["ratios"], entry["ratio"] = ratios, statistics.median(ratios)


def rows_of(document: Mapping[str, Any]) -> list[list[str]]:
    """A line for each engine."""
    peers = document["peers"]
    names = list(dict.fromkeys(n for r in peers.values() for n in r.get("tests", {})))
    reference = peers.get(OURS, {}).get("ids")
    rows = [["", *(f"{n} t/s (ours/theirs)" for n in names), "peak MB", "same greedy", "what"]]
    for peer, result in peers.items():
        if "error" in result:
            rows.append([peer, *("-" for _ in names), "-", "-", result["error"]])
            continue
        memory = max(result["peak_load_bytes"], result.get("peak_run_bytes", 0))
        rows.append([
            peer, *(cell(result["tests"].get(n, {})) for n in names), f"{memory / 1e6:.0f}",
            agreement(result, reference), f"{result['version']} {result['settings']}",
        ])  # fmt: skip
    return rows


def cell(entry: Mapping[str, Any]) -> str:
    """A speed and our ratio to it, or why there is none."""
    if "error" in entry:
        return str(entry["error"])[:60]
    ratio = f" ({entry['ratio']:.2f})" if "ratio" in entry else ""
    return f"{entry['median']:.1f}{ratio}"


def agreement(result: Mapping[str, Any], reference: Sequence[int] | None) -> str:
    """How many tokens of a greedy continuation are ours, until the first that is not."""
    if "ids" not in result or reference is None:
        return "-"
    pairs = list(zip(result["ids"], reference, strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return f"{same}/{len(pairs)}"


def chosen(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """The engines there are, with the library and the precision that were asked for."""
    peers = dict(PEERS)
    if given.llama_library:
        library = str(Path(given.llama_library).absolute())
        peers["llama.cpp (library)"] = ("llama_cpp.py", "--library", library)
    if given.precision:
        peers[OURS] = ("ours.py", "--precision", given.precision)
    return peers


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--prompt", type=whole_numbers, default=[128, 512])
    arguments.add_argument("--gen", type=int, default=64)
    arguments.add_argument("--depth", type=int, default=128)
    arguments.add_argument("--peers", type=lambda text: text.split(","), help="default: all")
    arguments.add_argument("--llama-library", help="libllama.so of another build of llama.cpp")
    arguments.add_argument("--precision", help="of onnxstream_nb")
    given = arguments.parse_args()
    given.peers = given.peers or list(chosen(given))
    unknown = set(given.peers) - set(chosen(given))
    if unknown:
        arguments.error(f"--peers: {', '.join(sorted(unknown))}: known are {', '.join(PEERS)}")
    documents, rows = [], []
    for name in given.models:
        document = measured(locate(name), given) | {"name": name}
        add_ratios(document)
        documents.append(document)
        rows.append([name, *[""] * (len(given.prompt) + 4)])
        rows += rows_of(document)
    document = {"benchmark": "compare", "threads": thread_count(given), "runs": given.runs}
    titles = ["engine", *[""] * (len(given.prompt) + 4)]
    report(titles, rows, document | {"models": documents})


if __name__ == "__main__":
    main()
