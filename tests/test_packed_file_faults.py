"""Files of packed weights that are stale, damaged, cut short or cannot be written.

In each case a session's results are what they are without such a file, and what is left behind is
a file that is whole, or none.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernel_oracles import Array
from onnx_models import refusal
from packed_models import Shipped, Tied, file_of, matrices, only_file, packer
from packing_models import stored

from onnxstream_nb import packed_file, packed_weights
from onnxstream_nb.errors import Interrupted, ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.kernels import packing as kernel_packing
from onnxstream_nb.packed_file import PackedFile, read_header, verify

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")


class Kept:
    """A model with its file of packed weights, and the logits without."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.tied, self.folder = Tied(folder, "q4_0"), folder / "p"
        self.wanted = self.tied.logits(load="ram")
        assert np.array_equal(self.logits(), self.wanted)
        self.path, self.log = only_file(self.folder), caplog
        assert caplog.messages == []

    def logits(self, **options: Any) -> Array:
        return self.tied.logits(packed=self.folder, **options)

    def file(self) -> PackedFile:
        return file_of(self.tied.model.graph, self.folder)

    def assert_anew(self, line: str) -> None:
        """The next session writes one file, saying so in one line, and the one after uses it."""
        assert np.array_equal(self.logits(), self.wanted)
        assert only_file(self.folder) == self.file().path
        verify(self.file().path)
        (message,) = self.log.messages
        assert line in message and "anew" in message
        before = self.file().path.stat()
        assert np.array_equal(self.logits(), self.wanted)
        assert self.file().path.stat() == before and len(self.log.messages) == 1


@pytest.fixture
def kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Kept:
    return Kept(tmp_path, caplog)


# -- stale or damaged ------------------------------------------------------------------------------


def test_the_model_has_changed(kept: Kept) -> None:
    """Other weights of the same size in the same place."""
    model = kept.tied.model
    head = model.graph.initializers["head"]
    raw = stored("q4_0", model.vocabulary, model.width, 9)
    data = bytearray(model.path.read_bytes())
    data[head.offset : head.offset + head.nbytes] = raw.tobytes()
    model.path.write_bytes(data)
    wanted = kept.tied.logits(load="ram")
    assert not np.array_equal(wanted, kept.wanted)
    kept.wanted = wanted
    kept.assert_anew("a file of the model has changed")
    assert kept.file().path != kept.path


def test_only_the_time_of_the_model_has_changed(kept: Kept) -> None:
    os.utime(kept.tied.path, ns=(10**18, 10**18 + 1))
    kept.assert_anew("a file of the model has changed")


def test_another_version_packed_them(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_packing, "LAYOUT", ("panels", "quads"))
    kept.assert_anew("packed by another version")


def test_another_version_of_the_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "VERSION", 2)
    monkeypatch.setattr(packed_weights, "VERSION", 2)
    kept.assert_anew("packed by another version")


def test_the_stamp_follows_the_files_that_say_what_panels_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packer = kernel_packing.Packer()
    before = packer.stamp
    assert before == kernel_packing.Packer().stamp
    source = Path(kernel_packing.__file__)
    for name in kernel_packing.LAYOUT:
        (tmp_path / f"{name}.py").write_bytes(source.with_name(f"{name}.py").read_bytes())
    monkeypatch.setattr(kernel_packing, "__file__", str(tmp_path / "packing.py"))
    assert packer.stamp == before
    for name in kernel_packing.LAYOUT:
        path = tmp_path / f"{name}.py"
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        assert packer.stamp != before
        path.write_bytes(text)


