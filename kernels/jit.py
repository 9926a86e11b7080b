"""Kernels as machine code: declaring them, and getting their addresses.

A kernel is a function `kernel(args, thread, threads) -> None` of three integers: the address of
its arguments (int64 each, floats as the bits of a float64), the index of the thread that runs it
and how many run it. It is serial inside and takes its own share of the work, so that a team of
threads can walk a table of kernels in one call (threads.py).

Shapes: no arrays here; every kernel states its own.
"""

import ctypes
import struct
import threading

from ..registry import register_kernel
from .disk_cache import keep, kept, place
from .machine_code import Function, compile_kernel, load_object, target
from .simd import JIT
from .vector import peek_f64, peek_i64

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def jit(function):
    """Decorator of the functions that kernels are made of; they are compiled into each kernel."""
    return Function(function) if JIT else function


def inline(function):
    """The same for small ones that must melt into their caller."""
    return Function(function, forceinline=True) if JIT else function


class Kernel:
    """One kernel. `address` compiles it when the disk cache lacks it; `load` never compiles."""

    _lock = threading.RLock()  # several Python threads may want one kernel

    def __init__(self, function):
        self.name, self.function = function.__name__, function
        self.__doc__ = function.__doc__
        self._symbol = f"onnxstream_nb_{self.name}"
        self._address = None if JIT else 0

    @property
    def loaded(self):
        return self._address is not None

    @property
    def _path(self):
        return place(self.function, f"{self.name}-{target()}.o")

    def load(self):
        """Load the machine code from the disk cache; False when it is not there, or damaged."""
        with self._lock:
            if not self.loaded:
                path = self._path
                data = kept(path) if path else None
                if data is None:
                    return False
                self._address = load_object(data, self._symbol)
            return True

    def compile(self):
        """Make its machine code, and keep it on disk where that is possible."""
        with self._lock:
            data = compile_kernel(self.function, self._symbol).object_file()
            path = self._path
            if path:
                keep(path, data)
            self._address = load_object(data, self._symbol)

    @property
    def address(self):
        if not self.loaded:
            with self._lock:
                if not self.load():
                    self.compile()
        return self._address

    def __call__(self, args, thread=0, threads=1):
        """Run it here on (n,) int64 arguments at address `args`, releasing the GIL."""
        if not JIT:
            self.function(args, thread, threads)
        else:
            self.call(args, thread, threads)

    @property
    def call(self):
        if "_callable" not in self.__dict__:
            self._callable = _ENTRY(self.address)
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
