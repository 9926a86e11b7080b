"""Reads of weight files, directly from the disk or not: any offset and size, and files that end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxstream_nb import files
from onnxstream_nb.errors import ModelError
from onnxstream_nb.files import PAGE, Files, aligned, room
from onnxstream_nb.graph import WeightRef

CANARY = 0xA5
OFFSETS = (0, 1, 511, 512, 4095, 4096, 4097, 12345)
SIZES = (1, 2, 511, 4095, 4096, 4097, 20000)
AFTER = (0, 1, 4096, 5000)  # bytes of the file behind the weight

Open = Callable[..., int]


def weight(path: Path, offset: int, size: int, name: str = "w") -> WeightRef:
    return WeightRef(name, (size,), "uint8", path, offset, size)


def assert_reads(ref: WeightRef, wanted: bytes, start: int = 0, stop: int | None = None) -> None:
    """Both ways; a direct read keeps to its room."""
    stop = ref.nbytes if stop is None else stop
    reader = Files()
    memory = aligned(room(stop - start) + PAGE)
    memory[:] = CANARY
    found = reader.read_into(memory, ref, start, stop)
    assert bytes(found) == wanted
    assert 0 <= found.ctypes.data - memory.ctypes.data < PAGE
    assert (memory[room(stop - start) :] == CANARY).all()
    assert bytes(reader.read(ref, start, stop)) == wanted
    reader.close()


@pytest.fixture(params=["direct", "no such flag", "open refuses", "read refuses"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """File systems that read directly, that refuse to at once, and that do at the first read."""
    real_open, real_preadv = os.open, os.preadv
    flag = getattr(os, "O_DIRECT", 0)
    direct: set[int] = set()

    def opened(path: Any, flags: int, *others: Any, **options: Any) -> int:
        if flags & flag and request.param == "open refuses":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *others, **options)
        (direct.add if flags & flag else direct.discard)(descriptor)
        return descriptor

    def read(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if descriptor in direct and request.param == "read refuses":
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset, *flags)

    if request.param == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif request.param != "direct":
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "preadv", read)
    return str(request.param)


@pytest.mark.parametrize("offset", OFFSETS)
def test_any_offset_and_size(offset: int, disk: str, tmp_path: Path) -> None:
    data = np.random.default_rng(offset).bytes(offset + max(SIZES) + max(AFTER))
    for size in SIZES:
        for after in AFTER:
            path = tmp_path / f"{size}.{after}"
            path.write_bytes(data[: offset + size + after])
            assert_reads(weight(path, offset, size), data[offset : offset + size])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9000), st.integers(1, 30000), st.data())
def test_any_stretch_of_a_weight(offset: int, size: int, data: st.DataObject) -> None:
    import tempfile

    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole = np.random.default_rng(size).bytes(offset + size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.bin"
        path.write_bytes(whole)
        wanted = whole[offset + start : offset + stop]
        assert_reads(weight(path, offset, size), wanted, start, stop)


@given(st.integers(0, 10**7), st.integers(0, PAGE - 1))
def test_there_is_room_wherever_it_begins(size: int, skip: int) -> None:
    pages = -(-(skip + size) // PAGE) * PAGE
    assert pages <= room(size) <= size + 2 * PAGE and room(size) % PAGE == 0


@pytest.mark.parametrize("size", [0, 1, 4096, 10**6])
def test_memory_begins_at_a_page_and_is_zero(size: int) -> None:
    memory = aligned(size)
    assert memory.nbytes >= max(1, size) and memory.ctypes.data % PAGE == 0 and not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


def test_files_on_memory(disk: str) -> None:
    """A file system without direct reads, or with them only of late."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no file system in memory")
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "w.bin"
        path.write_bytes(bytes(range(256)) * 40)
        assert_reads(weight(path, 300, 9000), (bytes(range(256)) * 40)[300:9300])


def test_behind_four_gigabytes(disk: str, tmp_path: Path) -> None:
    path, offset = tmp_path / "large.bin", (5 << 30) + 12345
    wanted = np.random.default_rng(0).bytes(70_001)
    try:
        with path.open("wb") as file:
            file.seek(offset)
            file.write(wanted)
    except OSError as error:  # pragma: no cover - a file system without holes
        pytest.skip(f"no room for a file of 5 GiB: {error}")
    try:
        assert_reads(weight(path, offset, 70_001), wanted)
        assert_reads(weight(path, offset - 5, 15), b"\0" * 5 + wanted[:10])
        assert_reads(weight(path, 7, 1 << 33), wanted[3:9], offset - 7 + 3, offset - 7 + 9)
    finally:
        path.unlink()


