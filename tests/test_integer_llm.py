"""W8A8 quantisation of language models, and conversions to OnnxStream's 8-bit folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_llm import FakeTokenizer
from integer_models import ours, silent, snr, theirs, written
from llama_fixtures import random_weights, write_gguf
from llama_oracle import Tiny

from onnxstream_nb import formats
from onnxstream_nb.cli.main import main
from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.quantisation.integer import feeds_of, prepared
from onnxstream_nb.convert.quantisation.quantise import QuantiseOptions, quantise
from onnxstream_nb.convert.quantisation.smooth import smoothed
from onnxstream_nb.errors import UsageError
from onnxstream_nb.session import Session

pytestmark = pytest.mark.usefixtures("one_thread_afterwards")

Array = np.ndarray[Any, Any]
TINY = Tiny(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=300)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
IDS = np.array([list(b"A tale of two cities.")])
OUTLIERS = (3, 17, 40)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few channels of its norms a hundred times as large as the others."""
    weights = random_weights(TINY)
    for name, values in weights.items():
        if "layernorm" in name:
            values[list(OUTLIERS)] *= 100
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj")):
            values[:, list(OUTLIERS)] /= 50
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, TINY, weights=weights)
    return path


@pytest.fixture(scope="module")
def draft(gguf: Path) -> Draft:
    return Draft(formats.load(gguf))


def feeds(graph: Any) -> dict[str, Array]:
    sizes = {"input_ids": IDS, "position_ids": np.arange(IDS.size)[None]}
    cache = (v for v in graph.inputs if v.name not in sizes)
    past = {v.name: np.zeros((1, TINY.kv_heads, 0, TINY.head_dim), "f4") for v in cache}
    return {**sizes, **past}


def options(method: str, **more: Any) -> QuantiseOptions:
    calibration = {"text": TEXT, "tokenizer": FakeTokenizer(), "tokens": 96, "window": 32}
    return QuantiseOptions(method=method, **{**calibration, **more})


def exact(draft: Draft) -> Array:
    with Session(draft.graph, threads=1) as session:
        logits: Array = session.run(feeds(draft.graph), ["logits"])["logits"]
    return logits


def quantised(draft: Draft, asked: QuantiseOptions) -> onnx.ModelProto:
    return written(quantise(draft, asked, silent))


@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_logits_are_close_to_those_of_floats(draft: Draft, method: str) -> None:
    model, fed = quantised(draft, options(method)), feeds(draft.graph)
    kinds = [node.op_type for node in model.graph.node]
    matrices = 7 * TINY.layers + 1
    if method == "dynamic":
        assert kinds.count("MatMulInteger") == matrices and "MatMul" not in kinds
        assert kinds.count("DynamicQuantizeLinear") == 4 * TINY.layers + 1  # q, k, v share one
    else:
        assert kinds.count("QuantizeLinear") == 4 * TINY.layers + 1
    y = theirs(model, fed)
    assert snr(exact(draft), y) > 22
    assert snr(y, ours(model, fed)) > 30  # steps that fall otherwise, behind each other
    assert snr(exact(draft), ours(model, fed)) > 22


def test_outliers_go_into_weights(draft: Draft) -> None:
    found = smoothed(prepared(draft), feeds_of(draft, options("static")), silent)
    model, fed = written(found), feeds(draft.graph)
    np.testing.assert_allclose(ours(model, fed), exact(draft), 1e-3, 1e-3)
    norms = [np.abs(found.read(r)) for n, r in found.graph.initializers.items() if "_norm" in n]
    assert max(n.max() / np.median(n) for n in norms) < 30
    without = quantised(draft, QuantiseOptions(method="dynamic"))
    smooth = quantised(draft, options("dynamic"))
    reached = [snr(exact(draft), theirs(m, fed)) for m in (without, smooth)]
    assert reached[1] > reached[0] + 5


