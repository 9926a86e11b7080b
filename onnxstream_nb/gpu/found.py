"""What a GPU needs of this machine: NVIDIA's driver, packages, a compiler. Looked for without
importing any of it, so that saying "none" takes no time."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

INSTALL = "pip install 'onnxstream_nb[cuda]'"
DRIVER = "580"  # the least for CUDA 13.0, which the extra `cuda` compiles for
_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)
_COMPILERS = ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12")  # distributions that NVVM comes in
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY = "0x10de", "0x03"


@dataclass(frozen=True)
class Part:
    """Something that is needed: what was found, and when it will not do, what mends it."""

    name: str
    detail: str
    remedy: str = ""


def parts() -> list[Part]:
    """The driver, numba-cuda and its compiler; all are as they should be if none has a remedy."""
    driver = driver_version()
    if driver is None:
        found = "no NVIDIA driver was found"
        return [Part("cuda driver", found, f"install one for your GPU, {DRIVER} or newer")]
    here = [Part("cuda driver", f"CUDA {driver[0]}.{driver[1]}")]
    numba = package_version("numba-cuda")
    if numba is None:
        return [*here, Part("numba-cuda", "numba-cuda is not installed", INSTALL)]
    here.append(Part("numba-cuda", numba))
    compiler = compiler_version()
    if compiler is None:
        missing = "its compiler was not found (NVVM, and NVRTC beside it)"
        return [*here, Part("nvvm", missing, f"{INSTALL}, or set CUDA_HOME to a CUDA toolkit")]
    wanted = tuple(int(n) for n in compiler.split(".")[:2] if n.isdigit())
    if wanted > driver:
        detail = f"NVVM {compiler} is newer than the driver, which knows CUDA up to "
        remedy = f"a driver {DRIVER} or newer, or pip install 'numba-cuda[cu12]' (docs/cuda.md)"
        return [*here, Part("nvvm", f"{detail}{driver[0]}.{driver[1]}", remedy)]
    return [*here, Part("nvvm", compiler)]


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver knows, (major, minor); None without a driver."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        number = ctypes.c_int()
        if not library.cuDriverGetVersion(ctypes.byref(number)):
            return number.value // 1000, number.value % 1000 // 10
    return None


def package_version(name: str) -> str | None:
    """The version of an installed distribution, None when it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler_version() -> str | None:
    """The version of NVVM, or where it is when its package does not say; None when Numba would not
    find it, or not NVRTC."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return None
    try:
        library = load_nvidia_dynamic_lib("nvvm")
        load_nvidia_dynamic_lib("nvrtc")  # which Numba asks what GPUs there may be
    except RuntimeError:  # pathfinder's: it is nowhere, or not to be loaded
        return None
    known = [package_version(name) for name in _COMPILERS]
    return next((version for version in known if version), f"at {library.abs_path}")


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is in this machine, as Linux lists it, with a driver or without."""
    return any(
        _read(each / "vendor") == _NVIDIA and _read(each / "class").startswith(_DISPLAY)
        for each in (_PCI.iterdir() if _PCI.is_dir() else ())
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it was taken out meanwhile
        return ""
