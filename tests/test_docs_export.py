"""The recipes of docs/export.md, run: small models stand in for those of the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from export_models import run_in_steps, save, torch_logits
from tokenizer_fixtures import LLAMA

from onnxstream_nb import Session, cli
from onnxstream_nb.tokenizer import load_tokenizer

DOCUMENT = Path(__file__).parent.parent / "docs" / "export.md"
IDS = [1, 5, 9, 63, 0, 7, 7, 30, 22, 11, 40]

pytestmark = [
    pytest.mark.skipif(not DOCUMENT.exists(), reason="a checkout without docs"),
    pytest.mark.filterwarnings("ignore"),  # of torch and transformers, on import and use
]


def block(beginning: str) -> str:
    """The code block that begins with a line."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    return next(b for b in blocks if b.startswith(beginning))


@pytest.fixture
def torch() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize(
    ("call", "source", "case"),
    [
        ('export("PY007', "PY007/TinyLlama-1.1B-Chat-v0.3", "tinyllama"),
        ('export("mistralai', "mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
    ],
)
def test_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Any, call: str, source: str, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save(case, tmp_path / "small")
    code = block("from pathlib") + block(call).replace(source, str(tmp_path / "small"))
    assert source not in code
    exec(compile(code, str(DOCUMENT), "exec"), {})
    path = next(tmp_path.glob("*/model.onnx"))
    wanted = torch_logits(model, IDS)
    other = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in other.get_inputs()}
    with Session(path) as ours:
        for run in (
            lambda feeds, names: other.run(names, feeds),
            lambda feeds, names: list(ours.run(feeds, names).values()),
        ):
            for steps in ([11], [1] * 11, [4, 7]):
                got = run_in_steps(run, shapes, IDS, steps)
                assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_module(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "shapes", raising=False)
    Path("shapes.py").write_text(block("# shapes.py"), "utf-8")
    command = re.search(r"^onnxstream_nb (export --module .*)$", DOCUMENT.read_text("utf-8"), re.M)
    assert command is not None
    assert cli.main(command[1].split()) == 0
    assert "(2 runs)" in capsys.readouterr().out
    with Session(tmp_path / "shapes.onnx") as session:
        result = session.run({"points": np.zeros((7, 4), np.float32)})
    assert result["scores"].shape == (7, 2)


def test_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    exec(compile(block("from sentencepiece"), str(DOCUMENT), "exec"), {})
    ours, theirs = load_tokenizer(tmp_path / "vocab.txt"), load_tokenizer(LLAMA)
    for text in ("Hello, world", "été \n 日本", "  two"):
        assert ours.encode(text) == theirs.encode(text)
