"""SmolLM2 as a Hugging Face folder, exported both ways: the references' ids, and its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from smollm2_folder import write_folder
from test_smollm2 import REFERENCES, greedy
from tokenizer_fixtures import smollm2

for needed in ("torch", "transformers", "onnxscript", "gguf", "safetensors"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")
pytestmark = [
    pytest.mark.skipif(smollm2() is None, reason="SmolLM2 absent: set ONNXSTREAM_TEST_SMOLLM2"),
    pytest.mark.filterwarnings("ignore"),  # of torch and transformers, on import and use
]

from onnxstream_nb import cli  # noqa: E402
from onnxstream_nb.llm import LanguageModel  # noqa: E402

PARAMETERS = 134_515_008


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = smollm2()
    assert path is not None
    folder = tmp_path_factory.mktemp("smollm2")
    write_folder(path, folder)
    return folder


@pytest.mark.parametrize("exporter", ["opset14", "opset23"])
def test_greedy_ids_and_size(
    folder: Path, tmp_path: Path, exporter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(folder), "-o", str(out), "--exporter", exporter, "--json"]
    assert cli.main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["dtype"] == "fp16"
    assert done["relative_difference"] < 2e-5
    assert PARAMETERS <= done["weights"] < PARAMETERS + 1000
    weights = sum(p.stat().st_size for p in out.glob("*.data"))
    assert 2 * PARAMETERS <= weights < 1.005 * 2 * PARAMETERS  # the tied head is there once
    check(out, json.loads(REFERENCES.read_text("utf-8")))


def check(out: Path, cases: list[dict[str, Any]]) -> None:
    model = LanguageModel(out)
    for case in cases:
        assert greedy(model, case) == case["output_ids"], case["prompt"]
    model.close()