def spoil(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def change_file(path: Path) -> None:
        path.write_bytes(change(bytearray(path.read_bytes())))

    return change_file


def flipped(where: int) -> Callable[[bytearray], bytearray]:
    def flip(data: bytearray) -> bytearray:
        data[where] ^= 1
        return data

    return flip


DAMAGE = {
    "cut short by a byte": spoil(lambda data: data[:-1]),
    "cut short to its header": spoil(lambda data: data[:4096]),
    "cut within its header": spoil(lambda data: data[:700]),
    "empty": spoil(lambda data: b""),
    "a byte longer": spoil(lambda data: data + b"\0"),
    "of zeros": spoil(lambda data: bytes(len(data))),
    "of another kind": spoil(lambda data: b"GGUF" + data[4:]),
    "with another magic": spoil(flipped(0)),
    "with another length": spoil(flipped(9)),
    "with a checksum that is none": spoil(lambda data: data[:31] + b"g" + data[32:]),
    "with another letter in its header": spoil(flipped(150)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file(how: str, kept: Kept) -> None:
    DAMAGE[how](kept.path)
    assert not kept.file().is_whole()
    kept.assert_anew(f"{kept.path} is damaged")


def test_a_deleted_file_or_folder_is_no_news(kept: Kept) -> None:
    kept.path.unlink()
    assert np.array_equal(kept.logits(), kept.wanted) and kept.path.exists()
    for path in kept.folder.iterdir():
        path.unlink()
    kept.folder.rmdir()
    assert np.array_equal(kept.logits(), kept.wanted) and kept.path.exists()
    assert kept.log.messages == []


def test_files_of_other_models_stay(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = Tied(tmp_path / "b", "q4_0")
    other.logits(packed=kept.folder)
    other_file = file_of(other.model.graph, kept.folder)
    os.utime(kept.tied.path, ns=(10**18, 10**18))
    assert np.array_equal(kept.logits(), kept.wanted)
    assert other_file.is_whole() and kept.file().is_whole() and not kept.path.exists()


# -- what cannot be written ------------------------------------------------------------------------


def assert_goes_on_without(kept: Kept, *words: str) -> None:
    assert np.array_equal(kept.logits(load="stream"), kept.tied.logits(load="stream"))
    assert np.array_equal(kept.logits(load="ram"), kept.wanted)
    messages = set(kept.log.messages)
    assert len(messages) == 1 and len(kept.log.messages) == 2
    (message,) = messages
    assert "going on without" in message and all(word in message for word in words)
    if kept.folder.is_dir():
        assert [p.name for p in kept.folder.iterdir() if p.name != ".lock"] == []


def test_a_folder_that_cannot_be_made(kept: Kept, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept.folder = tmp_path / "file" / "packed"
    assert_goes_on_without(kept, str(kept.folder), "Not a directory")


@pytest.mark.parametrize("where", ["makes", "locks", "opens", "renames"])
def test_a_folder_that_cannot_be_written(
    where: str, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    name = {
        "makes": "pathlib.Path.mkdir", "locks": "filelock.FileLock.acquire",
        "opens": "onnxstream_nb.packed_weights._write", "renames": "os.replace",
    }[where]  # fmt: skip
    kept.path.unlink()
    monkeypatch.setattr(name, refuse)
    assert_goes_on_without(kept, str(kept.folder), "Read-only file system")


def test_a_file_system_without_locks(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no flock")

    kept.path.unlink()
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    assert_goes_on_without(kept, str(kept.folder), "no flock")


def test_a_folder_that_is_read_only_is_read(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept.folder / ".lock").unlink()
    kept.folder.chmod(0o555)
    monkeypatch.setattr(packed_weights, "write", lambda *_: pytest.fail("written"))
    try:
        assert np.array_equal(kept.logits(), kept.wanted)
    finally:
        kept.folder.chmod(0o755)
    assert only_file(kept.folder) == kept.path and kept.log.messages == []


def test_a_disk_without_room_is_not_begun_with(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.path.unlink()
    size = kept.file().size
    monkeypatch.setattr(packed_weights, "disk_free", lambda path: size - 1)
    monkeypatch.setattr(packed_weights, "_write", lambda *_: pytest.fail("begun"))
    assert_goes_on_without(kept, str(kept.folder), "are needed", "are free")


def test_a_disk_that_becomes_full(kept: Kept) -> None:
    """The system refuses to make a file longer than so many bytes."""
    kept.path.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert np.array_equal(kept.logits(load="ram"), kept.wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (message,) = kept.log.messages
    assert "File too large" in message and "going on without" in message
    assert [p.name for p in kept.folder.iterdir()] == [".lock"]


def test_a_disk_that_reads_something_else(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.path.unlink()
    original = packed_file.Files.read_into

    def read_into(files: Any, memory: Any, ref: Any, start: int, stop: int) -> Any:
        found = original(files, memory, ref, start, stop)
        found[0] ^= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(packed_file.Files, "read_into", read_into)
        assert np.array_equal(kept.logits(load="ram"), kept.wanted)
    (message,) = kept.log.messages
    assert "reads differently" in message and "going on without" in message
    assert [p.name for p in kept.folder.iterdir()] == [".lock"]


def test_a_model_that_ends_too_soon(kept: Kept) -> None:
    kept.path.unlink()
    os.truncate(kept.tied.path, 100_000)
    message = refusal(kept.logits, ModelError)
    assert str(kept.tied.path) in message and "truncated" in message
    assert [p.name for p in kept.folder.iterdir()] == [".lock"]


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted("enough"), MemoryError])
def test_interrupted_at_any_report(error: Any, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "STRIPE", 1)
    for left in (0, 1, 5, 10**9):
        kept.path.unlink(missing_ok=True)
        told: list[str] = []

        def progress(text: str, done: float | None, left: int = left, told: Any = told) -> None:
            told.append(text)
            if "weights" in text and len(told) > left:
                raise error

        try:
            kept.logits(progress=progress)
            assert left == 10**9
        except (KeyboardInterrupt, Interrupted, MemoryError):
            assert [p.name for p in kept.folder.iterdir()] == [".lock"]
            assert np.array_equal(kept.logits(), kept.wanted)
        assert only_file(kept.folder) == kept.path
    assert {"packing weights into a file", "checking packed weights"} <= set(told)
    assert kept.log.messages == []


_SESSION = """
import sys, time
from onnxstream_nb import packed_weights
from onnxstream_nb.session import Session
from quantised_models import activations

packed_weights.STRIPE = 1
path, folder, pause = sys.argv[1:]

def progress(text, done):
    if text.startswith("packing"):
        print("packing", flush=True)
        time.sleep(float(pause))
    elif text.startswith("waiting"):
        print("waiting", flush=True)

with Session(path, packed=folder, progress=progress) as session:
    print(session.run({"x": activations(131, 320)[:5]})["y"].tobytes().hex())
"""


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that can import what these tests do."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_process_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    shipped, folder = Shipped(tmp_path, "4 bits"), tmp_path / "p"
    wanted = shipped.y(load="ram")
    with child(_SESSION, shipped.path, folder, 0.5) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "packing\n":
            assert process.poll() is None
        process.kill()
    assert [p.suffix for p in folder.iterdir() if p.name != ".lock"] == [".tmp"]
    assert np.array_equal(shipped.y(packed=folder), wanted)
    verify(only_file(folder))


# -- several at once -------------------------------------------------------------------------------


def test_processes_at_once_write_one_file(tmp_path: Path) -> None:
    shipped, folder = Shipped(tmp_path, "4 bits"), tmp_path / "p"
    wanted = shipped.y(load="ram")
    folder.mkdir()
    lock = FileLock(folder / ".lock")
    lock.acquire()
    processes = [child(_SESSION, shipped.path, folder, 0) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    lock.release()
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    lines = [out.split() for out, _ in outputs]
    assert all(each[-1] == wanted.tobytes().hex() for each in lines)
    assert sum("packing" in each for each in lines) == 1
    verify(only_file(folder))


def test_waiting_can_be_given_up(kept: Kept) -> None:
    kept.path.unlink()
    lock = FileLock(kept.folder / ".lock")

    def progress(text: str, done: float | None) -> None:
        if text == "waiting for another process that packs weights":
            raise Interrupted("enough")

    with lock, pytest.raises(Interrupted, match="enough"):
        kept.logits(progress=progress)
    assert np.array_equal(kept.logits(), kept.wanted)


_PEAK = """
import sys
from pathlib import Path
from onnxstream_nb import device, packed_weights
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.kernels import packing
from onnxstream_nb.packed_file import PackedFile

packing.SUPPORTED = True
packer, folder = packing.Packer(), Path(sys.argv[1])

def write(n, name):
    path = folder / name
    with path.open("wb") as file:
        file.truncate(4096 * n * 2)
    rows = WeightRef("a", (4096, n), "float32", path, 0, n * 4352, "q8_0", True)
    q = WeightRef("q", (4096, n), "int8", path, 0, 4096 * n)
    s = WeightRef("s", (32, n), "float32", path, 0, 32 * n * 4)
    columns = WeightRef("b", (4096, n), "float32", path, 0, 4096 * n + 128 * n, "affine8",
                        parts=(q, s), block=128)
    file = PackedFile(folder / "p", [rows, columns], packer.panel_bytes, packer.stamp)
    packed_weights.write(file, packer)
    return file.size

write(64, "small")
before = device.peak_rss()
size = write(16384, "large")
print(size, device.peak_rss() - before)
"""


def test_writing_takes_little_memory(tmp_path: Path) -> None:
    """Of matrices by rows and by columns, each of 70 MB."""
    with child(_PEAK, tmp_path) as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    size, grown = map(int, out.split())
    assert size > 140_000_000 and grown < 32_000_000


# -- headers of any kind ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=20,
)
WORDS = st.sampled_from(["checksums", "version", "stamp", "sources", "weights", "name", "offset"])


def header_bytes(document: Any, pad: int = 9000) -> bytes:
    text = json.dumps(document).encode()
    return packed_file.MAGIC + len(text).to_bytes(8, "little") + text + bytes(pad)


GOOD: dict[str, Any] = {
    "checksums": "0123abcd", "version": 1, "stamp": "s", "sources": [["/x", 3, 4]],
    "weights": [{"name": "w", "offset": 0, "nbytes": 4096}],
}  # fmt: skip


def check_refused_or_sound(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        header = read_header(path)
    except ModelError as error:
        assert str(path) in str(error)
        refusal(lambda: verify(path), ModelError)
        return False
    for matrix in header.matrices:
        assert 0 <= matrix.offset <= matrix.offset + matrix.nbytes <= len(data)
    assert all(isinstance(source.is_same, bool) for source in header.sources)
    assert isinstance(header.paths, set)
    return True


fuzzed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzzed
@given(data=st.binary(max_size=200), rest=st.binary(max_size=60))
@example(data=packed_file.MAGIC + (2**63).to_bytes(8, "little"), rest=b"")
@example(data=packed_file.MAGIC + (20_000).to_bytes(8, "little"), rest=b"[" * 20_000)
@example(data=packed_file.MAGIC + (3).to_bytes(8, "little"), rest=b"\xff\xfe\x00")
def test_any_bytes(data: bytes, rest: bytes, tmp_path: Path) -> None:
    for start in (b"", packed_file.MAGIC, packed_file.MAGIC + len(rest).to_bytes(8, "little")):
        assert not check_refused_or_sound(tmp_path / "x.panels", start + data + rest)


@fuzzed
@given(document=st.dictionaries(WORDS, JSON) | JSON)
def test_any_document(document: Any, tmp_path: Path) -> None:
    assert not check_refused_or_sound(tmp_path / "x.panels", header_bytes(document))


@fuzzed
@given(key=st.sampled_from(sorted(GOOD)), new=JSON)
@example(key="sources", new=[["\0", 1, 2]])
@example(key="sources", new=[["\ud800", 1, 2]])
@example(key="checksums", new=["0"] * 8)
@example(key="version", new=True)
def test_any_field(key: str, new: Any, tmp_path: Path) -> None:
    assert check_refused_or_sound(tmp_path / "x.panels", header_bytes(GOOD))
    check_refused_or_sound(tmp_path / "x.panels", header_bytes({**GOOD, key: new}))


@fuzzed
@given(key=st.sampled_from(["name", "offset", "nbytes"]), new=JSON | st.integers(-9000, 9000))
@example(key="offset", new=2**70)
@example(key="nbytes", new=-1)
@example(key="offset", new=-4096)
def test_any_field_of_a_weight(key: str, new: Any, tmp_path: Path) -> None:
    weight = {**GOOD["weights"][0], key: new}
    check_refused_or_sound(tmp_path / "x.panels", header_bytes({**GOOD, "weights": [weight]}))


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> list[WeightRef]:
    return matrices(tmp_path_factory.mktemp("refs"), "q8_0")


@fuzzed
@given(where=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_header_is_noticed(
    where: int, bit: int, refs: list[WeightRef], tmp_path: Path
) -> None:
    """But for those of the checksums, which say so when they are compared."""
    file = PackedFile(tmp_path, refs, packer().panel_bytes, "s")
    header = bytearray(file.header(["01234567"] * len(refs)))
    where %= len(header)
    header[where] ^= 1 << bit
    with file.path.open("wb") as out:
        out.write(header)
        out.truncate(file.size)
    start = packed_file.PREFIX + len(packed_file.CHECKSUMS)
    is_digit = chr(header[where]) in "0123456789abcdef"
    assert file.is_whole() == (start <= where < start + 8 * len(refs) and is_digit)
