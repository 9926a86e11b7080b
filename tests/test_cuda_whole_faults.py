"""A whole model on a GPU that has too little memory, or fails: a clear word, or the same result."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from onnx import helper, numpy_helper
from onnx_models import make, value
from whole_models import CountingDevice, near, opened

from onnxstream_nb.errors import DeviceError, DeviceMemoryError, OnnxstreamError
from onnxstream_nb.gpu import offload
from onnxstream_nb.gpu.provider import CudaProvider
from onnxstream_nb.gpu.whole import WholeProvider
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.sequences import Sequences
from onnxstream_nb.session import Session

TINY = Tiny(vocab=20, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=16)
PARTS = [[3, 17], [5], [9]]
BROKEN = "a GPU of the tests: it fell off the bus"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "m.gguf"
    write_gguf(path, TINY, "F16")
    return path


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CountingDevice]:
    """A function that makes a device, which the next `--cuda` finds."""

    def made(**about: Any) -> CountingDevice:
        device = CountingDevice(**about)
        monkeypatch.setattr(offload, "_first", lambda: device)
        return device

    return made


Rows = list[np.ndarray[Any, Any]]


def read(path: Path, found: Rows | None = None, **options: Any) -> Rows:
    """The logits after each part, put to `found` as they come; the model is closed in the end."""
    found = [] if found is None else found
    llm = LanguageModel(path, precision="exact", context=32, **options)
    try:
        for part in PARTS:
            found.append(np.array(llm.feed(part)))
    finally:
        llm.close()
    return found


def whole(path: Path, found: Rows | None = None, **options: Any) -> Rows:
    return read(path, found, device="cuda", cuda="all", **options)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since it was asked the last time."""
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return lines


# -- memory


def test_what_does_not_fit_is_partly_there(
    model: Path, use: Callable[..., CountingDevice], caplog: pytest.LogCaptureFixture
) -> None:
    """A line says how much is wanted and what there is."""
    wanted = read(model)
    device = use(memory=offload.RESERVE + offload.WORK + 9000)
    near(whole(model), wanted)
    (line,) = told(caplog)
    sizes = re.findall(r"[\d.]+ [kM]?B", line)
    assert line.startswith("--cuda all: ") and device.name in line and "--context" in line
    assert len(sizes) == 3 and sizes[-1] == "9.00 kB", line
    assert device.launched and not device.held and device.closed


def test_the_context_counts(
    model: Path, use: Callable[..., CountingDevice], caplog: pytest.LogCaptureFixture
) -> None:
    use(memory=offload.RESERVE + offload.WORK + 64_000)
    for context, kind in ((32, WholeProvider), (128, WholeProvider), (4096, CudaProvider)):
        graph = replace(TINY, context=context)
        path = model.with_name(f"{context}.gguf")
        write_gguf(path, graph, "F16")
        llm = LanguageModel(path, device="cuda", cuda="all", precision="exact")
        assert isinstance(llm.session.provider, kind)
        assert len(told(caplog)) == (kind is CudaProvider)
        llm.close()


