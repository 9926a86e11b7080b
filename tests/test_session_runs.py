"""The executor at work: stopping, freeing what is dead, several sessions, several threads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import run, saved
from session_models import DOMAIN, LOADS, Array, close_to, deep, graph_of, random

from onnxstream_nb import registry
from onnxstream_nb.errors import Interrupted, ShapeError
from onnxstream_nb.graph import Graph, Node
from onnxstream_nb.session import Session


@pytest.fixture
def declare() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Declares an operator in the domain of these tests, until the end of the test."""
    names = []

    def declare_one(name: str, function: Callable[..., Any]) -> None:
        registry.op(name, domain=DOMAIN)(function)
        names.append(name)

    registry.load_kernels()
    yield declare_one
    for name in names:
        del registry._OPERATORS[DOMAIN, name, "cpu"]


def chain(*names: str) -> Graph:
    """x -> names[0] -> ... -> y, each of the tests' own operators."""
    values = ["x", *(f"v{i}" for i in range(1, len(names))), "y"]
    return graph_of(
        *(Node(n, (values[i],), (values[i + 1],), domain=DOMAIN) for i, n in enumerate(names))
    )


def test_stopping(declare: Callable[[str, Callable[..., Any]], None]) -> None:
    stop, calls = threading.Event(), []

    def step(x: Array) -> Array:
        calls.append(len(calls))
        return x + 1

    def stopping(x: Array) -> Array:
        stop.set()
        return step(x)

    declare("Step", step)
    declare("Stop", stopping)
    session = Session(chain("Step", "Stop", "Step", "Step"))
    with pytest.raises(Interrupted):
        session.run({"x": np.zeros(3, np.float32)}, stop=stop)
    assert len(calls) == 2
    with pytest.raises(Interrupted):  # still set: not even the first step
        session.run({"x": np.zeros(3, np.float32)}, stop=stop)
    assert len(calls) == 2
    stop.clear()
    got = session.run({"x": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(got["y"], [4, 4, 4])


def test_stopping_from_another_thread(declare: Callable[[str, Callable[..., Any]], None]) -> None:
    stop, inside = threading.Event(), threading.Event()

    def slow(x: Array) -> Array:
        inside.set()
        assert stop.wait(10)
        return x

    declare("Slow", slow)
    session = Session(chain("Slow", "Slow"))
    waiter = threading.Thread(target=lambda: inside.wait(10) and stop.set())
    waiter.start()
    with pytest.raises(Interrupted):
        session.run({"x": np.zeros(1, np.float32)}, stop=stop)
    waiter.join()


@pytest.mark.parametrize("load", LOADS)
def test_stopped_while_weights_stream(
    load: str, declare: Callable[[str, Callable[..., Any]], None], tmp_path: Path
) -> None:
    model = deep(layers=5)
    x = random(3, 2, 131)
    wanted = run(model, {"x": x})["y4"]

    class Countdown(threading.Event):
        left = 0

        def is_set(self) -> bool:
            self.left -= 1
            return self.left < 0

    with Session(saved(model, tmp_path / "m.onnx"), load=load, optimize=False) as session:
        for left in (0, 1, 4, 7, 14):
            stop = Countdown()
            stop.left = left
            with pytest.raises(Interrupted):
                session.run({"x": x}, stop=stop)
            close_to(session.run({"x": x})["y4"], wanted)


def test_dead_values_are_freed(declare: Callable[[str, Callable[..., Any]], None]) -> None:
    """Inside a step only its input is alive of all that was computed before."""
    alive: list[weakref.ref[Array]] = []
    counts = []

    def grow(x: Array) -> Array:
        counts.append(sum(ref() is not None for ref in alive))
        result = x + 1
        alive.append(weakref.ref(result))
        return result

    declare("Grow", grow)
    session = Session(chain(*["Grow"] * 6))
    got = session.run({"x": np.zeros(3, np.float32)})
    assert counts == [0, 1, 1, 1, 1, 1]
    assert sum(ref() is not None for ref in alive) == 1
    del got
    assert not any(ref() for ref in alive)


def test_values_live_until_their_last_use(
    declare: Callable[[str, Callable[..., Any]], None],
) -> None:
    """a is read again at the end, b is not; of two results of a step nobody reads the second."""
    refs: dict[str, weakref.ref[Array]] = {}
    seen = []

    def noted(name: str, array: Array) -> Array:
        seen.append({n for n, ref in refs.items() if ref() is not None})
        refs[name] = weakref.ref(array)
        return array

    declare("A", lambda x: noted("a", x + 1))
    declare("B", lambda a: (noted("b", a * 2), noted("unread", a * 3)))
    declare("C", lambda b: noted("c", b + 5))
    declare("D", lambda c, a: noted("d", c + a))
    own = {"domain": DOMAIN}
    graph = graph_of(
        Node("A", ("x",), ("a",), **own), Node("B", ("a",), ("b", "unread"), **own),
        Node("C", ("b",), ("c",), **own), Node("D", ("c", "a"), ("y",), **own),
    )  # fmt: skip
    got = Session(graph).run({"x": np.full(2, 10, np.float32)})
    np.testing.assert_array_equal(got["y"], [38, 38])
    assert seen[-1] == {"a", "c"}


def test_an_error_in_an_operator_names_its_node(
    declare: Callable[[str, Callable[..., Any]], None],
) -> None:
    def broken(x: Array) -> Array:
        raise ShapeError("no good")

    declare("Broken", broken)
    session = Session(graph_of(Node("Broken", ("x",), ("y",), name="third", domain=DOMAIN)))
    with pytest.raises(ShapeError, match="no good") as caught:
        session.run({"x": np.zeros(1, np.float32)})
    assert any("third" in note and "Broken" in note for note in caught.value.__notes__)


def test_optional_inputs_and_outputs(declare: Callable[[str, Callable[..., Any]], None]) -> None:
    def pick(a: Array, b: Array | None = None, c: Array | None = None) -> tuple[Array, Array]:
        assert b is None and c is not None
        return a + 1, c + 2

    declare("Pick", pick)
    node = Node("Pick", ("x", "", "x"), ("", "y"), domain=DOMAIN)
    got = Session(graph_of(node)).run({"x": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(got["y"], [2, 2])


# -- several sessions, several threads


def test_two_sessions_interleaved(tmp_path: Path) -> None:
    models = [deep(3, 131, seed=1), deep(5, 67, seed=2)]
    widths, outputs = (131, 67), ("y2", "y4")
    paths = [saved(m, tmp_path / f"{i}.onnx") for i, m in enumerate(models)]
    sessions = [Session(paths[0], load="stream", threads=2), Session(paths[1], load="ram")]
    for rows in (1, 5, 1, 40):
        for i, session in enumerate(sessions):
            x = random(rows, rows, widths[i])
            close_to(session.run({"x": x})[outputs[i]], run(models[i], {"x": x})[outputs[i]])
    for session in sessions:
        session.close()


@pytest.mark.parametrize("load", LOADS)
def test_one_session_from_several_python_threads(load: str, tmp_path: Path) -> None:
    model = deep(4)
    inputs = [random(i, rows, 131) for i, rows in enumerate((1, 5, 1, 19))]
    wanted = [run(model, {"x": x})["y3"] for x in inputs]
    results: list[list[Array]] = [[] for _ in inputs]
    with Session(saved(model, tmp_path / "m.onnx"), load=load, threads=2) as session:

        def work(i: int) -> None:
            for _ in range(10):
                results[i].append(session.run({"x": inputs[i]})["y3"])

        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    for got, want in zip(results, wanted, strict=True):
        assert len(got) == 10
        for array in got:
            close_to(array, want)


def test_two_sessions_in_two_python_threads() -> None:
    models = [deep(3, seed=1), deep(3, seed=2)]
    x = random(0, 3, 131)
    wanted = [run(m, {"x": x})["y2"] for m in models]
    wrong = []

    def work(i: int) -> None:
        with Session(models[i], threads=2) as session:
            for _ in range(15):
                try:
                    close_to(session.run({"x": x})["y2"], wanted[i])
                except AssertionError as error:
                    wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
