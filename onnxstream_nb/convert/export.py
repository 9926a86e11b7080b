"""PyTorch models in: exported, simplified, written, and compared with PyTorch before they appear.

Memory: a language model is loaded in float32, four bytes a parameter; its weights are written one
at a time from where PyTorch holds them, and PyTorch has let go of them when the result is run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UnsupportedError
from ..progress import Report
from . import causal, module
from .compared import Difference, difference
from .draft import Draft
from .exporters import Case, drafted, require
from .tied import tied
from .torch_weights import own_dtype, round_to

EXPORTERS = tuple(causal.ATTENTION)


@dataclass(frozen=True)
class Options:
    """`exporter` of `EXPORTERS`; `dtype` fp32, fp16, bf16, or None for what the model has."""

    exporter: str = "opset14"
    dtype: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written: the graph's size, how its weights are stored, bytes of all files, and how
    far it is from PyTorch."""

    out: Path
    exporter: str
    opset: int
    nodes: int
    parameters: int
    dtype: str
    size_bytes: int
    difference: Difference


def export_language_model(folder: Path, out: Path, options: Options, report: Report) -> Exported:
    """Export the causal language model of a Hugging Face folder, its tokenizer with it.

    Raises UsageError without torch or transformers, ModelError or UnsupportedError for a model
    that cannot be loaded or exported, or whose export computes something else.
    """
    require("torch", "transformers")
    report("loading the model into PyTorch", None)
    model = causal.load(folder)
    dtype = options.dtype or own_dtype(model.config)
    round_to(model, dtype)
    cases, draft = _language_model(model, options.exporter, report)
    draft = draft.with_(draft.graph.with_(metadata=causal.metadata(model)))
    return _written(draft, cases, out, replace(options, dtype=dtype), report, folder)


def export_module(name: str, out: Path, options: Options, report: Report) -> Exported:
    """Export what the factory `pkg:factory` makes; see `convert.module`."""
    require("torch")
    report("making the module", None)
    dtype = options.dtype or "fp32"
    subject = module.subject(name, dtype)
    report(f"exporting ({options.exporter})", None)
    draft = drafted(subject, options.exporter)
    return _written(draft, subject.cases, out, replace(options, dtype=dtype), report)
