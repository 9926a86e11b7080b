"""device.py against made-up system files, other sources of the same facts, and odd input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from onnxstream_nb import device
from onnxstream_nb.errors import UsageError


class Machine:
    """A made-up Linux machine: the files that device.py reads, under a temporary folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, monkeypatch
        for name, folder in (("_PROC", "proc"), ("_CGROUP", "cgroup"), ("_CPUS", "cpu")):
            (root / folder).mkdir()
            monkeypatch.setattr(device, name, root / folder)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def processors(self, cores: list[tuple[int, int]]) -> None:
        """One (package, core) for each logical processor, all of them allowed."""
        for cpu, (package, core) in enumerate(cores):
            self.write(f"cpu/cpu{cpu}/topology/physical_package_id", f"{package}\n")
            self.write(f"cpu/cpu{cpu}/topology/core_id", f"{core}\n")
        self.patch.setattr(
            os, "sched_getaffinity", lambda pid: set(range(len(cores))), raising=False
        )

    def memory(self, total: int, available: int) -> None:
        answer = psutil.virtual_memory()._replace(total=total, available=available)
        self.patch.setattr(psutil, "virtual_memory", lambda: answer)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_hyperthreads_count_once(machine: Machine) -> None:
    machine.processors([(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 0)])
    assert device.physical_cores() == 3


def test_affinity_limits_cores(machine: Machine) -> None:
    machine.processors([(0, core) for core in range(8)])
    machine.patch.setattr(os, "sched_getaffinity", lambda pid: {2, 5})
    assert device.physical_cores() == 2


def test_without_topology_each_processor_counts(machine: Machine) -> None:
    machine.patch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert device.physical_cores() == 3


def test_without_affinity_psutil_answers(machine: Machine) -> None:
    machine.patch.delattr(os, "sched_getaffinity", raising=False)
    machine.patch.setattr(psutil, "cpu_count", lambda logical: 6)
    assert device.physical_cores() == 6


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_quota_of_control_group_2(machine: Machine, quota: str, cores: int) -> None:
    machine.processors([(0, core) for core in range(8)])
    machine.write("proc/self/cgroup", "0::/a/b\n")
    machine.write("cgroup/a/b/cpu.stat", "")
    machine.write("cgroup/a/cpu.max", f"{quota}\n")  # the parent's limit holds too
    assert device.physical_cores() == cores


def test_quota_of_control_group_1(machine: Machine) -> None:
    machine.processors([(0, core) for core in range(8)])
    machine.write("proc/self/cgroup", "4:cpu,cpuacct:/docker/1234\n2:memory:/docker/1234\n")
    # Inside a container the mount's root is its own group: /docker/1234 does not exist there.
    machine.write("cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n")
    machine.write("cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert device.physical_cores() == 3
    machine.write("cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert device.physical_cores() == 8


def test_memory_of_control_group_2(machine: Machine) -> None:
    machine.memory(total=64 << 30, available=40 << 30)
    machine.write("proc/self/cgroup", "0::/job\n")
    machine.write("cgroup/job/memory.max", f"{4 << 30}\n")
    machine.write("cgroup/job/memory.current", f"{3 << 30}\n")
    machine.write("cgroup/job/memory.stat", f"anon 5\ninactive_file {1 << 30}\nactive_file 7\n")
    assert device.memory_total() == 4 << 30
    assert device.memory_available() == 2 << 30  # inactive file pages can be taken back


def test_memory_of_control_group_1(machine: Machine) -> None:
    machine.memory(total=64 << 30, available=40 << 30)
    machine.write("proc/self/cgroup", "9:memory:/\n")
    machine.write("cgroup/memory/memory.limit_in_bytes", f"{8 << 30}\n")
    machine.write("cgroup/memory/memory.usage_in_bytes", f"{5 << 30}\n")
    machine.write("cgroup/memory/memory.stat", f"inactive_file 1\ntotal_inactive_file {2 << 30}\n")
    assert device.memory_available() == 5 << 30
    machine.write("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    assert (device.memory_total(), device.memory_available()) == (64 << 30, 40 << 30)


def test_memory_without_limit_or_above_it(machine: Machine) -> None:
    machine.memory(total=1 << 30, available=1 << 29)
    assert device.memory_available() == 1 << 29
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("cgroup/memory.max", "1000\n")
    machine.write("cgroup/memory.current", "4000\n")
    assert device.memory_available() == 0


def test_peak_memory_is_in_bytes_and_stays() -> None:
    code = (
        "from onnxstream_nb import device\n"
        "a = device.peak_rss(); x = b'x' * (64 << 20); b = device.peak_rss(); del x\n"
        "print(a, b, device.peak_rss())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, during, after = map(int, out.stdout.split())
    assert before < 60 << 20
    assert 60 << 20 <= during - before <= 72 << 20
    assert after - before >= 60 << 20


def test_this_machine_answers_plausibly(tmp_path: Path) -> None:
    assert 1 <= device.physical_cores() <= (os.cpu_count() or 1)
    assert 0 < device.memory_available() <= device.memory_total()
    assert device.cpu_name()
    assert device.disk_free(tmp_path / "not" / "yet") == pytest.approx(
        psutil.disk_usage(str(tmp_path)).free, rel=0.05
    )


def features(**environment: str) -> set[str]:
    """cpu_features() of a fresh process with only these NUMBA_ variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    code = "from onnxstream_nb.device import cpu_features; print(*cpu_features())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=clean | environment,
    )  # fmt: skip
    return set(out.stdout.split())


def test_cpu_features_are_what_numba_compiles_for() -> None:
    from numba.core.codegen import get_host_cpu_features

    flat = get_host_cpu_features()
    assert features() == {name[1:] for name in flat.split(",") if name.startswith("+")}
    assert features(NUMBA_CPU_NAME="generic") == set()
    assert features(NUMBA_CPU_FEATURES="+avx2,-avx512f,+fma") == {"avx2", "fma"}
    assert features(NUMBA_CPU_FEATURES="") == set()
    assert not any(name.startswith("avx") for name in features(NUMBA_ENABLE_AVX="0"))


def test_importing_device_is_light() -> None:
    heavy = "('numpy', 'numba', 'llvmlite', 'psutil')"
    code = f"import sys, onnxstream_nb.device\nprint([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9), ("512MB", 512 * 10**6), ("1.5GiB", 3 << 29), ("800m", 800 * 10**6),
        ("4096", 4096), (" .5 g ", 5 * 10**8), ("64kib", 1 << 16), ("1t", 10**12), ("7B", 7),
    ],
)  # fmt: skip
def test_parse_size(text: str, size: int) -> None:
    assert device.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "2 XB", "1e9", "2GBit", "1,5GB", "nan", "0", "0.1"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="^--ram: "):
        device.parse_size(text, "--ram")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"),
        (98_362_432, "98.4 MB"), (2.2e9, "2.20 GB"), (5e15, "5000 TB"),
    ],
)  # fmt: skip
def test_format_size(size: float, text: str) -> None:
    assert device.format_size(size) == text
