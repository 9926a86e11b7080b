"""The verb doctor: what this installation and this machine can do, each problem with its remedy."""

from __future__ import annotations

import difflib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, device
from ..device import format_size
from ..errors import OnnxstreamError
from .options import Option
from .verbs import DEBUG, VERBS

FEATURES = ("avx2", "f16c", "fma", "avx512f", "avx512vnni", "avx512bf16", "amx-tile", "amx-int8")
"""LLVM's names of the features that kernels are chosen by, on x86."""

BASELINE = ("avx2", "f16c", "fma")
"""Without these an x86 processor runs the plain kernels only."""

PACKAGES = ("numba", "llvmlite", "numpy", "onnx", "tokenizers", "sentencepiece", "huggingface_hub")

OTHER_VARIABLES = ("ONNXSTREAM_CACHE",)
"""Variables that stand for no flag."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `state` is ok, note (works, could be better) or broken, and a `remedy` says
    what to do about the last two."""

    subject: str
    state: str
    detail: str
    remedy: str = ""


def doctor(options: Mapping[str, Any]) -> int:
    """Print every check; the exit code is 1 when something is broken."""
    checks = list(run_checks())
    if options["json"]:
        print(json.dumps([asdict(check) for check in checks], ensure_ascii=False))
    else:
        for check in checks:
            print(text(check))
    return int(any(check.state == "broken" for check in checks))


def text(check: Check) -> str:
    """A check as one line, and its remedy on a second one."""
    mark = {"ok": "ok  ", "note": "note", "broken": "FAIL"}[check.state]
    line = f"{mark}  {check.subject:<17}{check.detail}"
    return f"{line}\n      {'':<17}{check.remedy}" if check.remedy else line


def run_checks() -> Iterator[Check]:
    """All checks in the order in which they are shown; a check that raises is a broken one."""
    every: tuple[Callable[[], Iterator[Check]], ...] = (
        python, packages, compiler, processor, memory, caches, cuda, terminal, variables,
    )  # fmt: skip
    for check in every:
        try:
            yield from check()
        except Exception as error:  # the report must reach its end, whatever is broken
            remedy = "python -m pip install --force-reinstall onnxstream_nb"
            yield Check(check.__name__, "broken", f"{type(error).__name__}: {error}", remedy)


def python() -> Iterator[Check]:
    """The interpreter's and this package's version."""
    detail = f"{platform.python_version()} on {platform.platform()}; onnxstream_nb {__version__}"
    yield Check("python", "ok", detail)


def packages() -> Iterator[Check]:
    """Whether every package this one needs is there, and its version."""
    for name in PACKAGES:
        try:
            yield Check(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, "broken", "not installed", f"python -m pip install {name}")


def compiler() -> Iterator[Check]:
    """Whether Numba compiles, and the kernels load."""
    import numba

    from .. import registry

    if numba.config.DISABLE_JIT:
        remedy = "unset NUMBA_DISABLE_JIT: without compilation everything is far too slow"
        yield Check("compiler", "note", "disabled", remedy)
    else:
        answer = numba.njit(lambda x: x + 1)(41)
        yield Check("compiler", "ok" if answer == 42 else "broken", "numba compiles and runs")
    names = registry.operators()
    yield Check("kernels", "ok" if names else "broken", f"{len(names)} operators")


def processor() -> Iterator[Check]:
    """Name, cores, and the features that kernels are chosen by."""
    yield Check("processor", "ok", f"{device.cpu_name()}, {device.physical_cores()} cores usable")
    features = device.cpu_features()
    if platform.machine().lower() not in ("x86_64", "amd64", "x86"):
        yield Check("features", "ok", " ".join(sorted(features)) or "none known")
        return
    has = " ".join(name for name in FEATURES if name in features) or "none"
    missing = [name for name in BASELINE if name not in features]
    if missing:
        remedy = f"no {', '.join(missing)}: the plain kernels run; unset NUMBA_CPU_NAME and"
        yield Check("features", "note", has, f"{remedy} NUMBA_CPU_FEATURES if they hide it")
    else:
        yield Check("features", "ok", has)


def memory() -> Iterator[Check]:
    """Free and total memory."""
    free, total = device.memory_available(), device.memory_total()
    detail = f"{format_size(free)} free of {format_size(total)}"
    if free < 1 << 29:
        yield Check("memory", "note", detail, "close other programs, or give --ram")
    else:
        yield Check("memory", "ok", detail)


def caches() -> Iterator[Check]:
    """Whether the cache can be written, and how large its parts are."""
    from .. import hub

    folder = hub.cache_dir()
    detail = f"{folder}, {format_size(device.disk_free(folder))} free on its disk"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "make it writable, or set ONNXSTREAM_CACHE to a folder that is"
        yield Check("cache", "broken", f"{folder}: {error.strerror}", remedy)
        return
    yield Check("cache", "ok", detail)
    models = hub.installed()
    partial = [m.name for m in models if not m.complete]
    size = format_size(sum(m.size_bytes for m in models))
    yield Check(
        "models",
        "note" if partial else "ok",
        f"{len(models)} installed, {size}",
        f"in part only: {', '.join(partial)}; `onnxstream_nb pull` goes on" if partial else "",
    )
    yield Check("kernel cache", "ok", format_size(_folder_size(folder / "kernels")))
    yield Check("packed weights", "ok", format_size(_folder_size(hub.packed_dir())))


def cuda() -> Iterator[Check]:
    """Whether a GPU can be used by --cuda, and what that lacks; no GPU is no problem."""
    from ..gpu import driver, found

    parts = found.parts()
    if found.driver_version() is None and not found.has_gpu():
        yield Check("cuda", "ok", "none; the CPU is used")
        return
    for part in parts:
        state = "note" if part.remedy else "ok"
        yield Check(part.name, state, part.detail, part.remedy and f"for --cuda: {part.remedy}")
    if any(part.remedy for part in parts):
        yield Check("cuda", "ok", "cannot be used yet; the CPU is used")
        return
    try:
        with closing(driver.CudaDevice()) as gpu:
            room = f"{format_size(gpu.free())} free of {format_size(gpu.memory)}"
    except OnnxstreamError as error:
        remedy = "nvidia-smi shows what the driver finds; CUDA_VISIBLE_DEVICES may hide it"
        yield Check("cuda", "note", f"{error}; the CPU is used", remedy)
        return
    major, minor = gpu.capability
    yield Check("cuda", "ok", f"{gpu.name}, capability {major}.{minor}, {room}")


def terminal() -> Iterator[Check]:
    """What kind of terminal stdout is, and whether it can show every character."""
    kind = os.environ.get("TERM", "unknown") if sys.stdout.isatty() else "none (piped)"
    encoding = (sys.stdout.encoding or "unknown").lower()
    detail = f"{kind}, {encoding}"
    if encoding.replace("-", "") == "utf8":
        yield Check("terminal", "ok", detail)
    else:
        yield Check("terminal", "note", detail, "set PYTHONUTF8=1, else some characters become ?")


def variables() -> Iterator[Check]:
    """ONNXSTREAM_ variables that are set; one that stands for no flag is likely a slip."""
    known = {o.variable for o in _every_option()} | set(OTHER_VARIABLES)
    for name in sorted(n for n in os.environ if n.startswith("ONNXSTREAM_")):
        if name in known:
            yield Check("variable", "ok", f"{name}={os.environ[name]}")
            continue
        close = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {close[0]}?" if close else "no flag of that name: unset it"
        yield Check("variable", "note", name, remedy)


def _every_option() -> Iterator[Option]:
    yield DEBUG
    for verb in VERBS.values():
        yield from verb.options


def _folder_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
