"""Kernels as machine code: declaring them, caching them on disk, getting their addresses.

A kernel is a function `kernel(args, thread, threads) -> None` of three integers: the address of
its arguments (int64 each, floats as the bits of a float64), the index of the thread that runs it
and how many run it. It is serial inside and takes its own share of the work, so that a team of
threads can walk a table of kernels in one call (threads.py).

Shapes: no arrays here; every kernel states its own.
"""

import ctypes
import hashlib
import os
import re
import shutil
import struct
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
import numba
from numba import types
from numba.core import caching, ccallback
from numba.core.compiler_lock import global_compiler_lock

from ..registry import register_kernel
from .simd import JIT
from .vector import peek_f64, peek_i64

SIGNATURE = (types.int64, types.int64, types.int64)
PRUNE_AFTER_DAYS = 14
_HERE = Path(__file__).parent

jit = numba.njit(nogil=True, error_model="numpy") if JIT else (lambda function: function)
"""Decorator of the functions that kernels are made of; they are compiled into each kernel."""
inline = (
    numba.njit(nogil=True, error_model="numpy", forceinline=True)
    if JIT
    else (lambda function: function)
)
"""The same for small ones that must melt into their caller."""


@cache
def _imports(path):
    """The bytes of a kernel file, and the kernel files beside it that it imports."""
    source = path.read_bytes()
    names = re.findall(rb"^from \.(\w+) import", source, re.MULTILINE)
    for line in re.findall(rb"^from \. import (.+)$", source, re.MULTILINE):
        names += [name.split()[0] for name in line.split(b",")]
    return source, tuple(sorted({path.parent / f"{n.decode()}.py" for n in names}))


@cache
def stamp(path):
    """A hash of a kernel file, of all it imports, and of the compilers' versions.

    Numba's own stamp covers one file only, and would go stale silently.
    """
    seen, todo = {}, [path]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name], more = _imports(name)
            todo += more
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for name in sorted(seen):
        digest.update(seen[name])
    return digest.hexdigest()[:16]


@cache
def cache_root():
    """The folder of compiled kernels, or None when no place can be written."""
    import platformdirs

    candidates = [platformdirs.user_cache_path("onnxstream_nb") / "kernels"]
    if hasattr(os, "getuid"):
        candidates.append(Path(tempfile.gettempdir()) / f"onnxstream_nb-{os.getuid()}")
    if os.environ.get("ONNXSTREAM_CACHE"):
        candidates.insert(0, Path(os.environ["ONNXSTREAM_CACHE"]) / "kernels")
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            tempfile.TemporaryFile(dir=folder).close()
            status = folder.stat()
        except OSError:
            continue
        # Anybody can make a folder among the temporary ones, and fill it with machine code.
        temporary = folder.parent == Path(tempfile.gettempdir())
        if not temporary or (status.st_uid == os.getuid() and not status.st_mode & 0o022):
            return folder
    return None


class _Locator(caching._CacheLocator):
    """Tells Numba's cache to use our folder and our stamp."""

    def __init__(self, function):
        self._path = Path(function.__code__.co_filename)

    def get_cache_path(self):
        return str(cache_root() / f"{self._path.stem}-{stamp(self._path)}")

    def get_source_stamp(self):
        return stamp(self._path)

    def get_disambiguator(self):
        return ""

    @classmethod
    def from_function(cls, function, path):
        return cls(function) if cache_root() is not None else None


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _KernelCache(caching.Cache):
    _impl_class = _CacheImpl


def prune():
    """Delete the compiled code of kernel files that no longer exist in that form."""
    root = cache_root()
    oldest = time.time() - PRUNE_AFTER_DAYS * 86400
    for folder in root.iterdir() if root else ():
        stem, _, version = folder.name.rpartition("-")
        current = (_HERE / f"{stem}.py").exists() and version == stamp(_HERE / f"{stem}.py")
        with suppress(FileNotFoundError):  # another process prunes as well
            if not current and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


class Kernel(ccallback.CFunc):
    """One kernel. `address` compiles it when the cache lacks it; `load` never compiles."""

    def __init__(self, function):
        self.name = function.__name__
        self.__doc__ = function.__doc__
        if not JIT:
            self._pyfunc, self._wrapper_address = function, 0
            return
        options = {"error_model": "numpy"}
        super().__init__(function, (SIGNATURE, types.void), locals={}, options=options)
        self._cache = None

    @property
    def loaded(self):
        return self._wrapper_address is not None or not JIT

    @global_compiler_lock
    def load(self):
        """Load the machine code from the disk cache; False when it is not there, or damaged."""
        if not self.loaded:
            self.enable_caching()
            try:
                result = self._cache.load_overload(self._sig, self._targetdescr.target_context)
            except Exception:  # bytes that are no pickle raise almost anything
                self._cache.flush()
                return False
            if result is None:
                return False
            self._library = result.library
            self._wrapper_name = result.fndesc.llvm_cfunc_wrapper_name
            self._wrapper_address = self._library.get_pointer_to_function(self._wrapper_name)
        return True

    def enable_caching(self):
        if self._cache is None:
            usable = cache_root() is not None
            self._cache = _KernelCache(self._pyfunc) if usable else caching.NullCache()

    @property
    def address(self):
        if not self.loaded:
            with global_compiler_lock:
                if not self.load():
                    self.compile()
        return self._wrapper_address

    def __call__(self, args, thread=0, threads=1):
        """Run it here on (n,) int64 arguments at address `args`, releasing the GIL."""
        if not JIT:
            self._pyfunc(args, thread, threads)
        else:
            self.call(args, thread, threads)

    @property
    def call(self):
        if "_callable" not in self.__dict__:
            kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
            self._callable = kind(self.address)
        return self._callable


def kernel(function):
    """Declare a kernel; its name is the function's and is unique in the package."""
    entry = Kernel(function)
    register_kernel(entry.name, entry)
    return entry


def float_bits(x):
    """A float as the int64 that carries it in a kernel's arguments."""
    return struct.unpack("q", struct.pack("d", x))[0]


@jit
def arg(args, i):
    """Argument i as int64."""
    return peek_i64(args + 8 * i)


@jit
def arg_float(args, i):
    """Argument i as float64."""
    return peek_f64(args + 8 * i)


@jit
def share(n, align, thread, threads):
    """This thread's contiguous range (start, stop) of n items, cut at multiples of align."""
    blocks = (n + align - 1) // align
    start = blocks * thread // threads * align
    stop = blocks * (thread + 1) // threads * align
    return min(n, start), min(n, stop)
