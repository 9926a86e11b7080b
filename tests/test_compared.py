"""What an exported model is held against: PyTorch's results, here given by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.convert.draft import Draft
from onnxstream_nb.convert.pytorch import compared
from onnxstream_nb.convert.pytorch.compared import LIMIT, difference
from onnxstream_nb.convert.pytorch.exporters import Case
from onnxstream_nb.convert.pytorch.tied import tied
from onnxstream_nb.errors import ModelError, UnsupportedError
from onnxstream_nb.formats.onnx import write
from onnxstream_nb.graph import Graph, Node, Value
from onnxstream_nb.passes.rewriting import constant_ref
from onnxstream_nb.session import Session, decode_constant

X = np.array([1, 2, -8], np.float32)


def case(wanted: Any) -> Case:
    """Of a graph that doubles."""
    return Case({"x": X, "unused": X}, {"y": np.array(wanted, np.float32)})


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    value = Value("x", "float32", ("n",))
    node = Node("Add", ("x", "x"), ("y",))
    graph = Graph((node,), (value,), (Value("y", "float32", ("n",)),), {}, {"": 14})
    write(graph, path, read=decode_constant)
    return path


def test_the_largest_difference(doubling: Path) -> None:
    apart = 0.5 * LIMIT * 16
    found = difference(doubling, [case([2, 4, -16]), case([2, 4, -16 - apart])])
    assert found.absolute == pytest.approx(apart, rel=1e-2)
    assert (found.largest, found.output, found.runs) == (pytest.approx(16, rel=1e-3), "y", 2)
    assert found.relative == pytest.approx(0.5 * LIMIT, rel=1e-2)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([2, 4, -16.1], "y is 0.1 away from PyTorch's, whose largest element is 16.1"),
        ([2, 4], r"y has the shape \(3,\), and PyTorch's \(2,\): a size that should be open"),
        ([2, 4, np.inf], "y has infinities or NaN where PyTorch's has none, or the reverse"),
        ([2, np.nan, -16], "y has infinities or NaN"),
    ],
)
def test_what_is_too_far_away(doubling: Path, wanted: list[float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        difference(doubling, [case([2, 4, -16]), case(wanted)])


def test_what_cannot_run_here_is_computed_by_the_standards_reference(
    doubling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedError("no Add")

    assert difference(doubling, [case([2, 4, -16])]).unsupported == ""
    monkeypatch.setattr(compared, "Session", refuse)
    found = difference(doubling, [case([2, 4, -16])])
    assert (found.unsupported, found.absolute) == ("no Add", 0.0)
    with pytest.raises(ModelError, match="away from PyTorch's"):
        difference(doubling, [case([2, 4, -17])])


def tables(copy: np.ndarray[Any, Any], head: Node) -> Draft:
    """An embedding of 40 rows of 3, and a head over `copy`."""
    table = np.arange(120, dtype=np.float32).reshape(40, 3)
    refs = {"table": constant_ref("table", table), "copy": constant_ref("copy", copy)}
    nodes = (Node("Gather", ("table", "ids"), ("rows",)), head)
    ids, logits = Value("ids", "int64", ("n",)), Value("logits", "float32", ("n", 40))
    return Draft(Graph(nodes, (ids,), (logits,), refs, {"": 14}))


TABLE = np.arange(120, dtype=np.float32).reshape(40, 3)
MATMUL = Node("MatMul", ("rows", "copy"), ("logits",))
GEMM = Node("Gemm", ("rows", "copy"), ("logits",), {"transB": 1})


@pytest.mark.parametrize(("copy", "head"), [(TABLE.T, MATMUL), (TABLE, GEMM)], ids=["T", "same"])
def test_a_table_that_is_there_twice_becomes_one(copy: Any, head: Node) -> None:
    draft = tables(np.ascontiguousarray(copy), head)
    once = tied(draft)
    assert once.graph.initializers.keys() == {"table"}
    feeds = {"ids": np.array([3, 39, 0])}
    with Session(draft.graph) as before, Session(once.graph) as after:
        np.testing.assert_array_equal(after.run(feeds)["logits"], before.run(feeds)["logits"])


def test_a_matrix_with_one_other_bit_stays() -> None:
    other = TABLE.T.copy()
    other[2, 39] = np.nextafter(other[2, 39], np.float32(0))
    draft = tables(other, MATMUL)
    assert tied(draft) is draft
