"""The file of a cache on disk: set aside, unnamed, bounded in memory, honest when it fails."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import refusal
from spilled_slots import Twins, slots_on_disk

from onnxstream_nb.errors import OnnxstreamError, UsageError
from onnxstream_nb.spill import SLICE_BYTES, SpilledPair, slice_positions, working_bytes
from onnxstream_nb.spill_file import SpillFile

HERE = Path(__file__).parent


def test_a_file_has_its_room_at_once_and_no_name(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "when needed"
    file = SpillFile(folder, 5_000_001)
    assert list(folder.iterdir()) == []
    status = os.fstat(file._descriptor)
    assert status.st_size == 5_000_001 <= 512 * status.st_blocks
    assert status.st_nlink == 0 and status.st_mode & 0o077 == 0
    data = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8)
    file.write(data, 4_997_001)
    got = np.zeros(3000, np.uint8)
    file.read(got, 4_997_001)
    np.testing.assert_array_equal(got, data)
    threads = threading.active_count()
    file.begin([lambda: file.read(got, 0)])
    file.settle()
    file.close()
    assert threading.active_count() == threads
    with pytest.raises(OSError):
        os.fstat(file._descriptor)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(lambda: SpillFile(tmp_path / "file" / "folder", 10), UsageError)
    assert str(tmp_path / "file" / "folder") in message and "--kv-spill" in message


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is made up here; the next test has the system refuse a large file."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    open_before = len(os.listdir("/proc/self/fd"))
    message = refusal(lambda: SpillFile(tmp_path, 3_000_000_000), UsageError)
    for part in (str(tmp_path), "3.00 GB", "No space left", "--kv-spill", "--context", "--ram"):
        assert part in message
    assert len(os.listdir("/proc/self/fd")) == open_before


def limited(script: str, **limits: int) -> subprocess.CompletedProcess[str]:
    """Run Python code that may use the helpers beside this file, in a process with these limits."""

    def limit() -> None:
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

    return subprocess.run(
        [sys.executable, "-c", script], cwd=HERE, text=True, capture_output=True, timeout=240,
        preexec_fn=limit, env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
    )  # fmt: skip


def test_a_file_larger_than_the_process_may_write(tmp_path: Path) -> None:
    done = limited(
        "from pathlib import Path\nfrom onnxstream_nb.spill_file import SpillFile\n"
        f"SpillFile(Path({str(tmp_path)!r}), 100_000)\nprint('small', flush=True)\n"
        f"SpillFile(Path({str(tmp_path)!r}), 10_000_000)\n",
        FSIZE=1_000_000,
    )
    assert done.stdout == "small\n" and done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "UsageError" in last and str(tmp_path) in last and "10.0 MB" in last
    assert list(tmp_path.iterdir()) == []


def failing(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A system call that fails from the n-th time on."""
    left = [after]

    def fail(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("after", [0, 3, 10])
@pytest.mark.parametrize("name", ["preadv", "pwrite"])
@pytest.mark.parametrize("queries", [1, 50])
def test_a_disk_that_fails_half_way(
    queries: int, name: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told, what was there stays, and the next run is none the wiser."""
    twins = Twins(tmp_path, 3, 2, (64, 96))
    twins.step(300)
    q, new = np.ones((1, 6, queries, 64), np.float32), np.ones((1, 3, queries, 96), np.float32)
    from onnxstream_nb.kernels.attention import attention_23

    with monkeypatch.context() as broken:
        broken.setattr(os, name, failing(getattr(os, name), after))
        message = refusal(
            lambda: attention_23(q, new[..., :64], new, None, *twins.on_disk), OnnxstreamError
        )
    assert str(tmp_path) in message and "Input/output error" in message
    assert ("reading" if name == "preadv" else "writing") in message
    assert twins.length == 300
    twins.assert_same_contents()
    twins.step(queries)
    twins.step(1)
    twins.assert_same_contents()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    keys, values = slots_on_disk(tmp_path, 1, (16, 16))
    os.truncate(keys.file._descriptor, 1000)
    keys.length = values.length = 900
    with pytest.raises(OnnxstreamError, match="the file ends before them"):
        np.asarray(keys)


def test_the_file_is_gone_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import time\nfrom pathlib import Path\nfrom onnxstream_nb.spill_file import SpillFile\n"
        f"file = SpillFile(Path({str(tmp_path)!r}), 20_000_000)\nprint('there', flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        files = [os.readlink(f.path) for f in os.scandir(f"/proc/{process.pid}/fd")]
        assert any(f.startswith(str(tmp_path)) and f.endswith("(deleted)") for f in files)
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("windows", [1, 2, 4, 10, 32])
@pytest.mark.parametrize(
    ("heads", "sizes", "positions"),
    [(4, (64, 64), 512), (1, (16, 16), 100), (8, (128, 128), 100_000), (3, (80, 33), 4000)],
)
def test_slices_are_bounded_and_take_in_what_they_can(
    heads: int, sizes: tuple[int, int], positions: int, windows: int, tmp_path: Path
) -> None:
    keys, values = slots_on_disk(tmp_path, heads, sizes, positions=positions)
    taken = slice_positions(keys, values, windows)
    each = keys.position_bytes + values.position_bytes
    assert taken % 128 == 0 and 128 <= taken < keys.capacity + 128
    assert taken == 128 or taken * windows * each <= SLICE_BYTES
    whole = taken >= keys.capacity or taken * windows >= heads * keys.capacity
    assert whole or (taken + 128) * windows * each > SLICE_BYTES
    # Two slices, each no more than its share or 128 positions a window; then the new positions.
    least = 2 * min(SLICE_BYTES, heads * keys.capacity * each) + 512 * heads * each
    most = 2 * max(SLICE_BYTES, 128 * windows * each) + 600 * heads * each + (8 << 20)
    assert least // 4 <= working_bytes(keys, values, 8, 512, windows) <= 1.5 * most


BOUNDED = """
import re, sys
from pathlib import Path
import numpy as np
from spilled_slots import slots_on_disk
from onnxstream_nb.kernels.attention import attention_23
from onnxstream_nb.kernels.threads import set_threads
from onnxstream_nb.spill import working_bytes

def status(name):
    return int(re.search(rf"^{name}:\\s*(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])

def attend(slots, queries, new):
    q = np.ones((1, 16, queries, 128), np.float32)
    k = np.ones((1, 4, new, 128), np.float32)
    y = attention_23(q, k, k, None, *slots, is_causal=1)
    for slot in slots:
        slot.length += new
    return y

set_threads(2)
small = slots_on_disk(Path(sys.argv[1]), 4, (128, 128), positions=700)
attend(small, 512, 512), attend(small, 1, 1)  # kernels and scratch are there from now on
small[0].file.close()
del small
before = sum(map(status, ("RssAnon", "RssFile", "RssShmem")))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
slots = slots_on_disk(Path(sys.argv[1]), 4, (128, 128), positions=33000)
while slots[0].length < 32256:
    attend(slots, 0, 512)
for _ in range(3):
    attend(slots, 1, 1)
y = attend(slots, 512, 512)
assert np.allclose(y, 1)
print(1024 * (status("VmHWM") - before), working_bytes(*slots, 4, 512, 4), slots[0].room_bytes)
"""


def test_memory_is_bounded_however_long_the_context(tmp_path: Path) -> None:
    """Peak resident memory, shared and mapped pages included, over 68 MB of keys and values."""
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path)], cwd=HERE, text=True, capture_output=True,
        timeout=240, env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, bound, room = map(int, done.stdout.split())
    assert room > 33_000_000
    activations = 2 * 4 * 512 * 16 * 128 + 2 * 4 * 512 * 4 * 128  # q, y, k and v
    assert bound < 12_000_000 and grown <= bound + activations


def test_what_is_read_ahead_is_the_next_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, what: advised.append((at, size)))
    layers = [slots_on_disk(tmp_path, 2, (64, 64), positions=40_000) for _ in range(2)]
    (keys, values), (following, values_of_it) = layers
    keys.following = SpilledPair(following, values_of_it)
    following.length = values_of_it.length = 10_000
    keys.with_values(values).done()
    keys.file.close()
    assert sum(size for _, size in advised) == 2 * 2 * 10_016 * 128
    assert max(size for _, size in advised) <= 1 << 20
    covered = {byte // 1000 for at, size in advised for byte in range(at, at + size, 1000)}
    runs = [*following.filled(), *values_of_it.filled()]
    assert covered >= {(at + size // 2) // 1000 for at, size in runs}
