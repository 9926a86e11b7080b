"""The executor: what it takes, what it refuses, what it gives back, and what it lets go."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import make, refusal, run, saved, value
from session_models import LOADS, close_to, deep, graph_of, random

from onnxstream_nb import trace
from onnxstream_nb.errors import (
    ModelError,
    OnnxstreamError,
    ShapeError,
    UnsupportedError,
    UsageError,
)
from onnxstream_nb.formats import load_bytes
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.session import Session

SMALL, LARGE = (3,), (131, 257)


@pytest.fixture
def typed() -> Session:
    """y = x + [1, 2, 3], n = 2 i, with inputs of several types."""
    model = make(
        [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Add", ["i", "i"], ["n"])],
        [value("x", shape=("batch", 3)), value("i", TensorProto.INT64, (2,))],
        [value("y", shape=("batch", 3)), value("n", TensorProto.INT64, (2,))],
        [numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w")],
    )
    return Session(model)


def feeds(**changes: Any) -> dict[str, Any]:
    usual = {"x": np.zeros((5, 3), np.float32), "i": np.array([4, 5])}
    return {k: v for k, v in (usual | changes).items() if v is not None}


# -- feeds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, r"missing \['x'\]; the model's inputs are x, i"),
        ({"x": None, "i": None}, r"missing \['x', 'i'\]"),
        ({"z": 1}, r"unknown \['z'\]; the model's inputs are x, i"),
        ({"x": np.zeros((5, 3))}, "input x: got float64, the model takes float32"),
        ({"i": np.zeros(2, np.int32)}, "input i: got int32, the model takes int64"),
        ({"i": [1.5, 2]}, "input i: got float64, the model takes int64"),
        ({"x": "text"}, "input x: got <U4, the model takes float32"),
        ({"x": np.zeros(3, np.float32)}, r"x: got shape \(3,\), the model takes \('batch', 3\)"),
        ({"x": np.zeros((1, 5, 3), np.float32)}, r"got shape \(1, 5, 3\)"),
        (
            {"x": np.zeros((5, 4), np.float32)},
            r"got shape \(5, 4\), the model takes \('batch', 3\)",
        ),
        ({"i": np.array(4)}, r"input i: got shape \(\), the model takes \(2,\)"),
        ({"i": np.array([4])}, r"input i: got shape \(1,\), the model takes \(2,\)"),
    ],
)
def test_wrong_feeds(typed: Session, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        typed.run(feeds(**changes))
    np.testing.assert_array_equal(typed.run(feeds())["n"], [8, 10])  # and it still runs


@pytest.mark.parametrize("batch", [0, 1, 2, 1031])
def test_right_feeds(typed: Session, batch: int) -> None:
    x = random(batch, batch, 3)
    got = typed.run({"x": x, "i": [7, -1]})  # lists are arrays too
    assert list(got) == ["y", "n"]
    np.testing.assert_array_equal(got["y"], x + np.array([1, 2, 3], np.float32))
    np.testing.assert_array_equal(got["n"], [14, -2])
    assert got["y"].dtype == np.float32 and got["n"].dtype == np.int64


def test_feeds_may_be_laid_out_as_they_like() -> None:
    with Session(deep()) as session:
        x = random(1, 131, 10)
        wanted = session.run({"x": np.ascontiguousarray(x.T)})["y2"]
        np.testing.assert_array_equal(session.run({"x": x.T})["y2"], wanted)
        wide = np.zeros((20, 262), np.float32)
        wide[::2, ::2] = x.T
        np.testing.assert_array_equal(session.run({"x": wide[::2, ::2]})["y2"], wanted)
        wide.setflags(write=False)
        np.testing.assert_array_equal(session.run({"x": wide[::2, ::2]})["y2"], wanted)


def test_feeds_are_not_written_to() -> None:
    x = random(1, 7, 131)
    before = x.copy()
    with Session(deep()) as session:
        session.run({"x": x})
    np.testing.assert_array_equal(x, before)


def test_sizes_that_do_not_fit_each_other() -> None:
    """The declared shapes allow it, the operator does not: the message names the node."""
    node = helper.make_node("Add", ["a", "b"], ["y"], name="the sum")
    model = make([node], [value("a"), value("b")], [value("y")])
    session = Session(model)
    with pytest.raises(OnnxstreamError) as caught:
        session.run({"a": np.zeros(3, np.float32), "b": np.zeros(4, np.float32)})
    assert "the sum" in " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


# -- outputs


def test_outputs_are_selected(typed: Session) -> None:
    assert list(typed.run(feeds(), ["n"])) == ["n"]
    assert list(typed.run(feeds(), ["n", "y"])) == ["n", "y"]
    assert list(typed.run(feeds(), ())) == []
    with pytest.raises(UsageError, match="no such output: w, z"):
        typed.run(feeds(), ["z", "y", "w"])


def test_inputs_and_outputs_are_described(typed: Session) -> None:
    assert typed.inputs == (
        Value("x", "float32", ("batch", 3)),
        Value("i", "int64", (2,)),
    )
    assert [v.name for v in typed.outputs] == ["y", "n"]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("load", LOADS)
def test_initializers_as_outputs(load: str, optimize: bool, tmp_path: Path) -> None:
    arrays = {"small": random(0, *SMALL), "large": random(1, *LARGE),
              "half": random(2, 300, 200).astype(np.float16)}  # fmt: skip
    kinds = {"half": TensorProto.FLOAT16}
    model = make(
        [helper.make_node("Neg", ["small"], ["negative"])],
        [],
        [value(n, kinds.get(n, 1), a.shape) for n, a in arrays.items()]
        + [value("negative", shape=SMALL)],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    with Session(saved(model, tmp_path / "m.onnx"), load=load, optimize=optimize) as session:
        for _ in range(2):
            got = session.run({})
            for name, array in arrays.items():
                np.testing.assert_array_equal(got[name], array)
                assert got[name].dtype == array.dtype
                got[name][...] = 9  # the caller's to change, and not the model
            np.testing.assert_array_equal(got["negative"], -arrays["small"])


@pytest.mark.parametrize("optimize", [True, False])
def test_outputs_computed_from_constants_are_the_callers_own(optimize: bool) -> None:
    w = random(0, 6)
    model = make(
        [helper.make_node("Identity", ["w"], ["same"]),
         helper.make_node("Reshape", ["w", "shape"], ["folded"])],
        [], [value("same", shape=(6,)), value("folded", shape=(2, 3))],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([2, 3]), "shape")],
    )  # fmt: skip
    session = Session(model, optimize=optimize)
    for _ in range(2):
        got = session.run({})
        np.testing.assert_array_equal(got["same"], w)
        np.testing.assert_array_equal(got["folded"], w.reshape(2, 3))
        for array in got.values():
            array[...] = 9


def test_an_input_passed_straight_to_an_output() -> None:
    model = make(
        [helper.make_node("Neg", ["x"], ["y"])],
        [value("x"), value("unused")],
        [value("x"), value("y")],
    )
    x = random(0, 5)
    got = Session(model).run({"x": x, "unused": x})
    np.testing.assert_array_equal(got["x"], x)
    np.testing.assert_array_equal(got["y"], -x)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_result_is_not_a_view_of_a_feed(optimize: bool) -> None:
    model = make(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [value("x", shape=(6,))], [value("y", shape=(2, 3))],
        [numpy_helper.from_array(np.array([2, 3]), "shape")],
    )  # fmt: skip
    x = random(0, 6)
    got = Session(model, optimize=optimize).run({"x": x})["y"]
    kept = got.copy()
    x[...] = 9
    np.testing.assert_array_equal(got, kept)


def test_a_graph_of_nothing_but_wires() -> None:
    graph = Graph((), (Value("x", "float32", None),), (Value("x", "float32", None),), {}, {"": 21})
    x = random(0, 2, 3)
    np.testing.assert_array_equal(Session(graph).run({"x": x})["x"], x)


def test_a_result_does_not_change_when_the_session_runs_again() -> None:
    with Session(deep()) as session:
        for rows in (1, 1, 9, 9):
            first = session.run({"x": random(0, rows, 131)})["y2"]
            copy = first.copy()
            session.run({"x": random(1, rows, 131)})
            np.testing.assert_array_equal(first, copy)


# -- models


def test_every_form_of_a_model(tmp_path: Path) -> None:
    model = deep()
    x = random(7, 3, 131)
    wanted = run(model, {"x": x})["y2"]
    path = saved(model, tmp_path / "m.onnx")
    data = model.SerializeToString()
    for form in (model, data, path, str(path), load_bytes(data), tmp_path):
        with Session(form) as session:
            close_to(session.run({"x": x})["y2"], wanted)


def test_models_that_are_none(tmp_path: Path) -> None:
    assert "nothing" in refusal(lambda: Session(tmp_path / "nothing"), ModelError)
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "empty" in refusal(lambda: Session(str(tmp_path / "empty.onnx")), ModelError)
    refusal(lambda: Session(b"garbage"), ModelError)


def test_unsupported_operators_are_all_named() -> None:
    nodes = (
        Node("Wobble", ("x",), ("a",), domain="com.acme"),
        Node("Relu", ("a",), ("b",)),
        Node("Jiggle", ("b",), ("y",)),
    )
    message = refusal(lambda: Session(graph_of(*nodes)), UnsupportedError)
    assert "Wobble" in message and "Jiggle" in message and "Relu" not in message


def test_operator_of_a_later_opset() -> None:
    node = Node("RMSNormalization", ("x", "x"), ("y",))
    assert "RMSNormalization" in refusal(lambda: Session(graph_of(node)), UnsupportedError)


def test_unknown_attribute() -> None:
    node = Node("Relu", ("x",), ("y",), {"slope": 0.5}, name="the node")
    message = refusal(lambda: Session(graph_of(node)), UnsupportedError)
    assert "the node" in message and "Relu" in message and "slope" in message


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_against_onnxruntime(load: str, threads: int, rows: int, tmp_path: Path) -> None:
    model = deep(layers=5)
    path = saved(model, tmp_path / "m.onnx")
    with Session(path, load=load, threads=threads) as session:
        for seed in range(3):
            x = random(seed, rows, 131)
            close_to(session.run({"x": x})["y4"], run(model, {"x": x})["y4"])


def test_external_data_is_streamed(tmp_path: Path) -> None:
    model = deep()
    wanted = run(model, {"x": random(0, 2, 131)})["y2"]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=1000)
    for load in LOADS:
        with Session(tmp_path / "m.onnx", load=load) as session:
            for _ in range(2):
                close_to(session.run({"x": random(0, 2, 131)})["y2"], wanted)


# -- options


def test_options_that_mean_nothing() -> None:
    model = deep()
    for threads in (0, -1):
        message = refusal(lambda n=threads: Session(model, threads=n), UsageError)
        assert "threads" in message
    assert "abacus" in refusal(lambda: Session(model, device="abacus"), UsageError)


def test_plan_as_text(tmp_path: Path) -> None:
    with Session(saved(deep(), tmp_path / "m.onnx"), optimize=False) as session:
        lines = session.describe().splitlines()
    assert [line.split()[1] for line in lines] == ["MatMul", "Add", "Relu"] * 3
    assert [int(line.split()[0]) for line in lines] == list(range(9))
    assert "x, W0:raw[131, 257] -> p0" in lines[0]
    assert Session(graph_of(outputs=("x",))).describe() == ""


def test_trace_counts_operators_and_bytes() -> None:
    with Session(deep(), optimize=False) as session:
        session.run({"x": random(0, 2, 131)})  # not recorded
        with trace.tracing() as record:
            for _ in range(2):
                session.run({"x": random(0, 2, 131)})
    assert {name: total.calls for name, total in record.totals.items()} == {
        "MatMul": 6, "Add": 6, "Relu": 6,
    }  # fmt: skip
    assert record.totals["MatMul"].nbytes == 2 * 3 * 131 * 257 * 4
    assert all(total.seconds > 0 for total in record.totals.values())
    assert "MatMul" in record.table()


# -- letting go


def _open_files(path: Path) -> int:
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.exists() and link.resolve() == path for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to count open files")
@pytest.mark.parametrize("load", LOADS)
def test_closing_lets_go_of_files_and_threads(load: str, tmp_path: Path) -> None:
    path = saved(deep(), tmp_path / "m.onnx")
    Session(path, load=load).close()  # before its first run; and the thread team has started
    with Session(path, load=load) as session:
        session.run({"x": random(0, 1, 131)})
        assert _open_files(path) > 0
        threads = {t for t in threading.enumerate() if "_work" in t.name}
    assert _open_files(path) == 0
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert sum(t.is_alive() for t in threads) <= len(threads) - (load == "stream")
    session.close()  # twice does no harm


def test_weights_in_memory_are_not_copied_by_planning() -> None:
    """A model given as bytes keeps its weights where they are."""
    graph = load_bytes(deep().SerializeToString())
    assert all(isinstance(ref, WeightRef) for ref in graph.initializers.values())
    with Session(graph) as session:
        assert set(session.plan.constants) <= {"b0", "b1", "b2"}
        assert session.plan.weight_bytes == 3 * 131 * 257 * 4


def test_no_such_thing_as_an_error_without_a_remedy(typed: Session) -> None:
    """What a user may meet is one family, so that the command line prints one line."""
    for call in (
        lambda: typed.run({}),
        lambda: typed.run(feeds(), ["q"]),
        lambda: Session("no/such/file.onnx"),
    ):
        with pytest.raises(OnnxstreamError) as caught:
            call()
        assert re.search(r"\w{3}", str(caught.value))
