"""bench/convert.py on a small model, and the sources that it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from verify_models import gguf

from onnxstream_nb import formats

ROOT = Path(__file__).parent.parent
GEOMETRY = {
    "vocab": 64, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48,
    "rope_theta": 1e4, "context": 128, "tied_embeddings": False, "norm_epsilon": 1e-5,
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import convert

    monkeypatch.setattr(convert, "PROBE", convert.PIECE)
    return convert


def test_a_route_of_a_file(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Others than those that begin with a GGUF are left out; nothing stays on the disk."""
    path, folder = gguf(tmp_path, "F16"), tmp_path / "disk"
    line = [str(path), "--routes", "onnx fp16", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["convert.py", *line])
    bench.main()
    *table, last = capfd.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["model", "route", "peak"] and len(table) == 2
    document = json.loads(last)
    (case,) = document["cases"]
    assert case["route"] == "gguf->onnx fp16" and case["code"] == 0
    assert case["read_bytes"] == path.stat().st_size
    assert case["written_bytes"] > 60_000 and case["largest_file_bytes"] < case["written_bytes"]
    assert 30e6 < case["peak_bytes"] < 1e9 and case["seconds"] > 0
    least = case["read_bytes"] / case["read_bps"] + case["written_bytes"] / case["write_bps"]
    assert case["disk_s"] == pytest.approx(least)
    assert document["disk_read_bps"] > 0 and list(folder.iterdir()) == []


def test_a_folder_of_safetensors_is_read(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_folder

    monkeypatch.setattr(hf_folder, "SHARD", 9000)
    hf_folder.write_folder(tmp_path, GEOMETRY)
    graph = formats.load(tmp_path)
    assert graph.metadata["context_length"] == 128
    assert len({ref.source for ref in graph.initializers.values()}) > 2


def test_routes_by_parts_of_their_names(bench: Any) -> None:
    assert bench.routes("int4,onnxstream") == [
        "gguf->onnx int4", "gguf->onnxstream fp16", "onnx->onnxstream fp16",
    ]  # fmt: skip
    assert bench.Sources("mistral-7b@2", Path()).routes(["a", "b"]) == ["a", "b"]
