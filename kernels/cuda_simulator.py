"""Runs CUDA kernels in plain Python: their logic can be tested, and watched, without a GPU.

Dims: a grid of blocks, a block of threads, a warp of 32 of them.

Every thread is a coroutine, so a run is the same each time, and threads take turns only where they
wait for each other: a warp goes as far as it can before another does. In which order, and whether
asynchronous copies land at once or as late as they may, is the caller's to choose: a missing
barrier shows itself in one order or the other. Global memory is this process's: an access outside
what was allocated, or at an address that is not a multiple of its size, is an error, as is reading
shared memory that nothing was written to.
"""

import ctypes
import random
from bisect import bisect_right

import numpy as np

from .cuda_kernel import resolved

WARP = 32
GLOBAL, SHARED = 1, 3
ORDERS = {
    "forwards": lambda count, turn: range(count),
    "backwards": lambda count, turn: range(count)[::-1],
    "random": lambda count, turn: random.Random(turn).sample(range(count), count),
}
"""In which order so many warps, and the lanes of one, are taken, the turn's number given."""


class Memory:
    """Global memory: arrays of this process, by their addresses."""

    def __init__(self, arrays):
        spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays)
        self._starts, self._stops = [s for s, _ in spans], [e for _, e in spans]

    def vector(self, address, count, dtype, *, writing=False):
        """(count,) elements at an address, as a look at them, to be read or written."""
        dtype, address = np.dtype(dtype), int(address)
        nbytes = count * dtype.itemsize
        number = bisect_right(self._starts, address) - 1
        if number < 0 or address + nbytes > self._stops[number]:
            raise IndexError(f"{nbytes} bytes at {address} are outside of what was allocated")
        if address % nbytes:
            raise IndexError(f"{nbytes} bytes at {address}, which is not aligned to them")
        return np.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype)

    def load(self, address, dtype):
        """One element; halves as float32, integers as Python's."""
        found = self.vector(address, 1, dtype)
        return np.float32(found[0]) if found.dtype.kind == "f" else found.item()

    def store(self, address, value, dtype):
        """Write one element."""
        with np.errstate(over="ignore"):
            self.vector(address, 1, dtype)[0] = value


class Shared(Memory):
    """A block's shared memory: addresses from 0; bytes that nothing was written to are known."""

    def __init__(self, nbytes):
        self._bytes = np.zeros(nbytes + 16, np.uint8)
        self._bytes = self._bytes[-self._bytes.ctypes.data % 16 :][:nbytes]
        self._unwritten = bytearray(b"\1" * nbytes)  # whose search is quicker than an array's

    def vector(self, address, count, dtype, *, writing=False):
        dtype, address = np.dtype(dtype), int(address)
        nbytes = count * dtype.itemsize
        if not 0 <= address <= len(self._bytes) - nbytes:
            raise IndexError(f"{nbytes} bytes at {address} of {len(self._bytes)} shared ones")
        if address % nbytes:
            raise IndexError(f"{nbytes} shared bytes at {address}, which is not aligned to them")
        stop = address + nbytes
        if writing:
            self._unwritten[address:stop] = bytes(nbytes)
        elif self._unwritten.find(1, address, stop) >= 0:
            raise IndexError(f"{nbytes} shared bytes at {address} are read, and never written")
        return self._bytes[address:stop].view(dtype)

    def store(self, address, value, dtype):
        with np.errstate(over="ignore"):
            self.vector(address, 1, dtype, writing=True)[0] = value

    def land(self, address, data):
        """An asynchronous copy arrives."""
        self.vector(address, len(data), np.uint8, writing=True)[:] = data


class _Thread:
    """One CUDA thread: a coroutine, what it waits for, and the copies it has begun."""

    def __init__(self, number, block, place):
        self.number, self.block, self.place = number, block, place
        self.waits_for, self.given, self.received = "", None, None
        self.pending, self.groups = [], []
        self.coroutine = None

    def wait(self, what, given=None):
        """Give the turn away until all that `what` wants have come; what they gave."""
        self.waits_for, self.given = what, given
        self.coroutine.parent.switch()
        return self.received


class _Block:
    def __init__(self, index, sizes, grid, memory, shared_bytes, eager):
        self.index, self.sizes, self.grid, self.memory = index, sizes, grid, memory
        self.shared, self.eager = Shared(shared_bytes), eager
        self.threads = [
            _Thread(number, self, place[::-1])
            for number, place in enumerate(np.ndindex(*sizes[::-1]))
        ]


_current = None


def _thread():
    if _current is None:
        raise RuntimeError("a simulated primitive was called outside of a simulated kernel")
    return _current


def memory(space):
    """Global memory, or this block's shared one."""
    block = _thread().block
    return block.memory if space == GLOBAL else block.shared


