"""The flag --keep-packed, and the commands that count and delete what it keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from packed_models import Tied, only_file

from onnxstream_nb import cli, hub, llm, measure
from onnxstream_nb.cli.commands import loading
from onnxstream_nb.cli.main import parse
from onnxstream_nb.cli.verbs import VERBS
from onnxstream_nb.device import format_size
from onnxstream_nb.errors import Interrupted
from onnxstream_nb.hub import store
from onnxstream_nb.packed_file import DIGITS, PackedFile, verify

TINY = Tiny(vocab=99, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, layers=1)

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of packed weights; compiled kernels stay where they are."""
    for name in [n for n in os.environ if n.startswith("ONNXSTREAM_")]:
        if name != "ONNXSTREAM_CACHE":
            monkeypatch.delenv(name)
    for module in (hub, store):
        monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "packed"


@pytest.mark.parametrize("verb", ["chat", "generate", "bench", "perplexity"])
def test_every_command_that_runs_a_model_has_the_flag(
    verb: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert "keep_packed" in [option.name for option in VERBS[verb].options]
    needed = {"generate": ["--prompt", "p"], "perplexity": ["--text", "t"]}.get(verb, [])
    assert parse(verb, ["m", *needed], {})["keep_packed"] is False
    assert parse(verb, ["m", *needed, "--keep-packed"], {})["keep_packed"] is True
    assert parse(verb, ["m", *needed], {"ONNXSTREAM_KEEP_PACKED": "1"})["keep_packed"] is True


def test_it_names_the_folder_in_the_cache(cache: Path) -> None:
    assert loading(parse("chat", ["m", "--keep-packed"], {}))["packed"] == cache
    assert loading(parse("chat", ["m"], {}))["packed"] is None
    assert hub.packed_dir() == cache


def bench(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    arguments = ["bench", str(path), "-p", "8", "-n", "2", "-r", "1", "--json", *flags]
    assert cli.main(arguments) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_run_keeps_packed_weights_and_doctor_counts_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "bandwidth_reader", lambda *_: lambda: 1e9)
    path = tmp_path / "m.gguf"
    write_gguf(path, TINY, "Q8_0")
    without = bench(path, capsys)
    assert not cache.exists()
    for load in ("auto", "stream"):
        document = bench(path, capsys, "--keep-packed", "--load", load)
        assert document["size_bytes"] == without["size_bytes"]
    verify(only_file(cache))
    assert cli.main(["doctor", "--json"]) == 0
    (check,) = (c for c in json.loads(capsys.readouterr().out) if c["subject"] == "packed weights")
    assert check["state"] == "ok"
    assert check["detail"] == format_size(only_file(cache).stat().st_size)


def test_rm_deletes_what_is_kept_of_a_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    mine, other = Tied(tmp_path, "q8_0"), Tied(tmp_path / "b", "q8_0")
    mine.logits(packed=cache)
    size = only_file(cache).stat().st_size
    other.logits(packed=cache)
    here = hub.Installed("some/model", mine.path, 1000, True)

    def remove(name: str) -> int:
        mine.path.unlink()
        return 1000

    monkeypatch.setattr(hub, "installed", lambda: [here])
    monkeypatch.setattr(hub, "remove", remove)
    assert cli.main(["rm", "some/model", "--yes"]) == 0
    assert capsys.readouterr().out == f"freed {format_size(1000 + size)}\n"
    before = only_file(cache).stat().st_mtime_ns
    other.logits(packed=cache)
    assert only_file(cache).stat().st_mtime_ns == before


def test_random_weights_leave_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the measurement ends too soon."""
    made: list[Path] = []

    def keep(graph: Any, *, packed: Path, **_: Any) -> Any:
        refs = [r for r in graph.initializers.values() if isinstance(r.source, Path)]
        file = PackedFile(packed, refs, lambda ref: 64, "stamp")
        packed.mkdir(parents=True)
        file.path.write_bytes(file.header(["0" * DIGITS] * len(file.refs)) + bytes(file.size))
        made.append(file.path)
        raise Interrupted("enough")

    monkeypatch.setattr(llm, "LanguageModel", keep)
    arguments = ["bench", "smollm2-135m", "--random-weights", "--dtype", "q4_0", "--keep-packed"]
    assert cli.main(arguments) == 2
    assert "enough" in capsys.readouterr().err
    assert len(made) == 1 and list(cache.iterdir()) == []
