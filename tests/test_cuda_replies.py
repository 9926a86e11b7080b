"""Replies of models that lie on a GPU as a whole, whose tokens are drawn there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_models import Tokenizer
from fake_llm import VOCAB
from whole_models import SMALL, CountingDevice, opened, opened_on_cpu, written

from onnxstream_nb.gpu import offload
from onnxstream_nb.model import Model


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    made = CountingDevice()
    monkeypatch.setattr(offload, "_first", lambda: made)
    return made


TEXT = replace(SMALL, vocab=VOCAB, context=128)


def replies(path: Path, options: dict[str, Any], **sampling: Any) -> list[int]:
    llm = opened(path) if options else opened_on_cpu(path)
    llm.logits_stay = bool(options)
    model = Model("tiny", path, Tokenizer(), llm)
    reply = model.generate("abcabcab", raw=True, max_tokens=4, **sampling)
    ids = [token.id for token in reply]
    if options and not sampling.get("speculate"):
        assert reply.stats.gpu_bytes == llm.gpu_bytes
    model.close()
    return ids


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0}, {"temperature": 1.3, "seed": 5, "top_p": 0.9},
        {"temperature": 1, "seed": 3, "top_k": 0, "repeat_penalty": 1.3, "logit_bias": {97: 4.0}},
        {"temperature": 0, "speculate": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_reply_is_the_cpu_s(
    sampling: dict[str, Any], tmp_path: Path, device: CountingDevice
) -> None:
    path = written(tmp_path, "F16", TEXT)
    assert replies(path, {"cuda": "all"}, **sampling) == replies(path, {}, **sampling)


def test_replies_side_by_side(tmp_path: Path, device: CountingDevice) -> None:
    path, found = written(tmp_path, "F16", TEXT), []
    for llm in (opened_on_cpu(path), opened(path)):
        model = Model("tiny", path, Tokenizer(), llm)
        batch = model.generate_batch(["abcd", "xy"], raw=True, max_tokens=3, temperature=0)
        items = {item.index: item for item in batch}
        assert batch.side_by_side and llm.cache_room > 0
        found.append([[token.id for token in items[i].tokens] for i in (0, 1)])
        model.close()
    assert found[0] == found[1] and not device.held


def test_what_goes_and_comes_for_a_token_that_is_sampled_there(
    tmp_path: Path, device: CountingDevice
) -> None:
    """Not the logits."""
    llm = opened(written(tmp_path, "F16", TEXT))
    llm.logits_stay = True
    model = Model("tiny", tmp_path, Tokenizer(), llm)
    moved = []
    for _ in model.generate("abc", raw=True, max_tokens=4, temperature=1, seed=1):
        moved.append((device.up, device.down))
    ups, downs = np.diff(moved, axis=0)[1:].T
    assert (ups <= 128).all() and (downs <= 32).all()
    model.close()