@pytest.mark.parametrize("work", [0, 700, 3000])
def test_no_room_for_what_is_computed(
    work: int, model: Path, use: Callable[..., CountingDevice],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted, device = read(model), use()
    monkeypatch.setattr(offload, "WORK", work)
    near(whole(model), wanted)
    (line,) = told(caplog)
    assert "set aside for what it computes; the CPU computes what does not fit" in line
    assert device.closed and not device.held and bool(device.launched) == (work > 0)


def test_no_memory_for_any_one_allocation(
    model: Path, use: Callable[..., CountingDevice], caplog: pytest.LogCaptureFixture
) -> None:
    """Weights and the cache cannot do without; what is computed can, and what is copied."""
    wanted, device = read(model), use()
    near(whole(model), wanted)
    ends = set()
    for number in [*range(9), *range(9, device.allocations, 12)]:
        device = use()
        device.refused = {number}
        try:
            near(whole(model), wanted)
            assert all(line.endswith("the CPU computes what does not fit") for line in told(caplog))
            ends.add("done")
        except DeviceMemoryError as error:
            assert "out of memory" in str(error) and "without --cuda" in str(error)
            ends.add("context" if "--context" in str(error) else "weights")
        assert device.closed and not device.held
    assert ends == {"weights", "context", "done"}


# -- failures


def fails(path: Path, device: CountingDevice, wanted: Rows) -> str:
    """What is said; what came before it is right."""
    found: Rows = []
    with pytest.raises(DeviceError) as caught:
        whole(path, found)
    near(found, wanted[: len(found)])
    assert device.closed and not device.held
    return str(caught.value)


def test_failing_after_any_number_of_calls(
    model: Path, use: Callable[..., CountingDevice], caplog: pytest.LogCaptureFixture
) -> None:
    wanted, device = read(model), use()
    near(whole(model), wanted)
    count, told_before = device.calls, told(caplog)
    assert count > 100 and not told_before
    for after in [*range(0, count - 1, 11), count - 2]:
        device = use(fail_after=after)
        said = fails(model, device, wanted)
        assert said.startswith(BROKEN + "; ") and said.endswith(
            "run again without --cuda, or with --cuda auto, where the CPU goes on if the GPU fails"
        )
        assert all(line.endswith(", when it was closed") for line in told(caplog))
    device = use(fail_after=count - 1)
    near(whole(model), wanted)  # it only refuses to be closed
    assert told(caplog) == [f"{BROKEN}, when it was closed"] and device.closed


def test_a_sequence_that_is_closed_after_it_failed(
    model: Path, use: Callable[..., CountingDevice]
) -> None:
    """Its memory is let go of, too, and nobody but the next pass hears of it."""
    device = use()
    llm = opened(model, context=32)
    sequences = Sequences(llm, 2)
    strands = [sequences.open(32) for _ in range(2)]
    for strand in strands:
        strand.waiting = [3, 9]
    assert len(list(sequences.step(strands))) == 2
    device.fail_after = device.calls
    while strands:
        sequences.close(strands.pop())
    del strand
    for _ in range(2):
        with pytest.raises(OnnxstreamError, match="run again without --cuda"):
            llm.feed([1])
    llm.close()
    assert not device.held


# -- graphs of other kinds


def weights_of_all_kinds() -> Any:
    """Products with a vector and with a stack of matrices, and weights that the CPU reads, too."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((64, 64)), "stack": rng.standard_normal((2, 64, 32)),
        "vector": rng.standard_normal(64), "shared": rng.standard_normal((1, 64)),
        "given": rng.standard_normal((64, 64)), "factor": rng.standard_normal((1, 64)),
    }  # fmt: skip
    weights = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "shared"], ["b"]),
        helper.make_node("Concat", ["b", "shared"], ["c"], axis=0),
        helper.make_node("Gemm", ["z", "factor"], ["g"]),
        helper.make_node("Mul", ["b", "factor"], ["h"]),
        helper.make_node("MatMul", ["b", "stack"], ["d"]),
        helper.make_node("MatMul", ["b", "vector"], ["e"]),
        helper.make_node("MatMul", ["b", "given"], ["f"]),
    ]
    outputs = [value(name, shape=None) for name in ("b", "c", "d", "e", "f", "g", "h", "given")]
    inputs = [value("x", shape=("n", 64)), value("z", shape=("n", 1))]
    return make(nodes, inputs, outputs, weights)


@pytest.mark.parametrize("cuda", ["all", "auto"])
def test_weights_that_are_read_in_other_ways(cuda: str, use: Callable[..., CountingDevice]) -> None:
    use()
    x, z = (np.random.default_rng(1).standard_normal((3, n)).astype(np.float32) for n in (64, 1))
    found = []
    for options in ({}, {"device": "cuda", "cuda": cuda}):
        with Session(weights_of_all_kinds(), precision="exact", **options) as session:
            found.append([session.run({"x": x, "z": z}) for _ in range(2)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        near(list(ours.values()), list(theirs.values()))


def test_outputs_that_stay(use: Callable[..., CountingDevice]) -> None:
    """And those that do not: each run's own."""
    use()
    with Session(weights_of_all_kinds(), device="cuda", cuda="all") as session:
        assert isinstance(session.provider, WholeProvider)
        feeds = {"x": np.ones((2, 64), np.float32), "z": np.ones((2, 1), np.float32)}
        staying = session.run(feeds, ["b"], stay=True)["b"]
        assert staying.board is session.provider.board and staying.shape == (2, 64)
        plain = session.run(feeds, ["b"])["b"]
        np.testing.assert_array_equal(np.asarray(staying), plain)
        again = session.run({**feeds, "x": staying}, ["b"])["b"]
        near([again], [session.run({**feeds, "x": plain}, ["b"])["b"]], 0)
