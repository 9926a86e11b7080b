"""PyTorch models in: exported, simplified, written, and compared with PyTorch before they appear.

Memory: a language model is loaded in float32, four bytes a parameter; its weights are written one
at a time from where PyTorch holds them, and PyTorch has let go of them when the result is run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...formats.onnx_folder import MODEL, write_file, write_folder
from ...progress import Report
from .. import carry
from ..convert import in_order
from ..draft import FLOATS, Draft
from ..floats import store
from ..folder import OutputFolder, check_out, is_file, output_folder
from . import causal, module
from .compared import Difference, difference
from .exporters import Case, drafted, require
from .tied import tied
from .torch_weights import own_dtype, round_to

EXPORTERS = tuple(causal.ATTENTION)
NEEDED = ("torch", "transformers")  # for a language model


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
    weights: int
    dtype: str
    size_bytes: int
    difference: Difference


@dataclass(frozen=True)
class _Made:
    """What an export hands to its writing; only `draft` refers to PyTorch's weights."""

    draft: Draft
    cases: tuple[Case, ...]
    dtype: str


def export_language_model(source: Path, out: Path, options: Options, report: Report) -> Exported:
    """Export the causal language model of a Hugging Face folder, its tokenizer with it.

    Raises UsageError without torch or transformers, ModelError or UnsupportedError for a model
    that cannot be loaded or exported, or whose export computes something else.
    """
    require(*NEEDED)
    check_out(out, overwrite=options.overwrite, source=source)

    def make(folder: OutputFolder) -> _Made:
        report("loading the model into PyTorch", None)
        model = causal.load(source)
        dtype = options.dtype or own_dtype(source)
        round_to(model, dtype)
        cases, draft = _language_model(model, options.exporter, report)
        if not is_file(out):
            carry.tokenizer(source, draft.graph, folder)
        return _Made(tied(draft), cases, dtype)

    return _written(make, out, options, report, source)


def export_module(name: str, out: Path, options: Options, report: Report) -> Exported:
    """Export what the factory `pkg:factory` makes; see `convert.module`."""
    require("torch")
    check_out(out, overwrite=options.overwrite)

    def make(_: OutputFolder) -> _Made:
        report("making the module", None)
        dtype = options.dtype or "fp32"
        subject = module.subject(name, dtype)
        report(f"exporting with PyTorch's exporter for {options.exporter}", None)
        return _Made(drafted(subject, options.exporter), subject.cases, dtype)

    return _written(make, out, options, report)


def _language_model(model: Any, exporter: str, report: Report) -> tuple[tuple[Case, ...], Draft]:
    """The model's results and its draft, with the first way of computing attention that the
    exporter takes."""
    refused: UnsupportedError | None = None
    for attention in causal.ATTENTION[exporter]:
        report("running it in PyTorch", None)
        subject = causal.subject(model, attention)
        if subject is None:
            continue
        report(f"exporting with PyTorch's exporter for {exporter}", None)
        try:
            draft = drafted(subject, exporter)
        except UnsupportedError as error:
            refused = refused or error
            continue
        return subject.cases, draft.with_(draft.graph.with_(metadata=causal.metadata(model)))
    raise refused or UnsupportedError(f"{type(model).__name__}: no attention for {exporter}")


def _written(
    make: Callable[[OutputFolder], _Made],
    out: Path,
    options: Options,
    report: Report,
    source: Path | None = None,
) -> Exported:
    """Write what `make` gives into `out`, which appears when it has been compared."""
    single = MODEL if is_file(out) else ""
    with output_folder(out, overwrite=options.overwrite, single=single, source=source) as folder:
        made = make(folder)
        draft, cases = in_order(store(made.draft, FLOATS[made.dtype])), made.cases
        write = write_file if single else write_folder
        write(draft.graph, draft.raw, folder, report)
        graph, dtype = draft.graph, made.dtype
        del made, draft  # and with them PyTorch's weights, before ours are mapped
        folder.settle()
        gc.collect()
        report("comparing with PyTorch", None)
        found = difference(folder.path / MODEL, cases, report)
    weights = sum(math.prod(ref.shape) for ref in graph.initializers.values())
    size = sum(f.size for name, f in folder.files.items() if not single or name == MODEL)
    return Exported(
        out, options.exporter, graph.opset[""], len(graph.nodes), weights, dtype, size, found
    )