@pytest.mark.parametrize("most", [1, 511, 4095, 4096, 5000, 10**6])
def test_reads_that_come_up_short(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may give less than it was asked for; a direct read goes on at a page."""
    if most < PAGE:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    data = np.random.default_rng(0).bytes(30_000)
    (tmp_path / "w.bin").write_bytes(data)
    real = os.preadv

    def short(descriptor: int, buffers: Any, offset: int) -> int:
        return min(most, real(descriptor, buffers, offset))

    reader, ref = Files(), weight(tmp_path / "w.bin", 4097, 20_000)
    reader.descriptor(ref.source, direct=True)  # type: ignore[arg-type]
    monkeypatch.setattr(os, "preadv", short)
    assert bytes(reader.read(ref)) == data[4097:24097]
    if most >= PAGE:
        assert bytes(reader.read_into(aligned(room(20_000)), ref, 0, 20_000)) == data[4097:24097]
    reader.close()


def test_reads_longer_than_a_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST", 2 * PAGE)
    data = np.random.default_rng(0).bytes(9 * PAGE + 77)
    (tmp_path / "w.bin").write_bytes(data)
    for offset in (0, 1, PAGE - 1, PAGE):
        assert_reads(weight(tmp_path / "w.bin", offset, len(data) - offset), data[offset:])


# -- errors


@pytest.mark.parametrize("missing", [1, 100, 4096, 5001])
def test_a_file_that_ends_early(missing: int, disk: str, tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(4000 + 5001 - missing))
    ref, reader = weight(path, 4000, 5001, "layer.7"), Files()
    for call in (
        lambda: reader.read(ref),
        lambda: reader.read_into(aligned(room(5001)), ref, 0, 5001),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        message = str(caught.value)
        assert str(path) in message and "ends before layer.7" in message
        assert "4000" in message and "9001" in message and "fetch it again" in message
    if missing < 5001:  # what there is can be read
        count = 5001 - missing
        assert not reader.read_into(aligned(room(count)), ref, 0, count).any()
    reader.close()


def test_an_empty_file_and_one_byte(disk: str, tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"")
    (tmp_path / "one").write_bytes(b"x")
    assert_reads(weight(tmp_path / "one", 0, 1), b"x")
    reader = Files()
    for name, offset in (("none", 0), ("one", 1), ("one", 10**7)):
        with pytest.raises(ModelError, match=f"{name}.*truncated"):
            reader.read_into(aligned(room(1)), weight(tmp_path / name, offset, 1), 0, 1)
    reader.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_file_that_cannot_be_opened(
    code: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(10))
    ref = weight(tmp_path / "w.bin", 0, 10)

    def refused(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    reader = Files()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(ModelError, match=r"w\.bin: cannot open the weight file") as caught:
            reader.descriptor(tmp_path / "w.bin", direct)
        assert os.strerror(code) in str(caught.value)
    assert not reader.read(ref).any()  # nothing of it stays
    reader.close()


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="the system does not list open files")
def test_open_files_are_let_go(disk: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(10))
    ref, before = weight(tmp_path / "w.bin", 0, 10), len(os.listdir("/dev/fd"))
    for close in (True, False):
        reader = Files()
        for _ in range(3):
            reader.read(ref)
            reader.read_into(aligned(room(10)), ref, 0, 10)
        assert len(os.listdir("/dev/fd")) == before + 2
        if close:
            reader.close()
        del reader
        assert len(os.listdir("/dev/fd")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="direct reads are Linux's")
def test_what_is_read_directly_does_not_stay_in_memory(tmp_path: Path) -> None:
    """A descriptor of its own says so, where the file system knows such reads."""
    import fcntl

    (tmp_path / "w.bin").write_bytes(bytes(PAGE))
    try:
        os.close(os.open(tmp_path / "w.bin", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct reads")
    reader = Files()
    flags = [
        fcntl.fcntl(reader.descriptor(tmp_path / "w.bin", direct), fcntl.F_GETFL)
        for direct in (False, True)
    ]
    assert [bool(f & os.O_DIRECT) for f in flags] == [False, True]
    reader.close()
