"""Architectures beyond Llama against their definitions in NumPy, in both file formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from decoder_models import CONFIGS, write_gguf, write_hf
from decoder_oracle import Array, logits
from llama_oracle import close, run_in_steps

from onnxstream_nb.formats import gguf, safetensors
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.lowering import _Host
from onnxstream_nb.passes import LOGIT_ROWS

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


# -- run by the engine


def generated(path: Path, threads: int) -> tuple[Array, LanguageModel]:
    """Logits (T, vocabulary) of IDS, read as a prompt and then token by token."""
    model = LanguageModel(path, threads=threads, precision="exact")
    rows = [model.feed(IDS[:4]).copy()]
    rows += [model.feed([token]).copy() for token in IDS[4:]]
    return np.stack(rows), model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CONFIGS)
def test_tokens_one_by_one_over_a_cache(tmp_path: Path, case: str, threads: int) -> None:
    weights = write_hf(tmp_path, CONFIGS[case])
    rows, model = generated(tmp_path, threads)
    wanted = logits(CONFIGS[case], weights, IDS)[3:]
    assert np.abs(rows - wanted).max() <= 5e-3 * np.abs(wanted).max()  # the cache has 11 bits
    replay = model.session._replay
    assert replay is not None and replay.lowered
    model.close()


@pytest.mark.parametrize("case", CONFIGS)
def test_layers_of_a_token_are_tables(tmp_path: Path, case: str) -> None:
    """Python runs what becomes of positions and the embedding, and nothing of the layers."""
    write_hf(tmp_path, CONFIGS[case])
    _, model = generated(tmp_path, 1)
    hosts = [part.step.node for part in model.session._replay._parts if isinstance(part, _Host)]
    assert {node.op_type for node in hosts} <= {"Gather", "Cast", "Cos", "Sin"}
    model.close()


@pytest.mark.parametrize("encoding", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("case", ["gemma2", "phi"])
def test_rows_of_a_fused_matrix_are_those_of_their_own(
    tmp_path: Path, case: str, encoding: str
) -> None:
    results = []
    for fused in (False, True):
        write_gguf(tmp_path / "m.gguf", CONFIGS[case], encoding, fused=fused)
        rows, model = generated(tmp_path / "m.gguf", 2)
        model.close()
        results.append(rows)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_prompt_needs_logits_of_its_last_position_only(tmp_path: Path, case: str) -> None:
    write_hf(tmp_path, CONFIGS[case])
    model = LanguageModel(tmp_path, threads=1)
    assert LOGIT_ROWS in {value.name for value in model.graph.inputs}
    model.close()
