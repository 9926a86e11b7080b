"""The verb export: PyTorch's results, onnxruntime's and ours, for each architecture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_models import CASES, parameters, run_in_steps, save, torch_logits

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers, on import and use

from onnxstream_nb import Session  # noqa: E402
from onnxstream_nb.convert.pytorch.export import Options, export_language_model  # noqa: E402
from onnxstream_nb.formats import load  # noqa: E402

IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11, 40, 3, 17]
STEPS = ([13], [1] * 13, [5, 1, 1, 6])
NEAR = 1e-5  # of the largest logit
OPSET23 = (
    "llama3", "mistral", "mixtral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "falcon", "cohere",
)  # fmt: skip
"""Where attention, masks or norms differ; each takes the exporter five seconds."""
FAILS = {"cohere": "All tensors must have the same rank"}  # opset 14's repeat_interleave


def exported(tmp_path: Path, case: str, **options: Any) -> tuple[Any, Path, Any]:
    """The PyTorch model, the output folder, and what the export says."""
    model = save(case, tmp_path / "model", options.pop("stored", "float32"))
    out = tmp_path / "out"
    done = export_language_model(tmp_path / "model", out, Options(**options), lambda *_: None)
    return model, out, done


def check(model: Any, path: Path) -> None:
    """PyTorch's logits without a cache are those of both engines with one, in any steps."""
    import onnxruntime

    wanted = torch_logits(model, IDS)
    onnx.checker.check_model(path, full_check=True)
    other = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in other.get_inputs()}
    with Session(path) as session, Session(path, optimize=False) as plain:
        runs = [lambda f, names: other.run(names, f)]
        for each in (session, plain):
            runs.append(lambda f, names, each=each: list(each.run(f, names).values()))
        for run in runs:
            for steps in STEPS:
                got = run_in_steps(run, shapes, IDS, steps)
                assert got.shape == wanted.shape
                assert np.abs(got - wanted).max() <= NEAR * np.abs(wanted).max(), steps


@pytest.mark.parametrize("case", sorted(CASES.keys() - FAILS))
def test_opset14(tmp_path: Path, case: str) -> None:
    model, out, done = exported(tmp_path, case, exporter="opset14")
    assert done.opset == 14
    assert done.difference.relative < NEAR
    assert done.difference.runs == 3
    assert done.weights < parameters(model) + 700  # tied tables once; masks and the like are small
    check(model, out / "model.onnx")


@pytest.mark.parametrize("case", OPSET23)
def test_opset23(tmp_path: Path, case: str) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, out, done = exported(tmp_path, case, exporter="opset23")
    assert done.opset == 23
    assert done.difference.relative < NEAR
    assert done.weights < parameters(model) + 100
    check(model, out / "model.onnx")


def test_opset23_has_the_standards_own_operators(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    _, out, _ = exported(tmp_path, "tinyllama", exporter="opset23")
    graph = load(out)
    counts = Counter(node.op_type for node in graph.nodes)
    assert counts["Attention"] == 2
    assert counts["RMSNormalization"] == 5
    assert counts["RotaryEmbedding"] == 4
    matrices = {name for name, ref in graph.initializers.items() if len(ref.shape) == 2}
    assert "model.layers.1.mlp.down_proj.weight" in matrices  # by which quantising finds it
    assert not any(name.startswith("val_") for name in matrices)


@pytest.mark.parametrize("case", sorted(FAILS))
def test_an_exporter_that_fails_says_why(tmp_path: Path, case: str) -> None:
    with pytest.raises(Exception, match=f"opset14 fails: .*{FAILS[case]}; try --exporter opset23"):
        exported(tmp_path, case, exporter="opset14")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_inputs_outputs_and_what_is_said(tmp_path: Path) -> None:
    _, out, done = exported(tmp_path, "llama3")
    graph = load(out)
    names = [f"pkv{i}" for i in range(4)]
    assert [v.name for v in graph.inputs] == [
        "input_ids", "attention_mask", "position_ids", *names,
    ]  # fmt: skip
    assert [v.name for v in graph.outputs] == ["logits", *(f"o{name}" for name in names)]
    shapes = {v.name: v.shape for v in (*graph.inputs, *graph.outputs)}
    assert shapes["input_ids"] == (1, "tokens")
    assert shapes["pkv3"] == (1, 2, "past", 8)
    assert shapes["opkv3"] == (1, 2, "total", 8)
    assert shapes["logits"] == (1, "tokens", 64)
    assert graph.metadata == {
        "architecture": "LlamaForCausalLM", "context_length": 128, "vocab_size": 64,
        "eos_token_ids": [2],
    }  # fmt: skip
    assert done.nodes == len(graph.nodes)
    assert "model.layers.1.self_attn.q_proj.weight" in graph.initializers
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "generation_config.json", "manifest.json", "model-00001.data", "model.onnx",
    ]  # fmt: skip


@pytest.mark.parametrize("exporter", ["opset14", "opset23"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_are_stored_as_the_files_have_them(
    tmp_path: Path, exporter: str, stored: str
) -> None:
    if exporter == "opset23":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, out, done = exported(tmp_path, "llama3", exporter=exporter, stored=stored)
    assert done.dtype == {"float16": "fp16", "bfloat16": "bf16"}[stored]
    refs = load(out).initializers.values()
    matrices = [ref for ref in refs if len(ref.shape) == 2 and min(ref.shape) > 8]
    assert {ref.dtype for ref in matrices} - {"float32"} == {stored}
    assert sum(ref.dtype == stored for ref in matrices) >= 9
    check(model, out / "model.onnx")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtype_rounds_before_it_compares(tmp_path: Path, dtype: str) -> None:
    model, out, done = exported(tmp_path, "qwen2", dtype=dtype)
    assert done.dtype == dtype
    assert done.difference.relative < NEAR
    name = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(getattr(torch, name)))
    check(model, out / "model.onnx")


def test_one_file(tmp_path: Path) -> None:
    model = save("tinyllama", tmp_path / "model")
    out = tmp_path / "one.onnx"
    done = export_language_model(tmp_path / "model", out, Options(), lambda *_: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "one.onnx"]
    assert done.size_bytes == out.stat().st_size
    check(model, out)
