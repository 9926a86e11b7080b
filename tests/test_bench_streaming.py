"""bench/streaming.py and what it measures with, on a model of 50 MB."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pseudo_terminal import environment
from streamed_chat import write_model
from weight_files import closing, expected, matrices, tiled

from onnxstream_nb.measure import stream_rate
from onnxstream_nb.streaming import StreamProvider

ROOT = Path(__file__).parent.parent


def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import streaming

    return streaming


def test_reading_through_reads_a_pass_and_leaves_the_stream_as_it_was(tmp_path: Path) -> None:
    refs = matrices(tmp_path / "a.bin", (64, 512), (3, 4000), (640, 64))
    with closing(StreamProvider(refs, slots=2)) as provider:
        assert provider.bytes_a_pass == sum(ref.nbytes for ref in refs)
        for _ in range(3):
            before = provider.bytes_read
            provider.read_through()
            assert provider.pass_read == provider.bytes_a_pass
            assert provider.bytes_read - before >= provider.bytes_a_pass - 2 * refs[2].nbytes
            provider.prefetch(refs)
            assert [tiled(provider, ref) for ref in refs] == [expected(ref) for ref in refs]


def test_the_rate_of_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = matrices(tmp_path / "a.bin", (64, 512), (640, 64))
    with closing(StreamProvider(refs, slots=2)) as provider:
        read = provider._ring.files.read_into

        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            return read(*arguments)

        monkeypatch.setattr(provider._ring.files, "read_into", slow)
        began = time.perf_counter()
        rate = stream_rate(provider, seconds=0.3)
        assert time.perf_counter() - began >= 0.3
        # Two buffers: at most two reads in 0.05 s.
        assert 0 < rate < 3 * max(ref.nbytes for ref in refs) / 0.05
    with closing(StreamProvider([])) as provider:
        assert stream_rate(provider) == 0.0


def test_tokens_against_the_least_that_they_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = imported(monkeypatch)
    samples = [{"seconds": s, "bytes": 3e9, "waited": 0.5} for s in (2.2, 3.3, 4.4)]
    found = streaming.against_bound(samples, [1e9, 2e9, 2e9, 1e9], 1.0)
    assert found["token_s"] == 3.3 and found["waited_s"] == 0.5
    assert found["disk_bps"] == 1.5e9 and found["reading_s"] == 2.0
    assert found["ratio"] == pytest.approx(2.2)  # of 1.1, 2.2 and 2.2
    assert streaming.against_bound(samples, [1e9, 2e9, 2e9, 1e9], 4.0)["ratio"] == 3.3 / 4.0
    alone = streaming.against_bound([{"seconds": 1.0, "bytes": 0, "waited": 0}], [0.0, 0.0], 0.0)
    assert alone["ratio"] is None and alone["computing_s"] is None


def test_budgets_go_from_the_least_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = imported(monkeypatch)

    class Least:
        def least(self) -> int:
            return 200

        def weights(self) -> int:
            return 1000

    given = streaming.arguments().parse_args([])
    assert streaming.budgets(Least(), given) == [200, 400, 600, 800, 1000, 1400]
    given = streaming.arguments().parse_args(["m", "--budgets", "200MB,2GB"])
    assert streaming.budgets(Least(), given) == [200_000_000, 2_000_000_000]


def test_the_command(tmp_path: Path) -> None:
    """A table, then JSON: each budget kept, the same logits, bytes that were really read."""
    path = write_model(tmp_path / "m.gguf", wide=True)
    command = [sys.executable, str(ROOT / "bench" / "streaming.py"), str(path), "--points", "2"]
    command += ["--prompt", "20", "--tokens", "2", "--context", "64", "--threads", "1"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert table[0].split()[:2] == ["model", "MB"] and len(table) == 3
    streamed, kept = json.loads(last)["cases"]
    assert streamed["bytes_a_pass"] > 0 == kept["bytes_a_pass"]
    for case in (streamed, kept):
        assert case["same_logits"] is True and case["within"] is True
        assert len(case["samples"]) == 2 and len(case["rates"]) == 3
        assert case["ratio"] > 0 and case["prompt"]["passes"] == 1
    assert all(s["bytes"] >= 0.9 * streamed["bytes_a_pass"] for s in streamed["samples"])
    assert streamed["disk_bps"] > 1e6 and not kept["disk_bps"]
