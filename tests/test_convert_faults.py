"""Bad input, full disks, Ctrl-C and SIGKILL in front of `convert` and `quantize`, as a user meets
them: one line that names what is wrong, and nothing under the output's name."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from output_faults import (
    fill_up,
    index_without_a_map,
    interrupted,
    limited,
    listing,
    missing_data,
    missing_shard,
    no_config,
    refused,
    truncated_gguf,
    truncated_shard,
    unknown_architecture,
    unknown_gguf,
    wrong_index,
)
from verify_models import exported, gguf, perceptron, place_of, spoil, verify, with_manifest

from onnxstream_nb import cli
from onnxstream_nb.convert.folder import OutputFile

pytestmark = [
    pytest.mark.usefixtures("one_thread_afterwards"),
    pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX"),
]

Capture = pytest.CaptureFixture[str]
TEXT = Path(__file__).parent / "fixtures" / "public_domain.txt"

COMMANDS: dict[str, tuple[str, ...]] = {
    "convert": ("convert",),
    "convert to OnnxStream": ("convert", "--to", "onnxstream"),
    "convert to int4": ("convert", "--dtype", "int4"),
    "quantize": ("quantize", "--dtype", "int8"),
}


def line(name: str, source: Path, out: Path, *flags: str) -> list[str]:
    verb, *rest = COMMANDS[name]
    return [verb, str(source), "-o", str(out), *rest, *flags]


# -- sources


SOURCES = [no_config, unknown_architecture, unknown_gguf, truncated_shard, missing_shard,
           wrong_index, index_without_a_map, truncated_gguf, missing_data]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("damage", SOURCES)
def test_sources_that_cannot_be_read(
    damage: Callable[[Path], tuple[Path, str]], name: str, tmp_path: Path, capsys: Capture
) -> None:
    path, message = damage(tmp_path / "m")
    for out in ("out", "out.onnx") if "OnnxStream" not in name else ("out",):
        assert message in refused(capsys, tmp_path, line(name, path, tmp_path / out))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_source_that_is_not_there(name: str, tmp_path: Path, capsys: Capture) -> None:
    missing = tmp_path / "missing.gguf"
    assert "missing.gguf" in refused(capsys, tmp_path, line(name, missing, tmp_path / "out"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_source_that_shrinks_while_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The header was right when it was looked at."""
    source = gguf(tmp_path)
    _, offset, _ = place_of(source, "output.weight")
    write = OutputFile.write

    def shrinking(self: OutputFile, data: object) -> None:
        os.truncate(source, offset + 100)
        write(self, data)  # type: ignore[arg-type]

    monkeypatch.setattr(OutputFile, "write", shrinking)
    whole = source.read_bytes()
    before = listing(tmp_path).keys()
    assert cli.main(line(name, source, tmp_path / "out")) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: {source}: ") and ("truncated" in err or "damaged" in err)
    assert listing(tmp_path).keys() == before
    monkeypatch.undo()
    source.write_bytes(whole)
    assert cli.main(line(name, source, tmp_path / "out")) == 0


# -- outputs


