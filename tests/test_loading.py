"""How `load` and `ram` choose where weights come from, and what a budget promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx_models import make, refusal, run, saved, value

from onnxstream_nb import device, loading
from onnxstream_nb.errors import MemoryBudgetError, UsageError
from onnxstream_nb.loading import WORK
from onnxstream_nb.session import Session
from onnxstream_nb.weights import BudgetProvider, MmapProvider, PrefetchProvider, RamProvider

ROWS = (150, 600, 200, 450)  # of matrices 128 wide: 76,800, 307,200, 102,400 and 230,400 bytes
BYTES = tuple(4 * 128 * n for n in ROWS)
WINDOW = 2 * max(BYTES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = sum of W_i x over weights of several sizes."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []
    for i, n in enumerate(ROWS):
        weights.append(numpy_helper.from_array(rng.standard_normal((128, n)).astype("f4"), f"W{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"W{i}"], [f"y{i}"]))
    nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(len(ROWS))], ["y"], axis=1))
    proto = make(nodes, [value("x", shape=("n", 128))], [value("y", shape=("n", "m"))], weights)
    return saved(proto, tmp_path / "m.onnx")


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes no memory itself, so that budgets are exact."""
    monkeypatch.setattr(device, "current_rss", lambda: 0)


def runs(session: Session, path: Path, times: int = 2) -> None:
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    wanted = run(path, {"x": x})["y"]
    for _ in range(times):
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("load", "kind"),
    [("stream", PrefetchProvider), ("mmap", MmapProvider), ("ram", RamProvider)],
)
def test_by_name(load: str, kind: type[Any], model: Path) -> None:
    with Session(model, load=load) as session:
        assert type(session.provider) is kind
        runs(session, model)


def test_bytes_read_by_each_kind(model: Path) -> None:
    for load, passes in (("stream", 3), ("ram", 1)):
        with Session(model, load=load) as session:
            runs(session, model, times=3)
            assert session.provider.bytes_read == passes * sum(BYTES)


def test_unknown_kind(model: Path) -> None:
    message = refusal(lambda: Session(model, load="disk"), UsageError)
    assert "'disk'" in message and "stream" in message and "mmap" in message


def test_budget_and_mmap(model: Path) -> None:
    message = refusal(lambda: Session(model, load="mmap", ram=10**12), UsageError)
    assert "--ram" in message and "mmap" in message


def test_auto_maps_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_available", lambda: 10**11)
    with Session(model) as session:
        assert isinstance(session.provider, MmapProvider)
        runs(session, model)


@pytest.mark.parametrize("reserve", [0, 123_456])
def test_auto_streams_what_does_not_fit(
    reserve: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "current_rss", lambda: 10**9)
    needed = WORK + reserve + sum(BYTES)
    monkeypatch.setattr(device, "memory_available", lambda: int(needed / 0.9) + 2)
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, MmapProvider)
    monkeypatch.setattr(device, "memory_available", lambda: int((needed - 10) / 0.9))
    with Session(model, reserve=reserve) as session:
        assert isinstance(session.provider, BudgetProvider)
        runs(session, model)


@pytest.mark.parametrize("load", ["auto", "stream", "ram"])
def test_generous_budget_keeps_everything(load: str, model: Path, no_base: None) -> None:
    with Session(model, load=load, ram=WORK + sum(BYTES)) as session:
        assert isinstance(session.provider, RamProvider)
        runs(session, model, times=3)
        assert session.provider.bytes_read == sum(BYTES)


@pytest.mark.parametrize(
    ("room", "kept"),
    [(WINDOW, 0), (WINDOW + BYTES[0] - 1, 0), (WINDOW + BYTES[0], BYTES[0]),
     (sum(BYTES) - 1, BYTES[0])],
)  # fmt: skip
def test_a_budget_pins_what_fits_beside_the_stream(
    room: int, kept: int, model: Path, no_base: None
) -> None:
    with Session(model, ram=WORK + 777 + room, reserve=777) as session:
        assert isinstance(session.provider, BudgetProvider)
        runs(session, model, times=3)
        assert session.provider.bytes_read == kept + 3 * (sum(BYTES) - kept)


