"""CUDA kernels: declaring them, and turning them into PTX. Nothing here imports Numba's CUDA target
before a kernel is compiled.

A kernel is a function over addresses and numbers, written as any `@cuda.jit` function is. Its
primitives (cuda_prims.py), device functions and the name `cuda` are stand-ins, which are resolved
when it is compiled, or when it is simulated (cuda_simulator.py): so one source serves both, and
both can be had in one process.

Shapes: no arrays here; every kernel states its own.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import CellType, CodeType, FunctionType, MappingProxyType

from .disk_cache import keep, kept, place

LETTERS = MappingProxyType({"a": "int64", "l": "int64", "i": "int32", "f": "float32"})
"""What a kernel's arguments are: an address, a long or an ordinary integer, a float."""


class Stand:
    """A name that means one thing when a kernel is compiled and another when it is simulated."""

    def compiled(self):
        """What Numba's CUDA target is to see."""
        raise NotImplementedError

    def simulated(self):
        """What plain Python is to call."""
        raise NotImplementedError


class Function(Stand):
    """A device function: it is inlined into the kernels that call it."""

    def __init__(self, function):
        self.function = function
        self.__doc__ = function.__doc__
        self._compiled = self._simulated = None

    def compiled(self):
        from numba import cuda

        if self._compiled is None:
            self._compiled = cuda.jit(device=True, inline="always")(resolved(self.function))
        return self._compiled

    def simulated(self):
        if self._simulated is None:
            self._simulated = resolved(self.function, simulated=True)
        return self._simulated


def device(function):
    """Declare a function that kernels call."""
    return Function(function)


def resolved(function, *, simulated=False):
    """The function with its stand-ins, also those it closes over, replaced by what they mean."""

    def meaning(value):
        if not isinstance(value, Stand):
            return value
        return value.simulated() if simulated else value.compiled()

    used = _names(function.__code__)
    names = {n: meaning(v) for n, v in function.__globals__.items() if n in used}
    cells = [CellType(meaning(cell.cell_contents)) for cell in function.__closure__ or ()]
    return FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__,
        function.__defaults__, tuple(cells),
    )  # fmt: skip


def _names(code):
    """The global names that a function's code uses, and those of the functions in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


@dataclass(frozen=True)
class CudaKernel:
    """A kernel before it is compiled.

    `arguments` has a letter of LETTERS for each; a block has `threads` threads, of which `resident`
    blocks are to fit a multiprocessor at once: that bounds the registers, and lets loads be issued
    ahead of their use. `shared` is the bytes of shared memory of a block, `since` the least compute
    capability (major, minor) that has what it uses.
    """

    name: str
    function: FunctionType
    arguments: str
    threads: int = 128
    resident: int = 1
    shared: int = 0
    since: tuple[int, int] = (7, 5)

    def ptx(self, capability):
        """The PTX of the kernel for a GPU of a compute capability (major, minor), from the disk if
        it is there; its entry has the kernel's name. It is the same for all of them, written for
        the oldest: what is particular to a GPU, the driver's assembler knows, also of later ones
        than the compiler does."""
        if capability < self.since:
            raise ValueError(f"{self.name} needs compute capability {self.since}")
        path = self._cached()
        data = kept(path) if path is not None else None
        if data is not None:
            return data.decode()
        text = self._compile()
        if path is not None:
            with suppress(OSError):  # it is made again otherwise
                keep(path, text.encode())
        return text

    def _compile(self):
        from numba import cuda
        from numba.cuda import types

        signature = tuple(getattr(types, LETTERS[letter]) for letter in self.arguments)
        text, _ = cuda.compile_ptx(
            resolved(self.function), signature, cc=self.since, fastmath=True,
            launch_bounds=(self.threads, self.resident),
        )  # fmt: skip
        mangled = re.search(r"\.visible \.entry (\w+)", text)[1]
        return text.replace(mangled, self.name)

    def _cached(self):
        """Where its PTX is kept: as compiled code of the file is, which so goes with it."""
        tag = hashlib.sha256(_versions().encode()).hexdigest()[:16]
        return place(self.function, f"{self.name}-{tag}.ptx")


CUDA_KERNELS = {}
"""All declared kernels by name."""


def cuda_kernel(arguments, *, name="", **about):
    """Declare a kernel, called like its function unless it is given a `name`; see CudaKernel."""

    def declare(function):
        made = CudaKernel(name or function.__name__, function, arguments, **about)
        if made.name in CUDA_KERNELS:
            raise ValueError(f"two CUDA kernels are called {made.name}")
        CUDA_KERNELS[made.name] = made
        return made

    return declare


@cache
def _versions():
    """What of the installation decides how PTX comes out."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("numba", "llvmlite", "numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    home = os.environ.get("CUDA_HOME", "")  # where a compiler may be that no package has
    return " ".join([*found, home, str(os.stat(home).st_mtime_ns) if os.path.isdir(home) else ""])
