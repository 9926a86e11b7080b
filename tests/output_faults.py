"""Damaged sources, full disks and signals for whatever writes a model, and what is left then."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from verify_models import exported, gguf, hugging_face, spoil

from onnxstream_nb import cli
from onnxstream_nb.convert.folder import OutputFile

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder, and the files' sizes."""
    return {
        str(p.relative_to(folder)): p.stat().st_size if p.is_file() else -1
        for p in folder.rglob("*")
    }


def refused(capsys: Capture, folder: Path, command: list[str]) -> str:
    """The message of a command that fails and leaves `folder` as it is."""
    before = listing(folder)
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    *_, message = err.splitlines()
    assert message.startswith("error: ") and "Traceback" not in err and out == ""
    assert listing(folder) == before
    return message.removeprefix("error: ")


def fill_up(monkeypatch: pytest.MonkeyPatch, left: int, code: int) -> None:
    """From now on, a conversion can write so many bytes; then the system refuses with `code`."""
    append = OutputFile._append

    def full(self: OutputFile, view: memoryview) -> None:
        nonlocal left
        left -= len(view)
        if left < 0:
            raise OSError(code, os.strerror(code))
        append(self, view)

    monkeypatch.setattr(OutputFile, "_append", full)


def limited(command: list[str], most: int) -> subprocess.CompletedProcess[str]:
    """A command line in a process that may write files of so many bytes at most."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    return subprocess.run(
        [sys.executable, "-m", "onnxstream_nb", *command],
        capture_output=True, text=True, timeout=300, preexec_fn=limit, cwd=ROOT, check=False,
    )  # fmt: skip


def no_config(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    (path / "config.json").unlink()
    return path, f"{path}: no model in this folder; looked for"


def unknown_architecture(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["MysteryForCausalLM"]
    (path / "config.json").write_text(json.dumps(config))
    return path, "MysteryForCausalLM"


def unknown_gguf(folder: Path) -> tuple[Path, str]:
    folder.mkdir()
    path = gguf(folder)
    return spoil(path, lambda data: put(data, b"llama", b"mamba", every=True)), "'mamba'"


def truncated_shard(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    shard = path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    return path, f"{shard}: the tensors end at byte"


def missing_shard(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    (path / "model-00001-of-00002.safetensors").unlink()
    return path, "its weights file 'model-00001-of-00002.safetensors' is missing"


def wrong_index(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    index = path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name, shard = next(iter(found["weight_map"].items()))
    other = next(s for s in found["weight_map"].values() if s != shard)
    found["weight_map"][name] = other
    index.write_text(json.dumps(found))
    return path, f"{path / other}: tensor '{name}' is missing, although"


def index_without_a_map(folder: Path) -> tuple[Path, str]:
    path = hugging_face(folder)
    index = path / "model.safetensors.index.json"
    index.write_text("{}")
    return path, f"{index}: weight_map does not map"


def truncated_gguf(folder: Path) -> tuple[Path, str]:
    folder.mkdir()
    path = gguf(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path, "tensor 'output.weight' ends at byte"


def missing_data(folder: Path) -> tuple[Path, str]:
    path = exported(folder)
    path.with_name("model.onnx.data").unlink()
    return path, "its weights file 'model.onnx.data' is missing"


def put(data: bytearray, old: bytes, new: bytes, *, every: bool = False) -> None:
    assert len(old) == len(new) and old in data
    data[:] = data.replace(old, new, -1 if every else 1)


SLOW = """
import sys, time
from onnxstream_nb import cli
from onnxstream_nb.convert.folder import OutputFile
append = OutputFile._append

def slow(self, view):
    append(self, view)
    time.sleep(0.05)

OutputFile._append = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def interrupted(command: list[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """A conversion that gets a signal while it writes; its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not any(p.is_file() and p.stat().st_size for p in folder.glob(".*.partial/*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return process.returncode, said
    finally:
        process.kill()
        process.wait()
