"""Models of which matrices lie on a GPU, which acts late and may fail."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb.errors import UsageError
from onnxstream_nb.gpu import found, offload
from onnxstream_nb.gpu.provider import CudaProvider
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import Session

TINY = Tiny(vocab=41, hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=16)
PROMPT, WRITTEN = [3, 9, 40], [5, 9, 2]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    made = FakeDevice(memory=1 << 30)
    monkeypatch.setattr(offload, "_first", lambda: made)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "m.gguf", TINY, "F16")
    return tmp_path / "m.gguf"


def logits(path: Path, **options: Any) -> list[Any]:
    """Of a prompt, and of tokens one after the other: the later ones are replayed."""
    llm = LanguageModel(path, precision="exact", **options)
    found = [llm.feed(PROMPT), *(llm.feed([token]) for token in WRITTEN)]
    llm.close()
    return found


def near(found: list[Any], wanted: list[Any]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("load", ["ram", "stream", "mmap"])
def test_all_matrices_on_the_gpu(load: str, model: Path, device: FakeDevice) -> None:
    wanted = logits(model, load="ram")
    near(logits(model, load=load, device="cuda"), wanted)
    layers = 7 * TINY.layers
    assert len(device.launched) >= (layers + 1) * (1 + len(WRITTEN))


def test_a_budget_places_some_and_the_cpu_has_the_others(model: Path, device: FakeDevice) -> None:
    wanted = logits(model, load="ram")
    with Session(model, device="cuda", cuda=40_000) as session:
        provider = session.provider
        assert isinstance(provider, CudaProvider) and 20_000 < provider.nbytes <= 40_000
        held = {ref.matrix for ref in session.plan.weights}
        assert held  # the plan is of all weights, whoever has them
    near(logits(model, device="cuda", cuda=40_000), wanted)


def test_products_of_one_input_overlap(model: Path, device: FakeDevice) -> None:
    """Nothing is waited for before the gate and the up projection are both under way."""
    llm = LanguageModel(model, device="cuda", precision="exact")
    llm.feed(PROMPT)
    under_way: list[int] = []
    synchronize = device.synchronize

    def watched(stream: int) -> None:
        under_way.append(sum(1 for queue in device._queues.values() if queue))
        synchronize(stream)

    device.synchronize = watched  # type: ignore[method-assign]
    for token in WRITTEN:
        llm.feed([token])
    llm.close()
    assert max(under_way) >= 3


@pytest.mark.parametrize("after", [0, 1, 7, 40, 90])
def test_a_gpu_that_fails_is_replaced(
    after: int, model: Path, device: FakeDevice, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = logits(model, load="ram")
    llm = LanguageModel(model, device="cuda", precision="exact")
    device.fail_after = device.calls + after
    found = [llm.feed(PROMPT), *(llm.feed([token]) for token in WRITTEN)]
    near(found, wanted)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"{device.name}: it fell off the bus; the CPU goes on alone"
    ]


def test_without_a_gpu_one_line_is_said_and_the_cpu_used(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "driver_version", lambda: None)
    wanted = logits(model)
    ours = logits(model, device="cuda")
    assert all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("--cuda: ") and ("driver" in line or "pip install" in line)


@pytest.mark.parametrize("cuda", [-1, "many", "-3GB"])
def test_a_budget_that_means_nothing_is_refused(
    cuda: int | str, model: Path, device: FakeDevice
) -> None:
    with pytest.raises(UsageError, match="--cuda"):
        Session(model, device="cuda", cuda=cuda)
    with pytest.raises(UsageError, match="cpu, cuda, not 'tpu'"):
        Session(model, device="tpu")
