"""What the tests of the language-model layer share: their tolerance, and a stop that counts."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from onnxstream_nb.llm import LanguageModel

Array = np.ndarray[Any, Any]

FLOAT16_CACHE = 2e-3
"""Of the largest logit. The oracle is float64 throughout; the engine keeps keys and values in
float16 (11 bits: 5e-4 of each number), which pass through a softmax and up to three layers."""


def exact_model(*arguments: Any, **options: Any) -> LanguageModel:
    """A model whose prompts are not rounded to bfloat16, to be held against an oracle."""
    return LanguageModel(*arguments, precision="exact", **options)


def near(got: Array, wanted: Array, tolerance: float = FLOAT16_CACHE) -> None:
    assert got.shape == wanted.shape and got.dtype == np.float32
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


class Countdown(threading.Event):
    """Set from the n-th time on that somebody asks."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0
