"""What CUDA kernels compile to, for three generations of GPUs; no GPU is needed for that."""

from __future__ import annotations

import pytest
from cuda_assembly import CAPABILITIES, assembly, can_assemble

from onnxstream_nb.kernels.cuda_attention import decode_attention
from onnxstream_nb.kernels.cuda_flash import prefill_attention
from onnxstream_nb.kernels.cuda_kernel import CUDA_KERNELS
from onnxstream_nb.registry import load_kernels

load_kernels()
MADE = (
    decode_attention(64, 3), decode_attention(128, 4), decode_attention(80, 1),
    prefill_attention(64), prefill_attention(128), prefill_attention(256, 4, 32),
    prefill_attention(128, since=(7, 5)),
)  # fmt: skip
KERNELS = {**CUDA_KERNELS, **{kernel.name: kernel for kernel in MADE}}
NAMES = sorted(name for name in KERNELS if not name.startswith("gemm_f16_t"))
BOTH = [(n, c) for n in NAMES for c in CAPABILITIES if c >= KERNELS[n].since]

pytestmark = pytest.mark.skipif(
    not can_assemble(), reason="numba-cuda, ptxas and nvdisasm are needed (the extra test has them)"
)


@pytest.mark.parametrize(("name", "capability"), BOTH)
def test_no_doubles_and_nothing_spilled(name: str, capability: tuple[int, int]) -> None:
    """A literal that is not wrapped makes double arithmetic; too few registers, traffic."""
    made, kernel = assembly(KERNELS[name], capability), KERNELS[name]
    assert ".f64" not in made.ptx
    assert made.spilled == 0
    assert made.registers * kernel.threads * kernel.resident <= 65536
    assert kernel.shared <= 227 << 10


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("gemv") and n.endswith("_1")])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoding_loads_weights_16_bytes_at_a_time(name: str, capability: tuple[int, int]) -> None:
    made = assembly(KERNELS[name], capability)
    assert made.count("LDG.E.NA.128", "LDG.E.128.CONSTANT", "LDG.E.128") >= 3
    assert made.stack == 0 and made.count("LDL", "STL", "I2F") == 0


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("gemm_f16", "prefill"))])
def test_products_of_many_rows_use_tensor_cores(name: str) -> None:
    made = assembly(KERNELS[name], (9, 0))
    assert made.count("HMMA") >= 16 and made.count("LDSM") >= 8
    assert KERNELS[name].since < (8, 0) or made.count("LDGSTS") >= 8
    assert made.stack == 0


def test_a_kernel_for_a_newer_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="8, 0"):
        CUDA_KERNELS["gemm_f16"].ptx((7, 5))
