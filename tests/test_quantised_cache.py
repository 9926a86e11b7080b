"""A language model whose cache keeps keys and values in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny, logits
from llm_checks import FLOAT16_CACHE, near

from onnxstream_nb.llm import LanguageModel

TINY = Tiny(vocab=67, context=700, hidden=96, heads=6, kv_heads=2, head_dim=32, layers=2)
TOLERANCE = 20 * FLOAT16_CACHE
"""Of the largest logit: an element is off by 1/254 of its head's largest at most. The largest of 32
is some 2.5 times the usual one, which makes that 1e-2 of a number, where float16 makes it 5e-4."""

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], Array]:
    """A GGUF, ids, and the oracle's logits (T, V) of them."""
    path = tmp_path_factory.mktemp("quantised") / "m.gguf"
    ids = [int(i) for i in np.random.default_rng(4).integers(0, 67, 300)]
    return path, ids, logits(TINY, write_gguf(path, TINY), ids)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("load", ["stream", "mmap"])
def test_prompt_tokens_and_rewinding(
    load: str, threads: int, held: tuple[Path, list[int], Array]
) -> None:
    """Past the least capacity of a cache, so that it grows and moves, also while replayed."""
    path, ids, wanted = held
    model = LanguageModel(path, load=load, threads=threads, precision="exact", kv_cache="q8")
    near(model.feed(ids[:230]), wanted[229], TOLERANCE)
    given = []
    for i in range(230, 300):
        given.append(model.feed(ids[i : i + 1]))
        near(given[-1], wanted[i], TOLERANCE)
    model.rewind(240)
    for i in range(240, 300):
        np.testing.assert_array_equal(model.feed(ids[i : i + 1]), given[i - 230])
    model.rewind(33)
    near(model.feed(ids[33:]), wanted[-1], TOLERANCE)
    model.close()


def test_it_takes_little_more_than_half_the_memory(held: tuple[Path, list[int], Array]) -> None:
    path, ids, _ = held
    sizes = {}
    for kind in ("f16", "q8"):
        model = LanguageModel(path, kv_cache=kind)
        model.feed(ids)
        sizes[kind] = model.cache_bytes
        model.close()
    assert sizes["q8"] / sizes["f16"] == (32 + 4) / 64  # a head's int8 and its scale
