"""Bad folders, a full disk and SIGKILL in front of `export`: nothing half-written is left."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from output_faults import (
    fill_up,
    interrupted,
    missing_shard,
    no_config,
    refused,
    truncated_shard,
)
from verify_models import hugging_face, verify

from onnxstream_nb import cli

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("damage", [no_config, truncated_shard, missing_shard])
def test_folders_that_cannot_be_read(
    damage: Callable[[Path], tuple[Path, str]], tmp_path: Path, capsys: Capture
) -> None:
    path, _ = damage(tmp_path / "m")
    message = refused(capsys, tmp_path, ["export", str(path), "-o", str(tmp_path / "out")])
    assert str(path) in message


def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    source, out = hugging_face(tmp_path / "m"), tmp_path / "out"
    for left in (0, 60_000):
        fill_up(monkeypatch, left, errno.ENOSPC)
        message = refused(capsys, tmp_path, ["export", str(source), "-o", str(out)])
        monkeypatch.undo()
        assert message.startswith(f"{out}: No space left on device") and "free some" in message


def test_a_killed_export_leaves_another_name(tmp_path: Path, capsys: Capture) -> None:
    source, out = hugging_face(tmp_path / "m"), tmp_path / "out"
    command = ["export", str(source), "-o", str(out)]
    code, _ = interrupted(command, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL and not out.exists()
    assert cli.main(command) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"m", "out"}
    capsys.readouterr()
    assert verify(out, capsys)["ok"]