def exchange(value):
    """The values of all lanes of this warp, and this lane's number."""
    thread = _thread()
    return thread.wait("warp", value), thread.number % WARP


def copy_later(to, source, nbytes):
    """Begin to copy 16 bytes to shared memory: so many from global memory, and zeros."""
    thread = _thread()
    data = np.zeros(16, np.uint8)
    if nbytes:
        data[:nbytes] = thread.block.memory.vector(source, 16, np.uint8)[:nbytes]
    if thread.block.eager:
        thread.block.shared.land(to, data)
    else:
        thread.pending.append((to, data))


def commit():
    """The copies begun so far are a group."""
    thread = _thread()
    thread.groups.append(thread.pending)
    thread.pending = []


def wait(left):
    """Let all groups but the newest `left` land."""
    thread = _thread()
    while len(thread.groups) > left:
        for to, data in thread.groups.pop(0):
            thread.block.shared.land(to, data)


class _Dim:
    def __init__(self, pick):
        self._pick = pick

    x = property(lambda self: self._pick()[0])
    y = property(lambda self: self._pick()[1])
    z = property(lambda self: self._pick()[2])


class _Local:
    @staticmethod
    def array(shape, dtype):
        """A thread's own array; what nothing was written to is NaN, or an odd number."""
        poison = np.nan if np.dtype(dtype).kind == "f" else 0x5A5A5A5A
        return np.full(shape, poison, dtype)


class Cuda:
    """What kernels use of numba.cuda."""

    threadIdx = _Dim(lambda: _thread().place)
    blockIdx = _Dim(lambda: _thread().block.index)
    blockDim = _Dim(lambda: _thread().block.sizes)
    gridDim = _Dim(lambda: _thread().block.grid)
    local = _Local

    @staticmethod
    def syncthreads():
        """Wait for all threads of the block."""
        _thread().wait("block")


def simulate(kernel, grid, block, arguments, arrays, *, shared=None, order="forwards", eager=False):
    """Run a CudaKernel over `grid` blocks of `block` threads (both (x, y, z) or shorter).

    `arguments` are addresses and numbers; `arrays` what they may read and write. `shared` is the
    bytes of shared memory (default: what the kernel says), `order` in which order threads are
    taken, `eager` whether asynchronous copies land at once. Raises IndexError on a bad access,
    RuntimeError when threads wait for such as never come, and what the kernel raises.
    """
    grid, sizes = _three(grid), _three(block)
    if np.prod(sizes) > kernel.threads:
        raise ValueError(f"{kernel.name} is compiled for {kernel.threads} threads a block")
    function, everything = resolved(kernel.function, simulated=True), Memory(arrays)
    typed = [
        np.float32(a) if c == "f" else int(a)
        for c, a in zip(kernel.arguments, arguments, strict=True)
    ]
    nbytes = kernel.shared if shared is None else shared

    def thread():
        with np.errstate(all="ignore"):  # each coroutine has its own state of that
            function(*typed)

    for place in np.ndindex(*grid[::-1]):
        made = _Block(place[::-1], sizes, grid, everything, nbytes, eager)
        _run(made, thread, ORDERS[order])


def _three(sizes):
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return sizes + (1,) * (3 - len(sizes))


def _run(block, function, order):
    """Let the warps take turns: each goes as far as it can before another does."""
    import greenlet

    for thread in block.threads:
        thread.coroutine = greenlet.greenlet(function)
    warps = [block.threads[i : i + WARP] for i in range(0, len(block.threads), WARP)]
    turn = 0
    while any(not t.coroutine.dead for t in block.threads):
        ready = next(filter(None, (_ready(warps[i]) for i in order(len(warps), turn))), None)
        if ready is None:
            ready = _past_barrier(block.threads)
        for i in order(len(ready), turn):
            _take_turn(ready[i])
        turn += 1


def _ready(warp):
    """The lanes of a warp that can go on: those that have not begun, or all that gave something to
    each other."""
    alive = [t for t in warp if not t.coroutine.dead]
    if alive and all(t.waits_for == "warp" for t in alive) and len(alive) == WARP:
        values = [t.given for t in warp]
        for thread in warp:
            thread.received, thread.waits_for = values, ""
    return [t for t in alive if not t.waits_for]


def _past_barrier(threads):
    """All threads, if all have come to a barrier."""
    waiting = [t for t in threads if t.waits_for == "block"]
    if len(waiting) < len(threads):
        states = sorted({t.waits_for for t in threads if not t.coroutine.dead})
        gone = sum(t.coroutine.dead for t in threads)
        raise RuntimeError(f"threads wait for {' and '.join(states)}; {gone} have returned")
    for thread in waiting:
        thread.waits_for = ""
    return waiting


def _take_turn(thread):
    """Let a thread go on until it waits, or has returned."""
    global _current
    _current = thread
    try:
        thread.coroutine.switch()
    finally:
        _current = None
