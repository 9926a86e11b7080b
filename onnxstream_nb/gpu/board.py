"""One stream of a GPU and its memory: arrays that stay there from operator to operator.

What is launched, copied and freed here happens in the order of the stream, so memory may be given
to the next one who asks as soon as nobody in Python holds it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from ..errors import UsageError
from .device import ALIGNMENT, Array, Device, DeviceMemoryError, Graph, Grid

STAGED = 4 << 20  # bytes that come back by way of pinned memory
FLOAT = np.dtype(np.float32)


class Memory:
    """Bytes of a GPU at `address`, given back when nobody holds this any more."""

    def __init__(self, address: int, give_back: Callable[[], None]) -> None:
        self.address = address
        weakref.finalize(self, give_back).atexit = False


class DeviceArray:
    """Elements in a GPU's memory, contiguous: float32, or int64. `dtype` is what they count as:
    of float16 and bfloat16 the graph has its types, and operators more digits."""

    lasting = True  # as a weight, it stays where it is

    def __init__(
        self, board: Board, shape: Sequence[int], dtype: Any, memory: Memory | None, address: int
    ) -> None:
        self.board, self.shape, self.dtype = board, tuple(shape), np.dtype(dtype)
        self.address, self._memory = address, memory

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> np.dtype[Any]:
        """The type of the elements in memory."""
        return FLOAT if self.dtype.kind not in "iu" else self.dtype

    @property
    def nbytes(self) -> int:
        return self.size * self.stored.itemsize

    def as_shape(self, shape: Sequence[int]) -> DeviceArray:
        """The same elements in another shape of as many; -1 is what remains."""
        known = math.prod(n for n in shape if n >= 0)
        shape = [self.size // known if n < 0 else n for n in shape]
        assert math.prod(shape) == self.size
        return DeviceArray(self.board, shape, self.dtype, self._memory, self.address)

    def __getitem__(self, i: int) -> DeviceArray:
        """One of the first axis, where it lies."""
        i = range(self.shape[0])[i]
        each = self.nbytes // self.shape[0]
        address = self.address + i * each
        return DeviceArray(self.board, self.shape[1:], self.dtype, self._memory, address)

    def as_type(self, dtype: Any) -> DeviceArray:
        """The same elements, counted as another type of floats."""
        return DeviceArray(self.board, self.shape, dtype, self._memory, self.address)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        found = self.board.fetch(self)
        return found if dtype is None else found.astype(dtype, copy=False)


_Copies = dict[tuple[int, Any], tuple[Array, DeviceArray]]
"""An array's id and the type of its copy's elements -> both."""


class Board:
    """A device, a stream, and at most `most` bytes of memory for arrays that come and go.

    `tell` is given one line when memory does not suffice.
    """

    def __init__(self, device: Device, most: int, tell: Callable[[str], None]) -> None:
        self.device, self.stream = device, device.stream()
        self._tell, self._told = tell, False
        self._most, self._taken = most, 0
        self._free: dict[int, list[int]] = {}  # size -> addresses
        self._sent: list[Array] = []  # what is uploaded, until the stream has done it
        self._known: _Copies = {}  # what this pass has uploaded
        self._constants: _Copies = {}
        self._gone: list[Callable[[], None]] = []  # what gives back what was held
        self._staging: Array | None = None
        self._closed = False

    # -- memory

    def room(self, shape: Sequence[int], dtype: Any = FLOAT) -> DeviceArray:
        """An array of no particular elements. Raises DeviceMemoryError."""
        count = math.prod(shape)
        size = _rounded(count * (8 if np.dtype(dtype).kind in "iu" else FLOAT.itemsize))
        address = self._take(size)
        memory = Memory(address, lambda: self._put_back(size, address))
        return DeviceArray(self, shape, dtype, memory, address)

    def array(self, shape: Sequence[int], dtype: Any, address: int) -> DeviceArray:
        """An array of what lies at an address for good."""
        return DeviceArray(self, shape, dtype, None, address)

    def hold(self, nbytes: int) -> Memory:
        """Bytes that are no part of `most`, for weights and caches. Raises DeviceMemoryError."""
        self._release_gone()
        address = self.device.allocate(nbytes)
        # Given back later, not whenever it is collected: in another thread, or amid a capture.
        return Memory(address, lambda: self._gone.append(partial(self.device.release, address)))

    def capture(self, work: Callable[[], None], owner: object) -> Graph:
        """What `work` launches, which is not done now, to be replayed as long as `owner` lives."""
        graph = self.device.capture(self.stream, work)
        give_back = partial(self._gone.append, partial(self.device.forget, graph))
        weakref.finalize(owner, give_back).atexit = False
        return graph

    def replay(self, graph: Graph) -> None:
        """Do again what was captured."""
        self.device.replay(graph, self.stream)

    def free(self) -> int:
        """Bytes of the device's memory that nobody holds."""
        self._release_gone()
        return self.device.free()

    def _release_gone(self) -> None:
        while self._gone and not self._closed:
            self._gone.pop()()

    def _take(self, size: int) -> int:
        self._check_open()
        if self._free.get(size):
            return self._free[size].pop()
        if self._taken + size > self._most:
            self._trim()
        if self._taken + size > self._most:
            raise DeviceMemoryError(
                f"{self.device.name}: a pass takes more than the {self._most >> 20} MB that are "
                "set aside for what it computes"
            )
        address = self._allocated(size)
        self._taken += size
        return address

    def _allocated(self, size: int) -> int:
        try:
            return self.device.allocate(size)
        except DeviceMemoryError:
            if not self._free:
                raise
            self._trim()
            return self.device.allocate(size)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this session is closed, and what it had on a GPU is gone")

    def _put_back(self, size: int, address: int) -> None:
        if not self._closed:
            self._free.setdefault(size, []).append(address)

    def _trim(self) -> None:
        """Give back to the device what is free, once nothing under way uses it."""
        self.synchronize()
        while self._free:  # to which more may be put at any time
            size, addresses = self._free.popitem()
            self._taken -= size * len(addresses)
            for address in addresses:
                self.device.release(address)

    # -- copies and launches

    def begin(self) -> None:
        """A pass begins: arrays may have changed since they were last put."""
        self._known.clear()
        self._release_gone()

    @staticmethod
    def is_constant(array: Array) -> bool:
        """Whether nobody changes it: a look at another array may be read-only, and yet change."""
        return not array.flags.writeable and array.base is None

    def put(self, array: Array, dtype: Any = None) -> DeviceArray:
        """An array's elements, copied there once a pass; once for all when it is a constant."""
        known = self._constants if self.is_constant(array) else self._known
        kind = np.dtype(dtype or array.dtype)
        found = known.get((id(array), kind))
        if found is None:
            target = self.room(array.shape, kind)
            self.send(array, target)
            found = known[id(array), kind] = (array, target)  # it lives, or another had its id
        return found[1]

    def send(self, array: Array, target: DeviceArray) -> None:
        """Copy an array's elements to where `target` is, those that it has now."""
        self.upload(target.address, np.array(array, target.stored, order="C"))

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array, which nobody may change until the stream is waited for."""
        self._sent.append(array)
        self.device.upload(address, array, self.stream)

    def launch(
        self, kernel: Any, grid: Grid, block: Grid, arguments: Sequence[int | float]
    ) -> None:
        """Run a kernel."""
        self.device.launch(kernel, grid, block, arguments, self.stream)

    def fetch(self, array: DeviceArray) -> Array:
        """An array of the elements, waited for."""
        elements = self.download(array.address, array.nbytes).view(array.stored)
        with np.errstate(over="ignore"):  # what is too large for halves is infinite
            return elements.reshape(array.shape).astype(array.dtype, copy=False)

    def download(self, address: int, nbytes: int) -> Array:
        """Bytes (nbytes,) uint8, waited for."""
        self._check_open()
        staging = self._pinned() if 0 < nbytes <= STAGED else None
        found = np.empty(nbytes, np.uint8) if staging is None else staging[:nbytes]
        if nbytes:
            self.device.download(found, address, self.stream)
        self.synchronize()
        return found if staging is None else found.copy()

    def _pinned(self) -> Array | None:
        """Room that copies are fast to, if there is any."""
        if self._staging is None:
            with suppress(DeviceMemoryError):
                self._staging = self.device.pinned(STAGED)
        return self._staging

    def synchronize(self) -> None:
        """Wait for all that was begun."""
        self.device.synchronize(self.stream)
        self._sent.clear()

    def failed(self, error: DeviceMemoryError) -> None:
        """Say, once, that memory did not suffice and the CPU computes in place of the device."""
        if not self._told:
            self._tell(f"{error}; the CPU computes what does not fit")
        self._told = True

    def close(self) -> None:
        """Give all memory back; arrays and what is held are no longer to be used."""
        self._closed = True
        self._known.clear()
        self._constants.clear()


def _rounded(nbytes: int) -> int:
    """A size that others are likely to want as well: at most an eighth more than asked for."""
    step = max(ALIGNMENT, 1 << max(0, nbytes.bit_length() - 4))
    return max(step, -(-nbytes // step) * step)
