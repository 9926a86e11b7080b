"""What the tests of the hub share: a running server, temporary caches, other processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, Repository

ROOT = Path(__file__).parent.parent
REPO = "owner/model"
USAGE = namedtuple("USAGE", "total used free")


def data(name: str, size: int) -> bytes:
    """Bytes that depend on the name alone."""
    return random.Random(name).randbytes(size)


def shards() -> Repository:
    """A safetensors folder: small files kept in git, two shards, and files not needed."""
    names = {
        "config.json": 300,
        "tokenizer.json": 5000,
        "README.md": 200,
        "pytorch_model.bin": 4000,
    }
    names |= {f"model-0000{i}-of-00002.safetensors": 600_000 + i for i in (1, 2)}
    return Repository({name: data(name, size) for name, size in names.items()})


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This program's cache and the hub's in a temporary folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("ONNXSTREAM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process talks to (it reads HF_ENDPOINT when imported)."""
    from huggingface_hub import close_session, constants

    with Hub() as running:
        use_endpoint(monkeypatch, running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running
        close_session()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def environment(running: Hub, caches: Path, **more: str) -> dict[str, str]:
    """What another process is started with: the variables a user sets."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return plain | {
        "HF_ENDPOINT": running.endpoint,
        "HF_HOME": str(caches / "hf"),
        "ONNXSTREAM_CACHE": str(caches / "ours"),
        "PYTHONPATH": str(ROOT),
        **more,
    }


def start(name: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Resolve a name in another process, which prints the path or the error."""
    code = (
        "import sys\n"
        "from onnxstream_nb import hub\n"
        "from onnxstream_nb.errors import OnnxstreamError\n"
        "try: print(hub.resolve(sys.argv[1]).path)\n"
        "except OnnxstreamError as error: sys.exit(f'{type(error).__name__}: {error}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def check_folder(path: Path, repository: Repository) -> None:
    """The needed files are there with their bytes, and nothing else is."""
    needed = ["config.json", FIRST, SECOND, "tokenizer.json"]
    assert sorted(p.name for p in path.iterdir()) == needed
    assert all((path / name).read_bytes() == repository.files[name] for name in needed)
