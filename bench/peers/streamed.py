"""onnxstream_nb over a model that is streamed: its tokens, and between them what the disk can do.

A model is a path, or with `--geometry` a file of random weights that synthetic.py has written.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
from protocol import Engine, Logits, arguments, serve

from onnxstream_nb import __version__
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.measure import stream_rate


def graph_of(given: Namespace) -> Any:
    """What LanguageModel is given: a path, or the graph of a geometry."""
    if not given.geometry:
        return given.model
    from onnxstream_nb.graph import ENCODINGS
    from onnxstream_nb.hub import CATALOGUE
    from onnxstream_nb.synthetic import DTYPES, llama_config, random_graph

    geometry = CATALOGUE[given.geometry].geometry
    assert geometry is not None
    config = llama_config(geometry, given.model, given.geometry)
    return random_graph(config, ENCODINGS[DTYPES[given.dtype]], given.model)[0]


class Streamed(Engine):
    """Answers prompt and token by token, with bytes and waiting beside the seconds."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        self.model = LanguageModel(
            graph_of(given), threads=given.threads, context=given.context, load=given.load,
            ram=given.ram,
        )  # fmt: skip
        self.version, self.settings = __version__, f"load={given.load}, ram={given.ram}"
        self.vocab_size, self.tokens = self.model.vocab_size, self.model.tokens
        self.provider: Any = self.model.session.provider

    def feed(self, ids: Sequence[int]) -> Logits:
        return self.model.feed(ids)

    def rewind(self, length: int) -> None:
        self.model.rewind(length)

    def facts(self) -> dict[str, Any]:
        return {
            "weight_bytes": self.model.bytes_per_token, "chunk": self.model.chunk,
            "bytes_a_pass": getattr(self.provider, "bytes_a_pass", 0),
            "provider": type(self.provider).__name__,
        }  # fmt: skip

    def respond(self, do: str, **request: Any) -> dict[str, Any]:
        if do == "prompt":
            return self.prompt(**request)
        if do == "tokens":
            return self.singly(**request)
        return super().respond(do, **request)

    def prompt(self, tokens: int, chunk: int, logits: str) -> dict[str, Any]:
        """Read a prompt, so many tokens a pass, and save the logits after it."""
        self.model.chunk = chunk
        self.rewind(0)
        passes = self.model.passes
        found, figures = self.timed(self.ids(tokens))
        np.save(logits, found)
        return figures | {"passes": self.model.passes - passes}

    def singly(self, tokens: int, logits: str) -> dict[str, Any]:
        """Read further tokens one by one, the first untimed, and save the logits after each."""
        before = len(self.tokens)
        ids = self.ids(before + tokens + 1)[before:]
        found = [self.model.feed(ids[:1])]
        rates, samples = [self.rate()], []
        for i in ids[1:]:
            after, figures = self.timed([i])
            found.append(after)
            samples.append(figures)
            rates.append(self.rate())
        np.save(logits, np.stack(found))
        return {"samples": samples, "rates": rates}

    def timed(self, ids: list[int]) -> tuple[Logits, dict[str, float]]:
        """The logits after the ids, and what it took to read them."""
        bytes_before, waited = self.model.bytes_streamed, self.waited()
        started = time.perf_counter()
        logits = self.model.feed(ids)
        seconds = time.perf_counter() - started
        return logits, {
            "seconds": seconds, "bytes": self.model.bytes_streamed - bytes_before,
            "waited": self.waited() - waited,
        }  # fmt: skip

    def waited(self) -> float:
        """Seconds that kernels have waited for the disk."""
        return float(getattr(self.provider, "waited", 0.0))

    def rate(self) -> float:
        """What the disk gives now, when nobody computes; 0.0 when nothing is streamed."""
        return stream_rate(self.provider) if hasattr(self.provider, "read_through") else 0.0


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--load", default="stream")
    parser.add_argument("--ram", type=int)
    parser.add_argument("--geometry")
    parser.add_argument("--dtype", default="f16")
    serve(parser.parse_args(), Streamed)
