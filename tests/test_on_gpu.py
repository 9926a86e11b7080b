"""on_gpu.py, by which tests of kernels run on a GPU: on the stand-in for one."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import placed, poisoned
from fake_device import FakeDevice
from on_gpu import LAUNCHED, OnDevice

from onnxstream_nb.kernels.cuda_kernel import CudaKernel
from onnxstream_nb.kernels.cuda_prims import cuda, float32, load_f32, store_f32


def copied(x: int, y: int, n: int, beside: int) -> None:
    """x (N,) -> y (N,), some elements further."""
    i = cuda.threadIdx.x
    if i < n:
        store_f32(y + 4 * (i + beside), load_f32(x + 4 * i) + float32(1))


COPIED = CudaKernel("copied", copied, "aaii", threads=32)


def test_arrays_go_there_and_come_back() -> None:
    """Addresses within an array are meant as such."""
    x, y, device = placed(np.arange(8, dtype=np.float32)), poisoned(8), FakeDevice()
    OnDevice(device)(COPIED, 1, 32, [x.ctypes.data + 8, y.ctypes.data, 5, 0], [x, y], order="any")
    np.testing.assert_array_equal(y[:5], [3, 4, 5, 6, 7])
    assert np.isnan(y[5:]).all() and not device.held and "copied" in LAUNCHED


@pytest.mark.parametrize("beside", [-1, 6, 60])
def test_what_is_written_beside_an_array_is_seen(beside: int) -> None:
    x, y = placed(np.arange(8, dtype=np.float32)), poisoned(8)
    run = OnDevice(FakeDevice())
    with pytest.raises(IndexError, match="copied wrote beside an array of 32 bytes"):
        run(COPIED, 1, 32, [x.ctypes.data, y.ctypes.data, 3, beside], [x, y])


def test_addresses_of_nothing_are_refused() -> None:
    x, y = placed(np.arange(8, dtype=np.float32)), poisoned(8)
    with pytest.raises(AssertionError, match="in none of the arrays"):
        OnDevice(FakeDevice())(COPIED, 1, 32, [x.ctypes.data, y.ctypes.data, 3, 0], [x])