@pytest.mark.parametrize("name", COMMANDS)
def test_outputs_that_are_refused(name: str, tmp_path: Path, capsys: Capture) -> None:
    folder = with_manifest(exported(tmp_path / "m").parent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("precious")
    source = folder / "model.onnx"
    for out, flags, message in (
        (tmp_path / "mine", (), "exists; name another output, or give --overwrite"),
        (tmp_path / "mine", ("--overwrite",), "deletes a folder only if it holds a manifest.json"),
        (folder, ("--overwrite",), "the model that is read lies there"),
        (tmp_path / "none" / "out", (), "there is no folder"),
    ):
        assert message in refused(capsys, tmp_path, line(name, source, out, *flags))
    assert (tmp_path / "mine" / "letters.txt").read_text() == "precious"
    verb, *rest = COMMANDS[name]
    assert "-o" in refused(capsys, tmp_path, [verb, str(source), *rest])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("code", "share"),
    [(errno.ENOSPC, 0.0), (errno.ENOSPC, 0.6), (errno.EDQUOT, 1.0), (errno.EIO, 0.5)],
)
def test_a_disk_that_fills_up(
    name: str, code: int, share: float, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    """At the first byte, amid the weights, or at the last file; a former output stays."""
    source, out = gguf(tmp_path), tmp_path / "out"
    assert cli.main(line(name, source, out)) == 0
    capsys.readouterr()
    former = {p.name: p.read_bytes() for p in out.iterdir()}
    for place, flags in ((tmp_path / "new", ()), (out, ("--overwrite",))):
        fill_up(monkeypatch, int(share * sum(map(len, former.values()))) - 10, code)
        message = refused(capsys, tmp_path, line(name, source, place, *flags))
        monkeypatch.undo()
        assert str(place) in message and os.strerror(code) in message
        assert ("free some, or name" in message) == (code != errno.EIO)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == former


@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_a_limit_on_files(name: str, tmp_path: Path) -> None:
    """The system's own error, in a process of its own."""
    source, out = gguf(tmp_path), tmp_path / "out"
    before = listing(tmp_path)

    done = limited(line(name, source, out), 20_000)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: {out}: File too large") and "free some" in message
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_without_room_is_told_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from onnxstream_nb.convert import folder

    monkeypatch.setattr(folder, "disk_free", lambda path: 1000)
    message = refused(capsys, tmp_path, line(name, gguf(tmp_path), tmp_path / "out"))
    assert "this disk has 1.00 kB free; free some" in message


# -- Ctrl-C, SIGKILL


@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_ctrl_c_leaves_nothing(name: str, tmp_path: Path) -> None:
    source = gguf(tmp_path)
    before = listing(tmp_path)
    code, said = interrupted(line(name, source, tmp_path / "out"), tmp_path, signal.SIGINT)
    assert code == 130 and said.endswith("interrupted\n") and "Traceback" not in said
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["convert to OnnxStream", "quantize"])
def test_what_a_killed_process_leaves_has_another_name(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    """And the next conversion to that name removes it."""
    source, out = gguf(tmp_path), tmp_path / "out"
    before = set(tmp_path.iterdir())
    code, _ = interrupted(line(name, source, out), tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL and not out.exists()
    (left,) = set(tmp_path.iterdir()) - before
    assert left.name.startswith(".out.") and left.suffix == ".partial"
    assert cli.main(line(name, source, out)) == 0
    assert set(tmp_path.iterdir()) - before == {out}
    capsys.readouterr()
    assert verify(out, capsys)["ok"]


# -- calibration


def words(path: Path, count: int) -> Path:
    path.write_text(" ".join(["the quick brown fox"] * count), "utf-8")
    return path


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibration_texts_that_will_not_do(method: str, tmp_path: Path, capsys: Capture) -> None:
    source, out = gguf(tmp_path), tmp_path / "out"
    short, latin = words(tmp_path / "short.txt", 1), tmp_path / "latin.txt"
    latin.write_bytes("naïve".encode("latin-1") * 100)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    for text, message in (
        (short, "give a longer one"),
        (empty, "give a longer one"),
        (latin, "UTF-8"),
        (tmp_path / "missing.txt", "No such file"),
    ):
        flags = ("--method", method, "--calibration", str(text))
        found = refused(capsys, tmp_path, line("quantize", source, out, *flags))
        assert str(text) in found and message in found, text
    found = refused(capsys, tmp_path, line("quantize", source, out, "--method", method))
    assert "--calibration" in found


def test_calibration_without_a_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    path = exported(tmp_path / "m")
    (path.parent / "tokenizer.json").unlink()
    flags = ("--method", "gptq", "--calibration", str(TEXT))
    message = refused(capsys, tmp_path, line("quantize", path, tmp_path / "out", *flags))
    assert "no tokenizer" in message


def test_weights_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    """They have no scale."""
    source = gguf(tmp_path)
    file, offset, _ = place_of(source, "blk.0.ffn_up.weight")
    spoil(file, lambda data: data.__setitem__(slice(offset, offset + 4), b"\x00\x00\xc0\x7f"))
    message = refused(capsys, tmp_path, line("quantize", source, tmp_path / "out"))
    assert "blk.0.ffn_up.weight" in message


def test_a_single_file_beyond_two_gibibytes(tmp_path: Path, capsys: Capture) -> None:
    """Refused by its size, which no weight has to be read for: the file is sparse."""
    path = perceptron(tmp_path)
    model = onnx.load(path)
    rows = 1 << 20
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.TensorProto(name="w", data_type=1, dims=[3, rows * 200]))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(12 * rows * 200)
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = rows * 200
    path.write_bytes(model.SerializeToString())
    message = refused(capsys, tmp_path, ["convert", str(path), "-o", str(tmp_path / "one.onnx")])
    assert "2" in message and "folder" in message
    assert np.prod([3, rows, 200]) * 4 > 1 << 31
