"""A GPU that counts what goes to it and comes back, and models that lie there as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda_arrays import Array
from fake_device import FakeDevice
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb.gpu.whole import WholeProvider
from onnxstream_nb.llm import LanguageModel

SMALL = Tiny(
    vocab=67, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=16, context=96
)
TOLERANCE = 1e-3
"""Of the largest logit, while keys and values are halves in either cache."""
HALVES = 3e-3
"""The same where the products of a prompt are of halves, or weights are rounded to them."""


class CountingDevice(FakeDevice):
    """`up` and `down` are the bytes that were copied to it and from it."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**{"memory": 1 << 30, **about})
        self.up = self.down = 0

    def upload(self, address: int, array: Array, stream: int) -> None:
        self.up += array.nbytes
        super().upload(address, array, stream)

    def download(self, array: Array, address: int, stream: int) -> None:
        self.down += array.nbytes
        super().download(array, address, stream)


def written(folder: Path, encoding: str = "F16", tiny: Tiny = SMALL) -> Path:
    write_gguf(folder / "m.gguf", tiny, encoding)
    return folder / "m.gguf"


def opened(path: Path, **options: Any) -> LanguageModel:
    """A model that lies on the GPU as a whole."""
    llm = LanguageModel(path, **{"precision": "exact", "device": "cuda", "cuda": "all", **options})
    assert isinstance(llm.session.provider, WholeProvider) and llm.gpu_bytes
    return llm


def opened_on_cpu(path: Path, **options: Any) -> LanguageModel:
    return LanguageModel(path, **{"precision": "exact", **options})


def fed(llm: LanguageModel, parts: Sequence[Sequence[int]]) -> list[Array]:
    """The logits after each of the parts."""
    return [np.array(llm.feed(part)) for part in parts]


def on_cpu(path: Path, parts: Sequence[Sequence[int]], **options: Any) -> list[Array]:
    llm = opened_on_cpu(path, **options)
    found = fed(llm, parts)
    llm.close()
    return found


def near(found: Sequence[Any], wanted: Sequence[Any], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        ours = np.asarray(ours)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
