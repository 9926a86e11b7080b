"""The GPU by its driver, with a stand-in for the driver: what is taken is given back."""

from __future__ import annotations

import ctypes
import inspect
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import driver
from onnxstream_nb.gpu.device import DeviceError, DeviceMemoryError

TAKES = {
    "cuDevicePrimaryCtxRetain": "cuDevicePrimaryCtxRelease", "cuMemAlloc": "cuMemFree",
    "cuMemHostAlloc": "cuMemFreeHost", "cuStreamCreate": "cuStreamDestroy",
    "cuModuleLoadData": "cuModuleUnload", "cuGraphInstantiate": "cuGraphExecDestroy",
    "cuStreamEndCapture": "cuGraphDestroy",
}  # fmt: skip
NO_MEMORY, LOST = 2, 999


class Enumeration:
    """Any name has a number."""

    CUDA_ERROR_OUT_OF_MEMORY = NO_MEMORY

    def __getattr__(self, name: str) -> int:
        return len(name)


class Driver:
    """cuda.bindings.driver as far as it is used. `failing` are functions with what they return."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.held: set[tuple[str, Any]] = set()
        self.capability = 8
        self._buffers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU"):
            return Enumeration()
        return lambda *arguments: self._called(name, arguments)

    def _called(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self.calls.append(name)
        if name == "cuGetErrorString":
            return 0, b"something is wrong"
        if name in self.failing:
            return self.failing[name], None
        if name in TAKES.values():
            self.held.remove((name, 0 if "Primary" in name else arguments[0]))
            return (0,)
        return 0, self._result(name)

    def _result(self, name: str) -> Any:
        number: Any = 1000 + len(self.calls)
        if name == "cuMemHostAlloc":
            self._buffers.append(ctypes.create_string_buffer(64))
            number = ctypes.addressof(self._buffers[-1])
        if name in TAKES:
            self.held.add((TAKES[name], 0 if "Primary" in name else number))
            return number
        known = {
            "cuDeviceGetCount": 1, "cuDeviceGet": 0, "cuDeviceTotalMem": 1 << 30,
            "cuDeviceGetName": b"a GPU\0\0", "cuDeviceGetAttribute": self.capability,
            "cuMemGetInfo": (1 << 29, 1 << 30),
        }  # fmt: skip
        return known.get(name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Driver:
    standing_in = Driver()
    monkeypatch.setattr(driver, "_driver", lambda: standing_in)
    return standing_in


def kernel(ptx: Any = lambda capability: "text") -> Any:
    return SimpleNamespace(name="k", ptx=ptx, arguments="ai", shared=100_000)


def test_all_that_was_taken_is_given_back(made: Driver) -> None:
    device = driver.CudaDevice()
    stream = device.stream()
    first, _ = device.allocate(100), device.allocate(0)
    device.release(first)
    pinned = device.pinned(64)
    device.launch(kernel(), (2,), (32,), (7, 3), stream)
    graph = device.capture(stream, lambda: device.clear(0, 1, stream))
    device.replay(graph, stream)
    assert len({undo for undo, _ in made.held}) == 6 and pinned.nbytes == 64
    device.close()
    assert not made.held and made.calls[-1] == "cuDevicePrimaryCtxRelease"
    device.close()
    device.release(pinned.ctypes.data)  # what is let go of later went with all else
    assert made.calls.count("cuDevicePrimaryCtxRelease") == 1


def test_pinned_memory_that_nobody_looks_at_goes_first(made: Driver) -> None:
    device = driver.CudaDevice()
    room = device.pinned(64)
    part = room[:8].view(np.float32)
    del room
    device.pinned(64)
    assert made.calls.count("cuMemFreeHost") == 0  # of the first a part is in use
    del part
    device.pinned(64)
    assert made.calls.count("cuMemFreeHost") == 2
    device.close()
    assert not made.held


@pytest.mark.parametrize("function", ["cuDeviceGetName", "cuDeviceTotalMem"])
def test_a_gpu_that_cannot_be_described_is_let_go_of(function: str, made: Driver) -> None:
    made.failing[function] = LOST
    with pytest.raises(DeviceError, match=f"{function}: something is wrong"):
        driver.CudaDevice()
    assert not made.held


def test_an_old_gpu_is_let_go_of(made: Driver) -> None:
    made.capability = 6
    with pytest.raises(UnsupportedError, match=r"a GPU has compute capability 6\.6; 7\.5 or more"):
        driver.CudaDevice()
    assert not made.held


def test_there_is_no_such_gpu(made: Driver) -> None:
    with pytest.raises(UnsupportedError, match="no GPU number 1: the driver finds 1"):
        driver.CudaDevice(1)
    assert not made.held


def test_what_the_driver_says(made: Driver) -> None:
    device = driver.CudaDevice()
    made.failing["cuMemAlloc"] = NO_MEMORY
    with pytest.raises(DeviceMemoryError, match="^a GPU: cuMemAlloc: something is wrong$"):
        device.allocate(1)
    made.failing["cuMemAlloc"] = LOST
    with pytest.raises(DeviceError) as caught:
        device.allocate(1)
    assert not isinstance(caught.value, DeviceMemoryError)


def test_closing_goes_on_when_the_driver_refuses(made: Driver) -> None:
    device = driver.CudaDevice()
    device.allocate(1)
    device.stream()
    made.failing["cuMemFree"] = LOST
    with pytest.raises(DeviceError, match="cuMemFree"):
        device.close()
    assert {undo for undo, _ in made.held} == {"cuMemFree"}


def test_a_kernel_that_is_not_compiled_is_a_failure_of_the_gpu(made: Driver) -> None:
    def ptx(capability: tuple[int, int]) -> str:
        raise RuntimeError("NVVM: no such architecture")

    device = driver.CudaDevice()
    with pytest.raises(DeviceError, match="a GPU: k was not compiled: RuntimeError: NVVM: no such"):
        device.launch(kernel(ptx), (1,), (32,), (7, 3), 0)


def test_a_capture_that_fails_leaves_nothing(made: Driver) -> None:
    def work() -> None:
        raise ZeroDivisionError

    device = driver.CudaDevice()
    with pytest.raises(ZeroDivisionError):
        device.capture(0, work)
    device.close()
    assert not made.held


def test_the_bindings_have_what_is_called() -> None:
    """The real ones, where they are installed: they need no driver to be imported."""
    real = pytest.importorskip("cuda.bindings.driver")
    source = inspect.getsource(driver)
    called = set(re.findall(r'"(cu[A-Z]\w+)"', source))
    assert len(called) > 20 and not [name for name in called if not hasattr(real, name)]
    numbers = re.findall(r"(CU_\w+|CUDA_ERROR_\w+)", source)
    known = {each for kind in vars(real).values() for each in getattr(kind, "__members__", ())}
    assert len(numbers) > 5 and set(numbers) <= known
