"""`export --module`: other PyTorch modules, both exporters, and factories that are wrong."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, on import and use

from onnxstream_nb import cli  # noqa: E402
from onnxstream_nb.formats import load  # noqa: E402

HEADER = "import torch\nfrom torch import nn\n"
CNN = """
def factory():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
    net[1].running_mean.normal_()
    return net, (torch.randn(2, 3, 8, 8),), {
        "input_names": ["image"], "output_names": ["scores"],
        "dynamic_axes": {"image": {0: "batch"}},
    }
"""
LSTM = """
class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, frames, scale):
        states, (last, _) = self.lstm(frames * scale)
        return {"tags": self.head(states), "last": [last, None]}

def factory():
    torch.manual_seed(0)
    return Tagger(), [torch.randn(1, 9, 6), torch.ones(1)], {
        "dynamic_axes": {"frames": {1: "time"}},
    }
"""
FIXED = """
def factory():
    torch.manual_seed(0)
    return nn.Linear(4, 3), torch.randn(2, 4)
"""
_NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module into the working directory: its name."""
    monkeypatch.chdir(tmp_path)

    def write(source: str) -> str:
        name = f"exported_package_{next(_NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(HEADER + textwrap.dedent(source), "utf-8")
        return name

    return write


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["export", *arguments, "-o", "out", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["relative_difference"] < 1e-5
    return document


@pytest.mark.parametrize("exporter", ["opset14", "opset23"])
def test_a_convolutional_network(
    package: Any, capsys: pytest.CaptureFixture[str], exporter: str
) -> None:
    if exporter == "opset23":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    name = package(CNN)
    done = export(capsys, "--module", f"{name}:factory", "--exporter", exporter)
    assert done["runs"] == 2  # as in the example, and with one image more
    graph = load(Path("out"))
    assert [(v.name, v.shape) for v in graph.inputs] == [("image", ("batch", 3, 8, 8))]
    assert [(v.name, v.shape) for v in graph.outputs] == [("scores", ("scores_0", 5))]
    assert "BatchNormalization" not in {node.op_type for node in graph.nodes}  # folded
    net, _, _ = __import__(name).factory()
    images = torch.randn(5, 3, 8, 8)
    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(["scores"], {"image": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, net.eval()(images).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("exporter", ["opset14", "opset23"])
def test_a_recurrent_network_with_results_in_a_dict(
    package: Any, capsys: pytest.CaptureFixture[str], exporter: str
) -> None:
    if exporter == "opset23":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    name = package(LSTM)
    export(capsys, "--module", f"{name}:factory", "--exporter", exporter, "--dtype", "fp16")
    graph = load(Path("out"))
    assert [v.name for v in graph.inputs] == ["frames", "scale"]
    assert [(v.name, v.shape) for v in graph.outputs] == [
        ("output0", (1, "output0_1", 4)), ("output1", (2, 1, 24)),
    ]  # fmt: skip
    assert Counter(node.op_type for node in graph.nodes)["LSTM"] == 1
    assert "Cast" in {node.op_type for node in graph.nodes}  # stored as float16


def test_fixed_sizes_and_a_single_tensor(package: Any, capsys: pytest.CaptureFixture[str]) -> None:
    done = export(capsys, "--module", f"{package(FIXED)}:factory")
    assert (done["runs"], done["dtype"]) == (1, "fp32")
    graph = load(Path("out"))
    assert [(v.name, v.shape) for v in graph.inputs] == [("input", (2, 4))]
    assert [(v.name, v.shape) for v in graph.outputs] == [("output", (2, 3))]


LINEAR = "nn.Linear(4, 3), torch.randn(2, 4)"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("nn.Linear(4, 3)", "it must return (module, inputs) or, third, a dict"),
        ("print, torch.randn(2, 4)", "the first of what it returns is no torch.nn.Module"),
        ("nn.Linear(4, 3), [[1.0]]", "the second of what it returns is no tuple of tensors"),
        (f"{LINEAR}, {{'names': []}}", "the third of what it returns is no dict of dynamic_axes"),
        (f"{LINEAR}, {{'input_names': ['a', 'b']}}", "2 input_names, and 1 example inputs"),
        (f"{LINEAR}, {{'output_names': []}}", "0 output_names, and 1 results"),
        (f"{LINEAR}, {{'dynamic_axes': {{'input': {{2: 'n'}}}}}}", "dynamic_axes of input is no"),
        (f"{LINEAR}, {{'dynamic_axes': {{'input': {{1: 'n'}}}}}}", "one larger its forward fails"),
    ],
)
def test_factories_that_are_wrong(
    package: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    returned: str,
    message: str,
) -> None:
    name = package(f"def factory():\n    return {returned}\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert cli.main(["export", "--module", f"{name}:factory", "-o", "out"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --module {name}:factory: ")
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_at_all:factory", "No module named 'nowhere_at_all'; it is looked for in "),
        ("json:nothing", "json has no function 'nothing'"),
        ("json", "give it as pkg:factory"),
    ],
)
def test_names_that_lead_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", "--module", name, "-o", str(out)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: --module {name}: {message}")
    assert not out.exists()
