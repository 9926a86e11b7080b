"""Memory for results: an arena in which large arrays take the place of those nobody holds any more.

Shapes: none; addresses and sizes are in bytes.

Fresh memory comes from the system a page at a time, zeroed: for the activations of a long prompt
that took a fifth of the time of a pass. So the arena keeps what it has touched, and gives pages
back when it is told to. It reserves one long range of addresses, of which pages that nobody has
written to cost nothing, and puts each array at the lowest place where it fits. Holes between arrays
that nothing fits in are given back before what has been touched exceeds the most that was alive at
once by more than an eighth: for any sizes in any order, addresses are wasted and not memory.
"""

import math
import mmap
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

from ..registry import op
from .intervals import Intervals

SMALL = 1 << 16  # bytes: below, NumPy's own allocator keeps memory at hand
LINE = 64  # every array begins on a cache line
PAGE = mmap.PAGESIZE
SLACK = 8  # touched memory exceeds the most that was alive by this part at most
SPARE = 1 << 22  # bytes that `trim_unused` leaves
RANGE = 1 << 26  # bytes reserved at a time where addresses are dear
SPARSE = hasattr(mmap, "MADV_DONTNEED")  # untouched pages cost nothing, touched ones can go


def private_memory(size):
    """Zeroed memory of this process alone, in large pages where the system has them."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _address_space():
    """Bytes worth reserving at once: all of memory, or little where addresses are limited."""
    if not SPARSE:
        return RANGE
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return RANGE
    return os.sysconf("SC_PHYS_PAGES") * PAGE


def _up(value, step):
    return -(-value // step) * step


def _down(value, step):
    return value // step * step


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes: in arrays now and at the most; touched and not given back, now and at the most."""

    live: int
    peak_live: int
    touched: int
    peak_touched: int


class _Range:
    """One stretch of addresses: what is free, and what has been touched since it was reserved."""

    def __init__(self, needed):
        self.memory = self._reserve(_up(needed, PAGE))
        self.free = Intervals((0, len(self.memory)))
        self.touched = Intervals()

    @staticmethod
    def _reserve(needed):
        for size in (_address_space(), RANGE):
            if size > needed:
                try:
                    return private_memory(size)
                except OSError:
                    continue  # a system that counts what is reserved: less will do
        try:
            return private_memory(needed)
        except OSError as error:
            raise MemoryError(f"the system has no {needed} bytes for an array: {error}") from error

    def give_back(self, most):
        """Give idle pages back to the system, the highest first, until it is `most` bytes or all;
        how many it was. A page that an array has a part of stays."""
        given = 0
        for low, high in reversed(self.free.spans):
            for start, stop in reversed(self.touched.overlap(low, high)):
                start = max(_up(low, PAGE), _down(max(start, stop - most + given), PAGE))
                stop = min(_down(high, PAGE), _up(stop, PAGE))
                if given < most and start < stop:
                    before = self.touched.total
                    self.memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
                    self.touched.remove(start, stop)
                    given += before - self.touched.total
        return given


