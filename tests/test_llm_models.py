"""Graphs that are no common language model, and files that change under a running one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_fixtures import write_gguf, write_hf
from llama_oracle import Tiny
from llm_checks import Countdown, exact_model, near
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, refusal, saved, summing, value

from onnxstream_nb.errors import Interrupted, UnsupportedError


def test_a_graph_without_a_past(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.ones((9, 4), np.float32), "table")
    proto = make(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        [value("input_ids", TensorProto.INT64, (1, "t"))], [value("logits", shape=(1, "t", 4))],
        [table],
    )  # fmt: skip
    path = saved(proto, tmp_path / "m.onnx")
    message = refusal(lambda: exact_model(path), UnsupportedError)
    assert "past" in message and "export" in message


def test_a_past_without_attention(tmp_path: Path) -> None:
    """The cache is kept for graphs that the passes do not know, too."""
    proto, table, w = summing()
    model = exact_model(saved(proto, tmp_path / "m.onnx"))
    ids: list[int] = []
    for step in ([1, 7, 3], [2], [5], [8, 8], [0], [4]):
        ids += step
        wanted = (table[ids[-1]] + table[ids].sum(axis=0)) @ w
        near(model.feed(step), wanted, 1e-5)
    model.rewind(3)
    near(model.feed([6]), (table[6] + table[[1, 7, 3, 6]].sum(axis=0)) @ w, 1e-5)
    with pytest.raises(Interrupted):
        model.feed([1, 2], Countdown(4))
    near(model.feed([2]), (table[2] + table[[1, 7, 3, 6, 2]].sum(axis=0)) @ w, 1e-5)
    model.close()


def test_an_input_that_nobody_feeds(tmp_path: Path) -> None:
    proto, _, _ = summing(extra="temperature")
    path = saved(proto, tmp_path / "m.onnx")
    message = refusal(lambda: exact_model(path), UnsupportedError)
    assert "'temperature'" in message and "input_ids" in message


def test_nothing_is_opened_for_a_graph_that_cannot_be_fed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto, _, _ = summing(extra="temperature")
    opened: list[object] = []
    monkeypatch.setattr("onnxstream_nb.llm.Session", lambda *_, **__: opened.append(None))
    refusal(lambda: exact_model(saved(proto, tmp_path / "m.onnx")), UnsupportedError)
    assert not opened


_TRUNCATED = """
import os, sys
from onnxstream_nb.errors import ModelError
from onnxstream_nb.llm import LanguageModel

model = LanguageModel(sys.argv[1], load=sys.argv[2], threads=1)
for token in (3, 1, 4, 1, 5):
    model.feed([token])
os.truncate(sys.argv[3], 4096)
try:
    model.feed([9])
except ModelError as error:
    print(error)
"""


@pytest.mark.parametrize("load", ["mmap", "stream"])
@pytest.mark.parametrize("name", ["m.gguf", "model-00002-of-00002.safetensors"])
def test_a_file_truncated_while_it_decodes(name: str, load: str, tmp_path: Path) -> None:
    """In a process of its own: reading a mapped page behind the end of a file would end it."""
    path, tiny = tmp_path / name, Tiny(hidden=96, intermediate=160)
    if name == "m.gguf":
        write_gguf(path, tiny)
    else:
        write_hf(tmp_path, tiny, shards=2)
    done = subprocess.run(
        [sys.executable, "-c", _TRUNCATED, str(tmp_path), load, str(path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert name in done.stdout and "truncated" in done.stdout
