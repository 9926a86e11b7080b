"""onnxstream_nb itself, through LanguageModel."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from protocol import Engine, Logits, arguments, serve

from onnxstream_nb import __version__
from onnxstream_nb.llm import LanguageModel


class Ours(Engine):
    """LanguageModel has the same two verbs."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        precision = {"precision": given.precision} if given.precision else {}
        self.model = LanguageModel(
            given.model, threads=given.threads, context=given.context, load=given.load, **precision
        )
        self.version = __version__
        self.settings = ", ".join(f"{k}={v}" for k, v in {"load": given.load, **precision}.items())
        self.vocab_size = self.model.vocab_size
        self.tokens = self.model.tokens

    def feed(self, ids: Sequence[int]) -> Logits:
        return self.model.feed(ids)

    def rewind(self, length: int) -> None:
        self.model.rewind(length)

    def facts(self) -> dict[str, Any]:
        """Bytes that a token reads of the weights and of each position of the cache, and the
        multiplications and additions that a prompt's token takes in matrix products."""
        self.model.feed(self.ids(1))
        slots = self.model._cache.slots.values()
        self.model.rewind(0)
        matrices = {
            ref.key: math.prod(ref.shape)
            for step in self.model.session.plan.steps
            if step.node.op_type in ("MatMul", "Gemm")
            for ref in step.weights
            if ref.shape[-1] != self.vocab_size  # the head reads a prompt's last token only
        }
        return {
            "bytes_per_token": self.model.bytes_per_token,
            "cache_bytes_per_position": sum(s.room_bytes // s.capacity for s in slots),
            "operations_per_token": 2 * sum(matrices.values()),
        }


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--load", default="auto")
    parser.add_argument("--precision")
    serve(parser.parse_args(), Ours)
