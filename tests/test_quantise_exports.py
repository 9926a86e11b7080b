"""Exports of PyTorch's, quantised: decomposed at opset 14, and by the newer exporter."""

from __future__ import annotations

import numpy as np
import pytest
from fake_llm import FakeTokenizer
from quantising import agreed, distance, quantised
from test_exports import FOLDER, cases

from onnxstream_nb.convert.quantisation.calibration import feeds_of_text
from onnxstream_nb.convert.quantisation.matrices import find
from onnxstream_nb.convert.source import read

EXPORTS = ("llama_gqa_op14", "mistral_sw8_op14", "llama_gqa_dyn23")

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")


class Bytes(FakeTokenizer):
    """A byte a token, of those that a small vocabulary has."""

    def encode_parts(self, text: str, special: bool, stand_ins: object) -> list[int]:
        return [byte % 128 for byte in text.encode()]


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_exports_are_quantised_and_run_alike(name: str, method: str) -> None:
    draft = read(FOLDER / name)
    given, wanted = cases(name)[0]
    found = quantised(draft, method=method, dtype="int4", tokenizer=Bytes(), tokens=256)
    got = agreed(found, given, "logits")
    assert distance(got, wanted["logits"]) < 0.6
    operators = [node.op_type for node in found.graph.nodes]
    assert operators.count("DequantizeLinear") >= len(find(draft))


@pytest.mark.parametrize("name", EXPORTS)
def test_eight_bits_are_close(name: str) -> None:
    given, wanted = cases(name)[0]
    got = agreed(quantised(read(FOLDER / name), dtype="int8"), given, "logits")
    assert distance(got, wanted["logits"]) < 0.03


@pytest.mark.parametrize("name", EXPORTS)
def test_layers_of_exports_are_known(name: str) -> None:
    matrices = find(read(FOLDER / name))
    assert sum("head" in m.roles for m in matrices) == 1
    assert sum("table" in m.roles for m in matrices) == 1
    named = [m for m in matrices if "values" in m.roles or any("v_proj" in n for n in m.names)]
    assert len(named) == (len(matrices) - 1) // 7


def test_the_inputs_of_an_export_are_fed() -> None:
    graph = read(FOLDER / EXPORTS[0]).graph
    feed = next(feeds_of_text(graph, Bytes(), "Once upon a time", 8, 1))
    assert feed.keys() == {value.name for value in graph.inputs}
    assert all(np.asarray(array).shape[0] == 1 for array in feed.values())
