"""Memory for results: large arrays take the place of earlier ones that nobody holds any more.

No shapes here. Fresh memory comes from the system a page at a time, zeroed: for the activations of
a long prompt that took a fifth of the time of a pass.
"""

import mmap
import threading
import weakref

import numpy as np

SMALL = 1 << 16  # bytes: below, NumPy's own allocator keeps memory at hand
KEPT = 1 << 28  # bytes at most that lie idle

_idle = {}  # size -> blocks that nobody holds
_held = {}  # id of a reference -> the reference to an array, which returns its block when it dies
_bytes = [0]  # idle
_lock = threading.RLock()  # an array may die, and call back, at any point of any thread


def private_memory(size):
    """Zeroed memory of this process alone, in large pages where the system has them."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _size(nbytes):
    """Rounded up to three binary digits, so that like sizes share blocks."""
    step = 1 << max(12, nbytes.bit_length() - 3)
    return -(-nbytes // step) * step


def _block(size):
    with _lock:
        if _idle.get(size):
            _bytes[0] -= size
            return _idle[size].pop()
    return private_memory(size)


def empty(shape, dtype=np.float32):
    """An array of any contents, as numpy.empty; large ones in memory that is used again."""
    dtype = np.dtype(dtype)
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if nbytes < SMALL:
        return np.empty(shape, dtype)
    size = _size(nbytes)
    block = _block(size)
    array = np.ndarray(shape, dtype, buffer=block)

    def give_back(reference):
        # Called when the array and all views of it are gone, from whatever thread that was in.
        with _lock:
            del _held[id(reference)]
            if _bytes[0] + size <= KEPT:
                _bytes[0] += size
                _idle.setdefault(size, []).append(block)

    reference = weakref.ref(array, give_back)
    _held[id(reference)] = reference
    return array


def drop_idle():
    """Give the memory that nobody holds back to the system."""
    with _lock:
        _idle.clear()
        _bytes[0] = 0
