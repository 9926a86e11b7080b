"""The yardstick of decoding: it reads every byte once, and says the mean of its speeds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.kernels import bandwidth as module
from onnxstream_nb.kernels.bandwidth import CHUNK, bandwidth_reader, read_memory_fast
from onnxstream_nb.kernels.threads import team_of


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunks", [0, 1, 3, 100, 4099])
def test_every_byte_is_read_once(threads: int, chunks: int) -> None:
    buffer = np.ones(chunks * CHUNK // 4 + 16, np.float32)
    crew, sums = team_of(threads), np.zeros((64, 16), np.float32)
    crew.run([(read_memory_fast, buffer.ctypes.data, chunks * CHUNK, sums.ctypes.data)])
    assert sums.sum() == chunks * CHUNK // 4


def test_the_speed_is_a_mean_over_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read of each call is not counted: it wakes the threads."""
    asked: list[Any] = []

    class Crew:
        shares = 4

        def run(self, rows: list[Any]) -> None:
            asked.extend(rows)

    ticks = iter([0, 9, 10, 11, 20, 22, 30, 33, 40, 49, 50, 52] * 2)
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(module, "team_of", lambda threads: Crew())
    monkeypatch.setattr(module, "time", clock)
    read = bandwidth_reader(1030, 2)
    assert [read(), read()] == [1024 * 5 / 17] * 2
    assert len({row[1] for row in asked}) == 1 and {row[2] for row in asked} == {1024}
