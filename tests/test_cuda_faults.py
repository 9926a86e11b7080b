"""A GPU that fails, or has no memory left, at any time of a short generation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice
from llama_fixtures import write_gguf
from llama_oracle import Tiny

from onnxstream_nb.errors import ModelError
from onnxstream_nb.gpu import offload
from onnxstream_nb.gpu.device import DeviceError
from onnxstream_nb.gpu.offload import open_gpu
from onnxstream_nb.gpu.provider import CudaProvider
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.session import Session
from onnxstream_nb.weights import Weight

TINY = Tiny(vocab=20, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=16)
BUDGET = 5000  # bytes: three of eight matrices, which have integers and scales
PROMPT = [3, 17]
BROKEN = "a GPU of the tests: it fell off the bus"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "m.gguf"
    write_gguf(path, TINY, "Q8_0")
    return path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDevice]:
    """A function that makes a device, which the next `--cuda` finds."""

    def made(**about: Any) -> FakeDevice:
        device = FakeDevice(memory=1 << 30, **about)
        monkeypatch.setattr(offload, "_first", lambda: device)
        return device

    return made


def generated(model: Path, **options: Any) -> tuple[list[int], list[Any], int]:
    """Greedy ids, the logits they were taken from, and the bytes that lay on the GPU."""
    llm = LanguageModel(model, precision="exact", context=16, **options)
    placed = llm.gpu_bytes
    logits = [llm.feed(PROMPT)]
    for _ in range(2):  # of which the second is replayed
        logits.append(llm.feed([int(np.argmax(logits[-1]))]))
    llm.close()
    return [int(np.argmax(each)) for each in logits], logits, placed


def partly(model: Path, load: str = "ram") -> tuple[list[int], list[Any], int]:
    return generated(model, load=load, device="cuda", cuda=BUDGET)


def same(found: tuple[list[int], list[Any], int], wanted: tuple[list[int], list[Any], int]) -> None:
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since it was asked the last time."""
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return lines


@pytest.mark.parametrize("load", ["ram", "stream"])
def test_failing_after_any_number_of_calls(
    load: str, model: Path, use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    """While weights are placed, while products run, and when it is closed at last."""
    wanted, whole = generated(model, load=load), use()
    same(found := partly(model, load), wanted)
    assert 0 < found[2] <= BUDGET and len(whole.launched) == 9 and not told(caplog)
    assert whole.calls > 60
    for after in range(whole.calls):
        device = use(fail_after=after)
        same(partly(model, load), wanted)
        last = after == whole.calls - 1
        end = ", when it was closed" if last else "; the CPU goes on alone"
        assert told(caplog) == [BROKEN + end]
        assert device.closed and not device.held


def test_no_memory_for_any_one_allocation(
    model: Path, use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    """One matrix, or one product, is the CPU's; all others stay the GPU's."""
    wanted, whole = generated(model), use()
    placed = partly(model)[2]
    for number in range(whole.allocations):
        device = use()
        device.refused = {number}
        same(found := partly(model), wanted)
        (line,) = told(caplog)
        if number < 6:  # of three matrices, integers and scales
            assert line.endswith("out of memory; 1 of 3 matrices that were to lie there stay with "
                                 "the CPU")  # fmt: skip
            assert 0 < found[2] < placed and len(device.launched) == 6
        else:
            assert line.endswith("out of memory; the CPU computes what does not fit")
            assert found[2] == placed and len(device.launched) == 8
        assert device.closed and not device.held


def test_a_gpu_that_fails_while_weights_are_placed_is_let_go_of_at_once(
    model: Path, use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    device = use(fail_after=9)
    with Session(model, device="cuda") as session:
        assert device.closed and not device.held and session.gpu_bytes == 0
        provider = session.provider
        assert isinstance(provider, CudaProvider)
        for ref in session.plan.weights:
            assert isinstance(provider.get(ref), Weight)
    assert told(caplog) == [BROKEN + "; the CPU goes on alone"]


@pytest.mark.parametrize("seed", range(12))
def test_no_memory_at_random(
    seed: int, model: Path, use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    wanted, device, rng = generated(model), use(), np.random.default_rng(seed)
    device.refused = set(np.flatnonzero(rng.random(500) < rng.uniform(0.02, 0.5)).tolist())
    same(partly(model), wanted)
    lines = told(caplog)
    assert all("out of memory; " in line for line in lines)
    assert len(lines) == len({line.rpartition("matrices")[1] for line in lines})
    assert device.closed and not device.held


def test_no_memory_for_anything_is_one_line(
    model: Path, use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    wanted, device = generated(model), use()
    device.refused = set(range(1000))
    same(found := partly(model), wanted)
    assert found[2] == 0 and told(caplog) == [
        "a GPU of the tests: out of memory; 3 of 3 matrices that were to lie there stay with the "
        "CPU"
    ]


def test_a_gpu_without_room_is_let_go_of(
    use: Callable[..., FakeDevice], caplog: pytest.LogCaptureFixture
) -> None:
    device = use()
    device.memory = offload.RESERVE + offload.WORK
    assert open_gpu("auto") is None and device.closed
    assert told(caplog) == [
        "--cuda: a GPU of the tests: too little memory is free; the CPU is used"
    ]


def test_a_gpu_that_fails_when_it_is_asked_what_is_free(
    use: Callable[..., FakeDevice],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = use(fail_after=0)

    def free() -> int:
        raise DeviceError(BROKEN)

    monkeypatch.setattr(device, "free", free)
    assert open_gpu(10**9) is None and device.closed
    assert told(caplog) == [f"--cuda: {BROKEN}; the CPU is used"]


def test_none_of_its_memory_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_first", lambda: pytest.fail("it was looked for"))
    assert open_gpu(0) is None


def test_what_is_no_fault_of_the_gpu_is_raised_and_the_gpu_let_go_of(
    model: Path, use: Callable[..., FakeDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = use()

    def damaged(self: CudaProvider, ref: Any) -> None:
        raise ModelError("the file ends amid a matrix")

    monkeypatch.setattr(CudaProvider, "_place", damaged)
    with pytest.raises(ModelError, match="ends amid"):
        Session(model, device="cuda")
    assert device.closed
