"""A graph whose weights are made when they are read."""

from __future__ import annotations

import numpy as np
import pytest

from onnxstream_nb.convert.draft import Draft, placeholder
from onnxstream_nb.graph import Graph, WeightRef

STORED = np.arange(6, dtype=np.float16).reshape(3, 2)


def graph(*refs: WeightRef) -> Graph:
    return Graph((), (), (), {ref.name: ref for ref in refs}, {"": 21})


def test_stored_weights_are_decoded_and_others_made() -> None:
    data = STORED.tobytes()
    stored = WeightRef("w", (2, 3), "float32", data, 0, len(data), "float16", transposed=True)
    made = placeholder("q", "int8", (2,))
    draft = Draft(graph(stored, made), {"q": lambda: np.array([1, -2], np.int8)})
    assert draft.read(stored).dtype == np.float32
    np.testing.assert_array_equal(draft.read(stored), STORED.T)
    np.testing.assert_array_equal(draft.read(made), [1, -2])


def test_what_a_graph_does_not_use_is_dropped() -> None:
    first, second = placeholder("a", "int8", ()), placeholder("b", "int8", ())
    draft = Draft(graph(first), {"a": lambda: np.int8(1)})
    draft = draft.with_(graph(second), {"b": lambda: np.int8(2)})
    assert draft.made.keys() == {"b"} and draft.read(second) == 2


def test_a_value_that_nothing_makes_is_no_empty_array() -> None:
    with pytest.raises(ValueError):
        Draft(graph()).read(placeholder("a", "float32", (3,)))