def test_an_impossible_budget_names_the_least(model: Path, no_base: None) -> None:
    for ram in (1, WORK, WORK + WINDOW - 1):
        message = refusal(lambda n=ram: Session(model, ram=n), MemoryBudgetError)
        assert "--ram" in message and "at least" in message
    with Session(model, ram=WORK + WINDOW) as session:
        runs(session, model)


@pytest.mark.parametrize("base", [0, 1_111_111, 36_449_999, 163_949_999])
def test_the_least_that_is_named_is_enough(
    base: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is rounded to, following the advice works."""
    monkeypatch.setattr(device, "current_rss", lambda: base)
    message = refusal(lambda: Session(model, ram=1), MemoryBudgetError)
    least = message.split("at least ")[1].split(" is needed")[0]
    with Session(model, ram=device.parse_size(least)) as session:
        runs(session, model, times=1)


def test_a_single_weight_needs_no_room_for_two(tmp_path: Path, no_base: None) -> None:
    weight = np.ones((128, 200), np.float32)
    proto = make(
        [helper.make_node("MatMul", ["x", "W"], ["y"])], [value("x", shape=("n", 128))],
        [value("y", shape=("n", 200))], [numpy_helper.from_array(weight, "W")],
    )  # fmt: skip
    path = saved(proto, tmp_path / "m.onnx")
    message = refusal(lambda: Session(path, ram=WORK + weight.nbytes - 1), MemoryBudgetError)
    least = device.parse_size(message.split("at least ")[1].split(" is needed")[0])
    assert WORK + weight.nbytes <= least <= 1.02 * (WORK + weight.nbytes)
    with Session(path, ram=WORK + weight.nbytes) as session:
        runs(session, path)


def test_tied_weights_count_once(tmp_path: Path, no_base: None) -> None:
    table = np.random.default_rng(0).standard_normal((400, 130)).astype(np.float32)
    proto = make(
        [helper.make_node("MatMul", names[:2], names[2:])
         for names in (["x", "W", "a"], ["a", "V", "b"], ["b", "W", "y"])],
        [value("x", shape=("n", 400))], [value("y", shape=("n", 130))],
        [numpy_helper.from_array(table, "W"),
         numpy_helper.from_array(np.ascontiguousarray(table.T), "V")],
    )  # fmt: skip
    with Session(saved(proto, tmp_path / "m.onnx"), ram=WORK + 2 * table.nbytes) as session:
        assert isinstance(session.provider, RamProvider)
        assert session.plan.weight_bytes == 2 * table.nbytes
        assert [ref.name for ref in session.plan.weights] == ["W", "V", "W"]


def test_a_model_without_weights() -> None:
    proto = make([helper.make_node("Neg", ["x"], ["y"])], [value("x")], [value("y")])
    for load in ("auto", "stream", "mmap", "ram"):
        with Session(proto, load=load) as session:
            np.testing.assert_array_equal(session.run({"x": np.ones(3, "f4")})["y"], -np.ones(3))
    assert "at least" in refusal(lambda: Session(proto, ram=1), MemoryBudgetError)


def test_the_stream_never_holds_more_than_its_share(
    model: Path, no_base: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of weights alive, what the running operator reads included, stay in the window."""
    import weakref

    from onnxstream_nb import weights

    alive = most = 0
    original: Callable[..., Any] = weights._Files.read

    def gone(nbytes: int) -> None:
        nonlocal alive
        alive -= nbytes

    def read(files: Any, ref: Any) -> Any:
        nonlocal alive, most
        alive += ref.nbytes
        most = max(most, alive)
        buffer = original(files, ref)
        weakref.finalize(buffer, gone, ref.nbytes)
        return buffer

    monkeypatch.setattr(weights._Files, "read", read)
    with Session(model, ram=WORK + WINDOW, optimize=False) as session:
        runs(session, model, times=20)
    assert 0 < most <= WINDOW
    assert loading.WORK > 0