class Arena:
    """Hands out arrays, and takes their memory back when they and all views of them are gone.

    Threads may share it. An array may die in any thread at any moment, even within these methods:
    it is put on a list then, and looked at by who comes next.
    """

    def __init__(self):
        self._ranges = []
        self._held = {}  # id of a reference -> it: to an array, it says when that dies
        self._dead = deque()
        self._lock = threading.Lock()
        self._live = self._peak_live = self._peak_touched = 0
        self._most = self._recent = 0  # alive at once: since all was given back, since trim_unused

    def array(self, shape, dtype, nbytes):
        """An array of any contents, `nbytes` long, which begins on a cache line."""
        size = max(LINE, _up(nbytes, LINE))
        with self._lock:
            self._collect()
            home, start = self._place(size)
            home.free.remove(start, start + size)
            self._count(size)
            fresh = size - sum(b - a for a, b in home.touched.overlap(start, start + size))
            self._give_back(self._touched() + fresh - self._most - self._most // SLACK)
            home.touched.add(start, start + size)
            self._peak_touched = max(self._peak_touched, self._touched())
        array = np.ndarray(shape, dtype, buffer=home.memory, offset=start)

        def died(reference):
            self._held.pop(id(reference), None)
            self._dead.append((home, start, size))

        reference = weakref.ref(array, died)
        self._held[id(reference)] = reference
        return array

    def _place(self, size):
        for home in self._ranges:
            start = home.free.lowest(size)
            if start is not None:
                return home, start
        self._ranges.append(_Range(size))
        return self._ranges[-1], 0

    def _count(self, size):
        self._live += size
        self._most = max(self._most, self._live)
        self._recent = max(self._recent, self._live)
        self._peak_live = max(self._peak_live, self._live)

    def _collect(self):
        """Free the places of arrays that have died."""
        while self._dead:
            home, start, size = self._dead.popleft()
            home.free.add(start, start + size)
            self._live -= size

    def _give_back(self, most):
        """Give back idle pages until it is `most` bytes or all."""
        for home in reversed(self._ranges if SPARSE else []):
            if most <= 0:
                return
            most -= home.give_back(most)

    def _touched(self):
        return sum(home.touched.total for home in self._ranges)

    def usage(self):
        """What it holds now, and held at the most since `reset_peaks`."""
        with self._lock:
            self._collect()
            return Usage(self._live, self._peak_live, self._touched(), self._peak_touched)

    def reset_peaks(self):
        """Count the most that is held from now on."""
        with self._lock:
            self._collect()
            self._peak_live, self._peak_touched = self._live, self._touched()

    def trim(self, keep=0):
        """Give memory in which no array lives back to the system, but for `keep` bytes."""
        with self._lock:
            self._collect()
            self._trim(keep)

    def trim_unused(self):
        """Give back what has not been needed since the last time, but for a little: behind a long
        prompt, single tokens need less than it did."""
        with self._lock:
            self._collect()
            recent, self._recent = self._recent, self._live
            self._trim(recent + recent // SLACK + SPARE - self._live)

    def _trim(self, keep):
        if keep <= 0:
            self._most = self._live
        excess = self._touched() - self._live - keep
        if excess > 0 and (keep <= 0 or not SPARSE):  # with its last reference goes a mapping
            self._ranges = [r for r in self._ranges if r.free.total < len(r.memory)]
        self._give_back(self._touched() - self._live - keep)


_arena = Arena()


def empty(shape, dtype=np.float32):
    """An array of any contents, as numpy.empty; large ones in the arena."""
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * math.prod((shape,) if isinstance(shape, int) else shape)
    if nbytes < SMALL:
        return np.empty(shape, dtype)
    return _arena.array(shape, dtype, nbytes)


def contiguous(x, dtype=None):
    """x in C order and of that type: itself when it is so, else a copy."""
    dtype = x.dtype if dtype is None else np.dtype(dtype)
    if x.flags.c_contiguous and x.dtype == dtype:
        return x
    out = np.empty(x.shape, dtype) if dtype.hasobject else empty(x.shape, dtype)
    np.copyto(out, x, casting="unsafe")
    return out


def computed(function, *operands):
    """A function of arrays; the result is in the arena when it is large and that of a ufunc."""
    if not isinstance(function, np.ufunc) or max(o.size for o in operands) < SMALL // 8:
        return function(*operands)
    dtype = function.resolve_dtypes((*(o.dtype for o in operands), None))[-1]
    if dtype.hasobject:
        return function(*operands)
    shape = np.broadcast_shapes(*(o.shape for o in operands))
    return function(*operands, out=empty(shape, dtype))


@op("Arena", domain="onnxstream_nb")
def arena():
    """The process's arena, for who counts its bytes or gives them back."""
    return _arena
