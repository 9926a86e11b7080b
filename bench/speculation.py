"""Passes over the weights for each token, with guesses and without; whether the text is the same.

    python bench/speculation.py [MODEL ...] [--draft MODEL] [--gen 120] [--load stream] [--ram SIZE]

Greedy, on texts that repeat something, that repeat themselves, and that do neither. A draft model
needs the vocabulary of the models.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from harness import engine, parser, report, thread_count
from weights import locate

TEXTS = {
    "word for word": (
        "Repeat this text word for word: The quick brown fox jumps over the lazy dog while the old "
        "farmer, who had seen many foxes in his long life, watched from the wooden fence and "
        "thought about the harvest that would come in autumn."
    ),
    "a list": "List the numbers from one to forty as words, one a line.",
    "a story": "Write a short story about a lighthouse keeper.",
}
DEFAULT = ["smollm2-135m"]


def kinds(draft: str | None) -> dict[str, list[str]]:
    """The ways to guess, by name: their flags."""
    found = {"none": ["--speculate", "0"], "text": ["--speculate", "7"]}
    if draft:
        helper = ["--draft", str(locate(draft))]
        found |= {"draft": [*helper, "--speculate", "0"], "both": [*helper, "--speculate", "7"]}
    return found


def measured(name: str, text: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One text of one model: a reply for each way to guess."""
    command = ["generate", str(locate(name)), "--prompt", TEXTS[text], "--json"]
    command += ["--temperature", "0", "--max-tokens", str(given.gen), "--load", given.load]
    command += ["--threads", str(thread_count(given))] + (["--ram", given.ram] if given.ram else [])
    results: list[dict[str, Any]] = []
    for kind, flags in kinds(given.draft).items():
        runs = [json.loads(engine(*command, *flags).output) for _ in range(given.runs)]
        speed = statistics.median(run["decode_tps"] for run in runs)
        reply = runs[0] | {"decode_tps": speed}
        same = not results or reply["tokens"] == results[0]["tokens"]
        per_token = reply["passes"] / max(1, reply["completion_tokens"] - 1)
        results.append(
            reply | {"model": name, "case": text, "guesses": kind, "same_text": same,
                     "passes_per_token": round(per_token, 4)}
        )  # fmt: skip
    return results


def row(result: dict[str, Any]) -> list[str]:
    right = f"{result['accepted']} of {result['drafted']}"
    return [
        result["model"], result["case"], result["guesses"], str(result["completion_tokens"]),
        f"{result['passes_per_token']:.2f}", right, f"{result['decode_tps']:.1f}",
        "yes" if result["same_text"] else "NO",
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, DEFAULT)
    arguments.add_argument("--draft", help="a draft model")
    arguments.add_argument("--gen", type=int, default=120, help="most tokens of a reply")
    arguments.add_argument("--load", default="stream", help="how weights are held")
    arguments.add_argument("--ram", help="a budget")
    arguments.set_defaults(runs=1)
    given = arguments.parse_args()
    results = [r for name in given.models for text in TEXTS for r in measured(name, text, given)]
    titles = ("model", "text", "guesses", "tokens", "passes a token", "right", "tok/s", "same text")
    report(titles, [row(r) for r in results], {"benchmark": "speculation", "replies": results})


if __name__ == "__main__":
    main()
