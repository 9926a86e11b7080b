"""bench/gpu.py, on the tests' stand-in for a GPU and without any."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import offload


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    monkeypatch.setattr(offload, "_first", offload._first)  # a dry run puts another in its place
    return importlib.import_module("gpu")


def test_a_dry_run_measures_everything(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry-run", "--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["dry_run"] and all(case["right"] for case in found["checked"])
    assert len(found["checked"]) == len(bench.TINY_ODD)
    assert [case["budget"] for case in found["decode"]] == [0, "all"]
    numbers = [c["us"] for c in found["kernels"] + found["round_trips"]]
    assert len(numbers) == 3 and all(math.isfinite(n) and n > 0 for n in numbers)
    assert any(line.startswith("take_largest") and "right" in line for line in lines)


def test_a_wrong_kernel_is_told(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = bench.fake_devices()
    right = bench.made(("norm", 2, 33))
    right.launches = lambda where: []
    monkeypatch.setattr(bench, "made", lambda sizes: right)
    given = type("Given", (), {"dry_run": True, "runs": 1})()
    assert not bench.Bench(make, given).error(("norm", 2, 33))["right"]


def test_without_a_gpu_it_says_so(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise UnsupportedError("no NVIDIA driver was found")

    monkeypatch.setattr(offload, "_first", none)
    assert bench.main([]) == 2
    assert capsys.readouterr().out == "nothing to measure: no NVIDIA driver was found\n"
