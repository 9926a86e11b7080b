"""The floats in which a PyTorch module's weights are stored, and rounding to them beforehand, so
that what is exported can be compared with what PyTorch computes to the last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...formats.safetensors_header import read_object
from ..draft import FLOATS


def own_dtype(folder: Path) -> str:
    """The --dtype of a Hugging Face folder's weights: fp32 where its config.json is silent."""
    config = read_object(folder / "config.json")
    inner = config.get("text_config")
    for fields in (config, inner if isinstance(inner, dict) else {}):
        name = fields.get("dtype") or fields.get("torch_dtype")
        for short, dtype in FLOATS.items():
            if dtype == name:
                return short
    return "fp32"


def round_to(module: Any, dtype: str) -> None:
    """Round the matrices and kernels of a module, in place, to what `dtype` (fp16, bf16) holds;
    vectors stay as they are, and are stored in float32.

    Raises UsageError for a weight that is too large for it.
    """
    import torch

    if dtype == "fp32":
        return
    target = getattr(torch, FLOATS[dtype])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                continue
            parameter.copy_(parameter.to(target))
            if not torch.isfinite(parameter).all():
                raise UsageError(
                    f"--dtype {dtype}: the weight {name} has elements beyond what it holds; "
                    "choose bf16 or fp32"
                )
