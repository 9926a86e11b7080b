"""How an engine answers a benchmark: one JSON request a line on stdin, one answer on stdout.

The engine is a causal model that reads ids behind those it holds, and forgets from the end. All
are timed alike: ids are random, the same for all; neither tokenising nor sampling is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]


class Engine:
    """What each engine implements: `feed` and `rewind`; `vocab_size`; `version` and `settings` say
    what was measured. `tokens` are the ids that it holds."""

    version = ""
    settings = ""
    vocab_size = 0

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def feed(self, ids: Sequence[int]) -> Logits:
        """Read ids behind `tokens`; the logits (V,) after the last."""
        raise NotImplementedError

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        raise NotImplementedError

    def respond(self, do: str, **request: Any) -> dict[str, Any]:
        """A request of this engine's own."""
        raise ValueError(f"no such request: {do}")

    def facts(self) -> dict[str, Any]:
        """More about the model, for the parent."""
        return {}

    def prefill(self, tokens: int) -> float:
        """Seconds to read a prompt into an empty cache."""
        ids = self.ids(tokens)
        self.rewind(0)
        return seconds(lambda: self.feed(ids))

    def decode(self, tokens: int, depth: int) -> float:
        """Seconds to read `tokens` ids one by one after a context of `depth`."""
        ids = self.ids(depth + tokens)
        if self.tokens[:depth] != ids[:depth]:
            self.rewind(0)
            self.feed(ids[:depth])
        self.rewind(depth)

        def feed_singly() -> None:
            for i in ids[depth:]:
                self.feed([i])

        return seconds(feed_singly)

    def greedy(self, tokens: int, prompt: int) -> list[int]:
        """The likeliest continuation of a prompt, to see that all engines run one model."""
        self.rewind(0)
        logits, found = self.feed(self.ids(prompt)), []
        for _ in range(tokens):
            found.append(int(np.argmax(logits)))
            logits = self.feed(found[-1:])
        return found

    def ids(self, count: int) -> list[int]:
        """The first `count` of the ids that all engines read."""
        return [int(i) for i in np.random.default_rng(0).integers(3, self.vocab_size, count)]


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def arguments() -> argparse.ArgumentParser:
    """What every engine is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--prepare", action="store_true", help="convert the model, and no more")
    return parser


def serve(
    given: argparse.Namespace,
    load: Callable[[argparse.Namespace], Engine],
    prepare: Callable[[argparse.Namespace], Any] | None = None,
) -> None:
    """Load the engine, then answer prefill, decode, greedy and memory until stdin ends; or prepare
    its files, in a process of their own, so that its memory is not counted as the engine's.

    A failure is an answer, too: {"error": ...}; a missing package is "not installed".
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints by itself is no answer

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    try:
        if given.prepare:
            return answer({"files": str(prepare(given)) if prepare else None})
        started = time.perf_counter()
        engine = load(given)
        load_s = time.perf_counter() - started
    except ModuleNotFoundError as error:
        return answer({"error": f"not installed: {error.name}"})
    except Exception as error:  # the parent shows it in its table
        return answer({"error": described(error)})
    facts = {"version": engine.version, "settings": engine.settings, "load_s": load_s}
    answer(facts | {"peak_load_bytes": peak_rss()} | engine.facts())
    forget_peak()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(respond(engine, request.pop("do"), request))
        except Exception as error:  # as above; the next request may well succeed
            answer({"error": described(error)})


def respond(engine: Engine, do: str, request: dict[str, Any]) -> dict[str, Any]:
    """One answer."""
    if do == "prefill":
        return {"seconds": engine.prefill(**request)}
    if do == "decode":
        return {"seconds": engine.decode(**request)}
    if do == "greedy":
        return {"ids": engine.greedy(**request)}
    if do == "memory":
        return {"peak_run_bytes": peak_rss()}
    return engine.respond(do, **request)


def described(error: Exception) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes, since it began or forget_peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)[0]) * 1024


def forget_peak() -> None:
    """Let the peak start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
