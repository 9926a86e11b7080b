"""A model of some products for the tests of budgets, and what budgets are made of.

Its matrices are small: such tests read pieces of PIECE bytes, so that each comes in many.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from onnx_models import make, refusal, run, saved, value

from onnxstream_nb import device
from onnxstream_nb.errors import MemoryBudgetError
from onnxstream_nb.files import room
from onnxstream_nb.loading import ARRAYS, BASE, LEAST_CHUNK, SMALLEST_CHUNK
from onnxstream_nb.session import Session
from onnxstream_nb.streaming import LEAST_PIECES

PIECE = 8192
ROWS = (150, 600, 200, 450)  # of matrices 128 wide: 76,800, 307,200, 102,400 and 230,400 bytes
BYTES = tuple(4 * 128 * n for n in ROWS)
SLOT = room(PIECE)
"""Bytes of a buffer: the longest pieces are of 13 rows of 600 bytes and 10 of 800."""


def work(k: int, n: int, chunk: int) -> int:
    """What a run of `chunk` tokens, with products of at most this size, takes beside weights."""
    return BASE + ARRAYS * chunk * (k + n) * 4


WORK = work(128, max(ROWS), LEAST_CHUNK)  # when all weights are held
LEAST = work(128, max(ROWS), SMALLEST_CHUNK) + LEAST_PIECES * SLOT  # when none are


def summed(path: Path) -> Path:
    """y = the columns of x W_i, one behind the other, for weights of several sizes."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []
    for i, n in enumerate(ROWS):
        weights.append(numpy_helper.from_array(rng.standard_normal((128, n)).astype("f4"), f"W{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"W{i}"], [f"y{i}"]))
    nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(len(ROWS))], ["y"], axis=1))
    proto = make(nodes, [value("x", shape=("n", 128))], [value("y", shape=("n", "m"))], weights)
    return saved(proto, path)


def runs(session: Session, path: Path, times: int = 2) -> None:
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    wanted = run(path, {"x": x})["y"]
    for _ in range(times):
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, rtol=0, atol=1e-4)


def least_named(call: Callable[[], Any]) -> int:
    """The budget that an error says would do."""
    message = refusal(call, MemoryBudgetError)
    assert "--ram" in message
    return device.parse_size(message.split("at least ")[1].split(" is needed")[0])
