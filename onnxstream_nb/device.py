"""What this machine can do: cores, memory, processor features. Sizes are in bytes.

A container's limits count as the machine's: a control group's CPU quota and memory limit, version 1
or 2, are read where Linux mounts them. Nothing heavy is imported until the question is asked.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .errors import UsageError

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")

_TOTAL_INACTIVE = re.compile(r"^total_inactive_file (\d+)$", re.MULTILINE)
_INACTIVE = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([KMGT]?)(I?)B?\s*", re.IGNORECASE)


def physical_cores() -> int:
    """Cores this process may use at once: its affinity mask with hyperthreads counted once,
    and no more than a control group's CPU quota grants (rounded down, at least 1)."""
    quota = _cpu_quota()
    cores = _affinity_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def memory_total() -> int:
    """Physical memory, or the control group's limit when that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min([total, *(limit for limit, _ in _memory_limits())])


def memory_available() -> int:
    """Memory that can be taken now without swapping or passing a control group's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(limit - used for limit, used in _memory_limits())]))


def current_rss() -> int:
    """The memory this process has resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The most memory this process has had resident since it started."""
    status = _read(_PROC / "self" / "status")
    if status is not None:
        match = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def cpu_name() -> str:
    """The processor as its maker calls it, for reports."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(_PROC / "cpuinfo") or "", re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


@cache
def cpu_features() -> frozenset[str]:
    """LLVM's names of the features that compiled code may use (`avx512f`, `f16c`, `neon`, ...).

    As in Numba, NUMBA_CPU_FEATURES replaces the host's list (`+avx2,-avx512f`, names with a plus
    count), NUMBA_CPU_NAME=generic empties it, and NUMBA_ENABLE_AVX=0 drops every `avx` feature.
    """
    listed = os.environ.get("NUMBA_CPU_FEATURES")
    if listed is not None:
        return frozenset(f[1:] for f in listed.replace(" ", "").split(",") if f.startswith("+"))
    if os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        return frozenset()
    from llvmlite import binding

    try:
        found = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM knows no features of this host
        return frozenset()
    without_avx = os.environ.get("NUMBA_ENABLE_AVX") == "0"
    return frozenset(n for n, on in found.items() if on and not (without_avx and n[:3] == "avx"))


def disk_free(path: str | Path) -> int:
    """Bytes free for this user on the disk of `path`, which need not exist yet."""
    where = Path(path).absolute()
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free


def parse_size(text: str, flag: str = "size") -> int:
    """Bytes in a size like `2GB`, `1.5GiB`, `800m` or `4096`: GB = 10^9, GiB = 2^30.

    Raises UsageError naming `flag` when the text is no size, or no positive one.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{flag}: {text!r} is not a size; write for example 2GB, 512MB or 1.5GiB")
    number, unit, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()])
    if size <= 0:
        raise UsageError(f"{flag}: the size must be more than 0, not {text!r}")
    return size


def format_size(size: float) -> str:
    """Bytes as people read them, decimal units and three digits: `2.10 GB`, `512 MB`, `17 B`."""
    value = float(size)
    unit, *larger = ("B", "kB", "MB", "GB", "TB")
    while abs(value) >= 999.5 and larger:
        value, unit = value / 1000, larger.pop(0)
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def _affinity_cores() -> int:
    """Distinct physical cores among the logical processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        return int(psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        topology = _CPUS / f"cpu{cpu}" / "topology"
        package, core = (_read(topology / n) for n in ("physical_package_id", "core_id"))
        if package is None or core is None:
            return len(allowed)  # no topology is published: count each processor
        cores.add((package, core))
    return max(1, len(cores))


def _cpu_quota() -> float | None:
    """Processors' worth of time per period that the control group grants, or None for no limit."""
    quotas = []
    for group in _groups("cpu"):
        fields = (_read(group / "cpu.max") or "").split()
        if not fields:
            fields = [_read(group / f"cpu.cfs_{n}_us") or "" for n in ("quota", "period")]
        if len(fields) == 2 and all(f.strip().isdigit() for f in fields) and int(fields[1]):
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, used) of every control group above this process that limits memory.

    File pages that the kernel drops first (`inactive_file`) do not count as used.
    """
    limits = []
    for group in _groups("memory"):
        limit = _number(group, "memory.max", "memory.limit_in_bytes")
        used = _number(group, "memory.current", "memory.usage_in_bytes")
        if limit is None or used is None or limit >= 1 << 60:  # version 1's "no limit" is 2^63
            continue
        statistics = _read(group / "memory.stat") or ""
        match = _TOTAL_INACTIVE.search(statistics) or _INACTIVE.search(statistics)
        limits.append((limit, max(0, used - (int(match[1]) if match else 0))))
    return limits


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its ancestors, for one controller.

    Inside a container the path in /proc/self/cgroup may be the host's: folders that are not
    mounted are skipped, and the mount's root is the container's own group.
    """
    for line in (_read(_PROC / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [_CGROUP, _CGROUP / "unified"]
        elif controller in controllers.split(","):
            mounts = [_CGROUP / controllers, _CGROUP / controller]
        else:
            continue
        mount = next((m for m in mounts if m.is_dir()), None)
        if mount is None:
            continue
        inner = Path(*(part for part in Path(path).parts if part not in ("/", "..")))
        for group in (mount / inner, *(mount / parent for parent in inner.parents)):
            if group.is_dir():
                yield group


def _number(folder: Path, *names: str) -> int | None:
    """The integer in the first of `names` that exists in `folder`; None for none, or for `max`."""
    for name in names:
        text = (_read(folder / name) or "").strip()
        if text.isdigit():
            return int(text)
    return None


def _read(path: Path) -> str | None:
    """A small system file's text, or None where the system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return None
