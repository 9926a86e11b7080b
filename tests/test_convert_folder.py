"""The output of a conversion: complete under its name, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onnxstream_nb.convert import folder as folders
from onnxstream_nb.convert.folder import OutputFile, output_folder
from onnxstream_nb.errors import OutputError, UsageError

DATA = {"model.onnx": b"graph", "weights.data": bytes(range(256)) * 5000, "empty": b""}


def fill(out: Path, data: dict[str, bytes] = DATA, **options: Any) -> None:
    """An output of these files, written in two pieces each."""
    with output_folder(out, **options) as folder:
        for name, content in data.items():
            with folder.file(name) as file:
                file.write(content[:100])
                file.write(memoryview(content)[100:])


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_files_are_what_was_written_and_the_manifest_is_true(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert manifest["format"] == 1 and manifest["producer"].startswith("onnxstream_nb ")
    assert names(tmp_path / "out") == sorted([*DATA, "manifest.json"])
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(DATA.items())
    }
    assert {name: (tmp_path / "out" / name).read_bytes() for name in DATA} == DATA


def test_a_single_file(tmp_path: Path) -> None:
    fill(tmp_path / "out.onnx", single="model.onnx")
    assert names(tmp_path) == ["out.onnx"] and (tmp_path / "out.onnx").read_bytes() == b"graph"


def test_an_existing_output_is_refused_at_once_and_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    with pytest.raises(UsageError, match=r"out exists.*--overwrite"):
        fill(out)
    with pytest.raises(UsageError, match="exists"), output_folder(tmp_path / "late"):
        (tmp_path / "late").mkdir()
    assert names(tmp_path) == ["late", "out"]


def test_overwriting_replaces_at_the_end_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    with output_folder(out, overwrite=True) as folder:
        folder.write_text("new", "text")
        assert (out / "model.onnx").is_file()
    assert names(out) == ["manifest.json", "new"] and names(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), output_folder(out, overwrite=True):
        raise RuntimeError
    assert names(out) == ["manifest.json", "new"] and names(tmp_path) == ["out"]


def test_overwriting_deletes_no_folder_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("dear")
    with pytest.raises(UsageError, match=r"manifest\.json"):
        fill(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letters").read_text() == "dear"


def test_overwriting_deletes_no_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(UsageError, match=r"letters: --overwrite.*a file"):
        fill(tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters").read_text() == "dear"


def test_links(tmp_path: Path) -> None:
    """A link counts as an output that exists, even one to nowhere; what it leads to is kept."""
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"):
        fill(tmp_path / "out")
    fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", {"new": b"x"}, overwrite=True)
    assert names(tmp_path / "link") == ["manifest.json", "new"]
    assert "model.onnx" in names(tmp_path / "real")


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    for source in (tmp_path / "model", tmp_path / "model" / "model.onnx"):
        with pytest.raises(UsageError, match="another output"):
            fill(tmp_path / "model", overwrite=True, source=source)


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder .*nowhere"):
        fill(tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError()])
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), output_folder(tmp_path / "out") as folder:  # noqa: PT012
        folder.write_text("complete", "text")
        with folder.file("begun") as file:
            file.write(b"x" * 1000)
            raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    append = OutputFile._append

    def full(self: OutputFile, view: memoryview) -> None:
        if self.size > 1000:
            raise OSError(number, os.strerror(number))
        append(self, view)

    monkeypatch.setattr(OutputFile, "_append", full)
    with (
        pytest.raises(OutputError, match=r"out: .*2.00 GB.* free;.*another disk"),
        output_folder(tmp_path / "out") as folder,
    ):  # noqa: PT012
        folder.needed = 2_000_000_000
        with folder.file("weights") as file:
            for _ in range(100):
                file.write(bytes(100))
    assert names(tmp_path) == []


def test_a_disk_too_small_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "disk_free", lambda path: 1_000_000)
    with (
        pytest.raises(OutputError, match=r"takes 5.00 MB, and .* 1.00 MB free"),
        output_folder(tmp_path / "out") as folder,
    ):
        folder.reserve(5_000_000)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OutputError, match=r"out cannot be written \(Permission denied\)"):
        fill(tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "out-of-here/tokenizer.json", "out.gguf"])
def test_errors_of_other_files_stay_what_they_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out") as folder:
        folder.copy(tmp_path / name)
    assert names(tmp_path) == []


WRITING = """
import sys, time
from pathlib import Path
from onnxstream_nb.convert.folder import output_folder
with output_folder(Path(sys.argv[1])) as folder:
    with folder.file("weights") as file:
        file.write(bytes(5000))
        print("writing", flush=True)
        time.sleep(60)
"""


def writing(out: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing an output."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended(tmp_path: Path, sent: signal.Signals) -> None:
    """Killed, it leaves a folder that the next one clears; interrupted, none. One that lives is
    not disturbed."""
    out = tmp_path / "out"
    with writing(out) as process:
        assert names(tmp_path) == [f".out.{process.pid}.partial"]
        with pytest.raises(OutputError, match=f"process {process.pid} is writing"):
            fill(out)
        process.send_signal(sent)
        process.wait(60)
    assert not out.exists()
    assert names(tmp_path) == ([] if sent == signal.SIGINT else [f".out.{process.pid}.partial"])
    fill(out)
    assert names(tmp_path) == ["out"]


def test_what_was_about_to_be_replaced_is_put_back(tmp_path: Path) -> None:
    """A process that ended between two renames."""
    fill(tmp_path / "out")
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                             capture_output=True, text=True, check=True)  # fmt: skip
    time.sleep(0.01)
    (tmp_path / "out").rename(tmp_path / f".out.{int(process.stdout)}.replaced")
    with pytest.raises(UsageError, match="exists"):
        fill(tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "model.onnx").is_file()
