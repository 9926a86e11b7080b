"""Streams of which reads fail: who asks is told, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weight_files import (
    WAIT,
    Reads,
    closing,
    cut,
    expected,
    matrices,
    pieces_of,
    taken,
    tiled,
)  # fmt: skip

from onnxstream_nb.errors import ModelError
from onnxstream_nb.graph import WeightRef
from onnxstream_nb.streaming import StreamProvider

pytestmark = pytest.mark.usefixtures("no_endless_waits")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# -- reads that fail


def truncate(path: Path, refs: list[WeightRef]) -> Callable[[], None]:
    whole = path.read_bytes()
    os.truncate(path, refs[2].offset + 1)
    return lambda: void(path.write_bytes(whole))


def empty(path: Path, refs: list[WeightRef]) -> Callable[[], None]:
    whole = path.read_bytes()
    os.truncate(path, 0)
    return lambda: void(path.write_bytes(whole))


def remove(path: Path, refs: list[WeightRef]) -> Callable[[], None]:
    whole = path.read_bytes()
    path.unlink()
    return lambda: void(path.write_bytes(whole))


def void(_: object) -> None: ...


FAULTS = {f.__name__: f for f in (truncate, empty, remove)}


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_reaches_who_asks_and_is_over_with_its_cause(
    fault: str, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file fails before it is opened; the threads live on, and no error is left behind."""
    failed: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_value))
    pieces_of(monkeypatch, 2000)
    refs = matrices(tmp_path / "bad.bin", (33, 64), (20, 500), (70, 31), (1, 9))
    wanted = [expected(ref) for ref in refs]
    mend = FAULTS[fault](tmp_path / "bad.bin", refs)
    with closing(StreamProvider(refs, slots=slots)) as provider:
        for _ in range(3):
            provider.prefetch(refs)
            with pytest.raises(ModelError, match=r"bad\.bin.*") as caught:
                for ref, data in zip(refs, wanted, strict=True):
                    assert tiled(provider, ref) == data
            if fault == "truncate":
                assert refs[2].name in str(caught.value) and "fetch it again" in str(caught.value)
        mend()
        for _ in range(2):
            provider.prefetch(refs)
            assert [tiled(provider, ref) for ref in refs] == wanted
    assert not failed


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    refs = cut(tmp_path / "bad.bin", (50,))
    (tmp_path / "bad.bin").unlink()
    (tmp_path / "bad.bin").mkdir()
    with closing(StreamProvider(refs)) as provider:
        provider.prefetch(refs)
        with pytest.raises(ModelError, match=r"bad\.bin: .*a directory"):
            taken(provider, refs[0])


class Preadv:
    """os.preadv that fails for some offsets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: range = range(0)
        self.code = errno.EIO
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        if any(at in self.bad for at in range(offset, offset + sum(map(len, buffers)), 512)):
            raise OSError(self.code, os.strerror(self.code))
        return self._real(descriptor, buffers, offset, *flags)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ESTALE])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_disk_that_fails_for_a_while(
    slots: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a weight, in the middle of a pass, or while the next one is read ahead."""
    pieces_of(monkeypatch, 4096)
    refs = matrices(tmp_path / "a.bin", (100, 128), (64, 512), (3, 4000))
    wanted = [expected(ref) for ref in refs]
    disk = Preadv(monkeypatch)
    with closing(StreamProvider(refs, slots=slots)) as provider:
        provider.prefetch(refs)
        assert [tiled(provider, ref) for ref in refs] == wanted
        for wrong in (1, 0, 2):
            middle = refs[wrong].offset + refs[wrong].nbytes // 2
            disk.bad, disk.code = range(middle // 4096 * 4096, middle // 4096 * 4096 + 512), code
            provider.prefetch([])  # what was read ahead before the fault
            for _ in range(2):
                provider.prefetch(refs)
                seen = ""
                for i, ref in enumerate(refs):
                    try:
                        assert tiled(provider, ref) == wanted[i]
                    except ModelError as error:
                        seen = str(error)
                        break
                if seen:
                    assert "a.bin" in seen and f"reading a.{wrong} failed" in seen
                    assert os.strerror(code) in seen
            assert seen  # at the latest what was read after the fault began
            disk.bad = range(0)
            for _ in range(2):
                provider.prefetch(refs)
                assert [tiled(provider, ref) for ref in refs] == wanted


@pytest.mark.parametrize("slots", [1, 3])
def test_a_read_that_fails_while_the_next_pass_begins(
    slots: int, tmp_path: Path, reads: Reads
) -> None:
    """It began when the file was not whole: what it met is not that pass's."""
    refs = cut(tmp_path / "a.bin", (50, 60))
    mend = remove(tmp_path / "a.bin", refs)
    with closing(StreamProvider(refs, slots=slots)) as provider:
        original = provider._ring.files.read_into
        held, late = threading.Event(), threading.Event()

        def read_into(*arguments: Any) -> Any:
            try:
                return original(*arguments)
            finally:
                held.set()
                assert late.wait(WAIT)

        provider._ring.files.read_into = read_into
        provider.prefetch(refs)
        assert held.wait(WAIT)
        mend()
        provider.prefetch(refs)
        late.set()
        assert [taken(provider, ref) for ref in refs] == [expected(ref) for ref in refs]


def test_errors_that_are_kept_hold_no_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that fails amid the tiles of a weight, more often than there are buffers."""
    import numpy as np

    from onnxstream_nb.errors import UnsupportedError
    from onnxstream_nb.kernels.matmul import matmul

    pieces_of(monkeypatch, 1280)
    ref = WeightRef("w", (8, 40), "float32", tmp_path / "w.bin", 0, 8 * 40 * 8, "q8_0")
    (tmp_path / "w.bin").write_bytes(bytes(ref.nbytes))
    kept = []
    with closing(StreamProvider([ref], slots=2)) as provider:
        for _ in range(5):
            provider.prefetch([ref])
            with pytest.raises(UnsupportedError, match="q8_0") as caught:
                matmul(np.ones((1, 8), np.float32), provider.get(ref))
            kept.append(caught)
        provider.prefetch([ref])
        assert tiled(provider, ref) == bytes(ref.nbytes)
