"""A GPU by NVIDIA's driver (cuda.bindings): a launch so costs a microsecond, by Numba twenty."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from .device import Array, DeviceError, DeviceMemoryError, Graph, Grid, Stream
from .found import INSTALL, parts

LEAST = (7, 5)  # compute capability: tensor cores that take halves
_NUMBERS: Mapping[str, Any] = {
    "a": ctypes.c_int64,
    "l": ctypes.c_int64,
    "i": ctypes.c_int32,
    "f": ctypes.c_float,
}
_DEFAULT_SHARED = 48 << 10  # what a block may have of shared memory unless it asks for more


class CudaDevice:
    """The GPU of a number, as the driver counts them. One thread uses it at a time.

    Raises UnsupportedError when there is no driver, package or such GPU, with what would mend it.
    """

    def __init__(self, number: int = 0) -> None:
        self._driver = _driver()
        self._taken: dict[tuple[str, int], Any] = {}  # what gives it back, its number -> itself
        self._unused: list[int] = []  # addresses of pinned memory that nobody looks at any more
        self._functions: dict[str, Any] = {}
        self._call("cuInit", 0)
        count = self._call("cuDeviceGetCount")
        if number >= count:
            raise UnsupportedError(f"there is no GPU number {number}: the driver finds {count}")
        self._device = self._call("cuDeviceGet", number)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._open = True
        self._threads = threading.local()  # a context is current, or not, for each of them
        try:
            self._describe()
        except BaseException:
            with suppress(DeviceError):  # the first one says what is the matter
                self.close()
            raise

    def _describe(self) -> None:
        """What the GPU is, and whether it will do."""
        self.name = self._call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        about = self._driver.CUdevice_attribute
        self.capability = (
            self._attribute(about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(about.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        if self.capability < LEAST:
            raise UnsupportedError(
                f"{self.name} has compute capability {self.capability[0]}.{self.capability[1]}; "
                f"{LEAST[0]}.{LEAST[1]} or more is needed"
            )
        self.memory = int(self._call("cuDeviceTotalMem", self._device))

    def _attribute(self, what: Any) -> int:
        return int(self._call("cuDeviceGetAttribute", what, self._device))

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver: its result, or the error with the driver's own words."""
        if not getattr(self, "_open", True):  # what it had is gone, and the driver may not notice
            raise DeviceError(f"{self.name}: {name}: it was closed")
        return self._unchecked(name, *arguments)

    def _unchecked(self, name: str, *arguments: Any) -> Any:
        if hasattr(self, "_threads") and not hasattr(self._threads, "entered"):
            self._threads.entered = True
            self._unchecked("cuCtxSetCurrent", self._context)
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status):
            _, text = self._driver.cuGetErrorString(status)
            said = text.decode() if isinstance(text, bytes) else str(status)
            memory = self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            kind = DeviceMemoryError if status == memory else DeviceError
            raise kind(f"{getattr(self, 'name', 'the GPU')}: {name}: {said}")
        return results[0] if len(results) == 1 else tuple(results)

    def free(self) -> int:
        return int(self._call("cuMemGetInfo")[0])

    def _keep(self, undo: str, handle: Any) -> Any:
        """Note what the driver's function `undo` has to be called for."""
        self._taken[undo, int(handle)] = handle
        return handle

    def _give_back(self, undo: str, handle: Any) -> None:
        if self._open:  # else it went with all else
            self._call(undo, self._taken.pop((undo, int(handle))))

    def allocate(self, nbytes: int) -> int:
        return int(self._keep("cuMemFree", int(self._call("cuMemAlloc", max(nbytes, 1)))))

    def release(self, address: int) -> None:
        self._give_back("cuMemFree", address)

    def pinned(self, nbytes: int) -> Array:
        # What was let go of is given back here: not whenever it is collected, which may be in
        # another thread, or amid a capture.
        while self._unused:
            self._give_back("cuMemFreeHost", self._unused.pop())
        address = int(self._call("cuMemHostAlloc", max(nbytes, 1), 0))
        self._keep("cuMemFreeHost", address)
        room: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(room, self._unused.append, address)
        return np.ctypeslib.as_array(room)

    def stream(self) -> Stream:
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._keep("cuStreamDestroy", self._call("cuStreamCreate", int(flags)))

    def upload(self, address: int, array: Array, stream: Stream) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: Array, address: int, stream: Stream) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        self._call("cuMemsetD8Async", address, 0, nbytes, stream)

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        self._call("cuMemcpyDtoDAsync", to, source, nbytes, stream)

    def launch(
        self, kernel: Any, grid: Grid, block: Grid, arguments: Sequence[int | float], stream: Stream
    ) -> None:
        letters = zip(kernel.arguments, arguments, strict=True)
        values = [_NUMBERS[letter](value) for letter, value in letters]
        places = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        self._call(
            "cuLaunchKernel", self._function(kernel), *_three(grid), *_three(block), kernel.shared,
            stream, ctypes.addressof(places), 0,
        )  # fmt: skip

    def _function(self, kernel: Any) -> Any:
        found = self._functions.get(kernel.name)
        if found is None:
            module = self._call("cuModuleLoadData", self._compiled(kernel).encode())
            self._keep("cuModuleUnload", module)
            found = self._call("cuModuleGetFunction", module, kernel.name.encode())
            if kernel.shared > _DEFAULT_SHARED:
                about = self._driver.CUfunction_attribute
                most = about.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call("cuFuncSetAttribute", found, most, kernel.shared)
            self._functions[kernel.name] = found
        return found

    def _compiled(self, kernel: Any) -> str:
        """Its PTX. A compiler that cannot is as a GPU that cannot: the CPU will do."""
        try:
            return str(kernel.ptx(self.capability))
        except Exception as error:  # Numba's, NVVM's, the linker's, of the disk it is cached on
            said = f"{type(error).__name__}: {error}"
            raise DeviceError(f"{self.name}: {kernel.name} was not compiled: {said}") from error

    def synchronize(self, stream: Stream) -> None:
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            graph = self._keep("cuGraphDestroy", self._call("cuStreamEndCapture", stream))
        ready = self._keep("cuGraphExecDestroy", self._call("cuGraphInstantiate", graph, 0))
        self._give_back("cuGraphDestroy", graph)
        return ready

    def replay(self, graph: Graph, stream: Stream) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def forget(self, graph: Graph) -> None:
        self._give_back("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Give everything back: others may have the GPU's context open, which then keeps what is in
        it. Raises DeviceError when the driver refused any of it, after all was tried."""
        if not self._open:
            return
        self._open, errors = False, []
        with suppress(DeviceError):  # what failed was told to who waited for it
            self._unchecked("cuCtxSynchronize")
        last = [("cuDevicePrimaryCtxRelease", self._device)]
        for undo, handle in [*((undo, it) for (undo, _), it in self._taken.items())][::-1] + last:
            try:
                self._unchecked(undo, handle)
            except DeviceError as error:
                errors.append(error)
        self._taken.clear()
        self._functions.clear()
        if errors:
            raise errors[0]


def _three(sizes: Grid) -> tuple[int, int, int]:
    first, second, third = (*sizes, 1, 1)[:3]
    return first, second, third


def _driver() -> Any:
    """cuda.bindings.driver, if it and all that kernels need is here."""
    for part in parts():
        if part.remedy:
            raise UnsupportedError(f"{part.detail}: {part.remedy}")
    try:
        import cuda.bindings.driver as driver
    except ImportError as error:
        raise UnsupportedError(f"cuda-bindings is not installed ({error}): {INSTALL}") from error
    return driver
