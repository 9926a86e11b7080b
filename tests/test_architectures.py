"""Architectures beyond Llama against their definitions in NumPy, in both file formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from decoder_models import CONFIGS, write_gguf, write_hf
from decoder_oracle import logits
from llama_oracle import close, run_in_steps

from onnxstream_nb.formats import gguf, safetensors

IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11]
STEPS = [6, 1, 3]


@pytest.mark.parametrize("case", CONFIGS)
def test_folder_computes_what_its_weights_say(tmp_path: Path, case: str) -> None:
    weights = write_hf(tmp_path, CONFIGS[case])
    graph = safetensors.read(tmp_path)
    close(run_in_steps(graph, IDS, STEPS), logits(CONFIGS[case], weights, IDS))
    assert graph.metadata["eos_token_ids"] == [1, 7]


@pytest.mark.parametrize(("encoding", "fused"), [("F32", False), ("Q8_0", True)])
@pytest.mark.parametrize("case", CONFIGS)
def test_gguf_computes_what_its_weights_say(
    tmp_path: Path, case: str, encoding: str, fused: bool
) -> None:
    weights = write_gguf(tmp_path / "m.gguf", CONFIGS[case], encoding, fused=fused)
    graph = gguf.read(tmp_path / "m.gguf")
    close(run_in_steps(graph, IDS, STEPS), logits(CONFIGS[case], weights, IDS))
