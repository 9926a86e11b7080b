"""A plugin of pytest by which kernels run on this machine's GPU where tests would simulate them.

    PYTHONPATH=tests python -m pytest -p on_gpu tests/test_cuda_{gemv,gemm,attention,rows}.py

`--launched FILE` gets the names of the kernels that ran, as JSON. With `--device fake` they run on
the tests' stand-in for a GPU after all, which shows that this here is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_arrays import Array
from fake_device import FakeDevice  # before it is replaced, for it simulates

from onnxstream_nb.errors import OnnxstreamError
from onnxstream_nb.gpu.device import Device
from onnxstream_nb.gpu.driver import CudaDevice
from onnxstream_nb.kernels import cuda_simulator

GUARD = 256  # bytes before and behind every array, which no kernel may change
LAUNCHED: set[str] = set()


class OnDevice:
    """`simulate`, on a device."""

    def __init__(self, device: Device) -> None:
        self._device, self._stream = device, device.stream()

    def __call__(
        self, kernel: Any, grid: Any, block: Any, arguments: Sequence[Any], arrays: list[Array],
        **of_the_simulator: Any,
    ) -> None:  # fmt: skip
        if kernel.since > self._device.capability:
            pytest.skip(f"{kernel.name} is for GPUs of capability {kernel.since} and more")
        sent = [self._guarded(array) for array in arrays]
        places = [self._place(each) for each in sent]
        moved = [
            _moved(value, arrays, places) if letter == "a" else value
            for letter, value in zip(kernel.arguments, arguments, strict=True)
        ]
        sizes = [(n,) if isinstance(n, int) else tuple(n) for n in (grid, block)]
        self._device.launch(kernel, *sizes, moved, self._stream)
        LAUNCHED.add(kernel.name)
        for array, was, place in zip(arrays, sent, places, strict=True):
            self._fetch(kernel.name, array, was, place)

    def _guarded(self, array: Array) -> Array:
        assert array.flags.c_contiguous
        inner = array.reshape(-1).view(np.uint8)
        return np.pad(inner, GUARD, constant_values=0xA5)

    def _place(self, guarded: Array) -> int:
        address = self._device.allocate(guarded.nbytes)
        self._device.upload(address, guarded, self._stream)
        self._device.synchronize(self._stream)
        return address

    def _fetch(self, name: str, array: Array, was: Array, place: int) -> None:
        now = np.empty_like(was)
        self._device.download(now, place, self._stream)
        self._device.synchronize(self._stream)
        self._device.release(place)
        end = now.nbytes - GUARD
        if (now[:GUARD] != 0xA5).any() or (now[end:] != 0xA5).any():
            raise IndexError(f"{name} wrote beside an array of {array.nbytes} bytes")
        if array.flags.writeable:
            array.reshape(-1).view(np.uint8)[:] = now[GUARD:end]


def _moved(address: int, arrays: list[Array], places: list[int]) -> int:
    """Where on the device an address in one of the arrays is; 0 is none."""
    for array, place in zip(arrays, places, strict=True):
        first = address - array.ctypes.data
        if 0 <= first < max(array.nbytes, 1):
            return place + GUARD + first
    assert address == 0, "an address in none of the arrays"
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("gpu", "fake"), default="gpu")
    parser.addoption("--launched", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    fake = config.getoption("--device") == "fake"
    try:
        device: Device = FakeDevice(memory=1 << 30) if fake else CudaDevice()
    except OnnxstreamError as error:
        raise pytest.UsageError(str(error)) from None
    cuda_simulator.simulate = OnDevice(device)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (path := session.config.getoption("--launched")) is not None:
        path.write_text(json.dumps(sorted(LAUNCHED)))
