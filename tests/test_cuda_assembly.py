"""What CUDA kernels compile to, for three generations of GPUs; no GPU is needed for that."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from cuda_assembly import (
    CAPABILITIES,
    Assembly,
    assemblies,
    can_assemble,
    faults,
    faults_of_products,
    faults_of_streaming,
)

from onnxstream_nb.kernels import cuda_kernel
from onnxstream_nb.kernels.cuda_attention import MOST_QUERIES, decode_attention
from onnxstream_nb.kernels.cuda_flash import prefill_attention
from onnxstream_nb.kernels.cuda_kernel import CUDA_KERNELS, CudaKernel
from onnxstream_nb.kernels.cuda_prims import load_f32, store_f32
from onnxstream_nb.registry import load_kernels

load_kernels()
MADE = (
    *(decode_attention(size, group) for size, group in ((64, 3), (80, 1), (128, MOST_QUERIES))),
    decode_attention(256, MOST_QUERIES),
    prefill_attention(64), prefill_attention(128), prefill_attention(256, 4, 32),
    prefill_attention(128, since=(7, 5)),
)  # fmt: skip
KERNELS = {**CUDA_KERNELS, **{kernel.name: kernel for kernel in MADE}}
NAMES = sorted(KERNELS)
BOTH = [(n, c) for n in NAMES for c in CAPABILITIES if c >= KERNELS[n].since]
NEWEST = CAPABILITIES[-1]

pytestmark = pytest.mark.skipif(
    not can_assemble(), reason="numba-cuda, ptxas and nvdisasm are needed (the extra test has them)"
)


@cache
def of_all(capability: tuple[int, int]) -> dict[str, Assembly]:
    able = [kernel for kernel in KERNELS.values() if capability >= kernel.since]
    return assemblies(able, capability)


@pytest.mark.parametrize(("name", "capability"), BOTH)
def test_a_kernel_is_lean(name: str, capability: tuple[int, int]) -> None:
    assert faults(KERNELS[name], of_all(capability)[name], capability) == []


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gemv") and n.endswith("_1")])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoding_loads_weights_16_bytes_at_a_time(name: str, capability: tuple[int, int]) -> None:
    assert faults_of_streaming(of_all(capability)[name]) == []


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("gemm_f16", "prefill"))])
def test_products_of_many_rows_use_tensor_cores(name: str) -> None:
    asynchronous = KERNELS[name].since >= (8, 0)
    assert faults_of_products(of_all(NEWEST)[name], asynchronous) == []


def test_kernels_that_are_made_on_demand_are_among_them() -> None:
    """Who makes kernels without declaring them is named here, so that none is forgotten."""
    folder = Path(cuda_kernel.__file__).parent
    makers = {p.stem for p in folder.glob("cuda_*.py") if "return CudaKernel(" in p.read_text()}
    assert makers == {"cuda_attention", "cuda_flash"}
    assert {re.split(r"_\d", kernel.name)[0] for kernel in MADE} == {
        "decode_attention", "prefill_attention"
    }  # fmt: skip


def test_a_kernel_for_a_newer_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="8, 0"):
        CUDA_KERNELS["gemm_f16"].ptx((7, 5))


# -- bad ones are found


def doubled(x: int, y: int) -> None:
    store_f32(y, load_f32(x) * 1.1)  # a double times a float is one


def copied(x: int, y: int) -> None:
    store_f32(y, load_f32(x))


BAD = {
    "PTX of doubles, instructions of doubles": CudaKernel("doubled", doubled, "aa"),
    "bytes spilled": replace(CUDA_KERNELS["gemv_f16_8"], name="spilling", resident=16),
    "232449 bytes of shared memory": CudaKernel("large", copied, "aa", shared=(227 << 10) + 1),
    "": CudaKernel("small", copied, "aa", shared=227 << 10),
}


@pytest.mark.parametrize("wanted", BAD)
def test_a_bad_kernel_is_told(wanted: str) -> None:
    kernel = BAD[wanted]
    made = assemblies([kernel], NEWEST)[kernel.name]
    found = ", ".join(faults(kernel, made, NEWEST))
    assert re.fullmatch(rf"\d* ?{wanted}", found), found


def test_small_loads_and_idle_tensor_cores_are_told() -> None:
    newest = of_all(NEWEST)
    assert faults_of_streaming(newest["rows_f16"]) == ["fewer than three loads of 16 bytes"]
    assert "conversions of integers" in faults_of_streaming(newest["rows_i8"])
    assert faults_of_products(newest["gemv_f16_1"], True) == [
        "fewer than sixteen products of tensor cores", "fewer than eight loads of small matrices",
        "fewer than eight asynchronous copies",
    ]  # fmt: skip
    assert faults_of_products(newest["gemm_f16_75"], True) == [
        "fewer than eight asynchronous copies"
    ]