def test_range_data_is_of_the_model_as_it_is(draft: Draft, tmp_path: Path) -> None:
    path = tmp_path / "range_data.txt"
    first = quantised(draft, options("static", range_data=path))
    lines = path.read_bytes().decode().split("\r\n")
    assert any(line.startswith("model.layers.0.mlp.down_proj.out,") for line in lines)
    assert lines[-1] == "" and lines[:-1] == sorted(lines[:-1])
    again = quantised(draft, QuantiseOptions(method="static", range_data=path))
    assert first == again


def test_the_head_can_be_kept(draft: Draft) -> None:
    model = quantised(draft, options("dynamic", keep=(("head", "fp16"), ("*blk.1*", "fp32"))))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMul") == 8 and kinds.count("MatMulInteger") == 7


def test_kept_layers_are_stored_in_the_floats_asked_for(
    draft: Draft,
) -> None:
    found = quantise(draft, options("static", keep=(("*ffn_down*", "fp16"),)), silent)
    refs = found.graph.initializers
    assert {r.encoding for n, r in refs.items() if "ffn_down" in n} == {"float16"}
    assert not any(".int" in n for n in refs if "ffn_down" in n)
    assert snr(exact(draft), ours(written(found), feeds(draft.graph))) > 20


def test_calibration_of_a_language_model_is_checked(draft: Draft, tmp_path: Path) -> None:
    for asked, message in (
        (QuantiseOptions(method="static"), "give --calibration"),
        (options("static", text="short"), "calibration needs 96 tokens"),
        (options("static", asymmetric=True), "--asymmetric is for --method dynamic"),
    ):
        with pytest.raises(UsageError, match=message):
            quantise(draft, asked, silent)


def test_convert_to_an_8_bit_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf, out = tmp_path / "tiny.gguf", tmp_path / "folder"
    write_gguf(gguf, TINY)
    draft = Draft(formats.load(gguf))
    command = ["convert", str(gguf), "-o", str(out), "--to", "onnxstream"]
    assert main([*command, "--dtype", "int8"]) == 0
    capsys.readouterr()
    assert "(uint8[" in (out / "model.txt").read_text("utf-8")
    loaded = formats.load(out)
    fed = {**feeds(draft.graph), "attention_mask": np.ones(IDS.shape, np.int64)}
    past = np.zeros((1, TINY.kv_heads, 0, TINY.head_dim), "f4")
    with Session(loaded, threads=1) as session:
        given = {v.name: fed.get(v.name, past) for v in session.inputs}
        assert snr(exact(draft), session.run(given, ["logits"])["logits"]) > 10
    for flags in (["--dtype", "int4"], ["--dtype", "int8", "--block", "32"]):
        assert main([*command, "--overwrite", *flags]) == 2
        assert "OnnxStream stores no weights in blocks" in capsys.readouterr().err


@pytest.mark.skipif("ONNXSTREAM_TEST_MODELS" not in os.environ, reason="needs real models")
@pytest.mark.parametrize("name", ["ppocr_cls", "magika_v3_3", "q_qdq_resnet", "basic_pitch"])
def test_real_models_run_as_in_onnxruntime(name: str, tmp_path: Path) -> None:
    """ONNXSTREAM_TEST_MODELS is a folder of NAME/model.onnx and NAME/case0.npz."""
    folder = Path(os.environ["ONNXSTREAM_TEST_MODELS"]) / name
    model = onnx.load(folder / "model.onnx")
    graph = formats.load(folder / "model.onnx")
    arrays = dict(np.load(folder / "case0.npz"))
    fed = {v.name: arrays[f"in__{v.name}"] for v in graph.inputs}
    wanted = theirs(model, fed)
    assert snr(wanted, ours(model, fed)) > 60
    if name == "q_qdq_resnet":
        return
    np.savez(tmp_path / "feeds.npz", **fed)
    for asked, least in (
        (QuantiseOptions(method="dynamic"), 10),
        (QuantiseOptions(method="static", feeds=tmp_path / "feeds.npz"), 8),
    ):
        found = quantised(Draft(graph), asked)
        assert snr(theirs(found, fed), ours(found, fed)) > 35
        assert snr(wanted, ours(found, fed)) > least
