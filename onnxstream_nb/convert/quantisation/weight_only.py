"""Weight-only quantisation: matrices in 8 or 4 bits, everything else computed as before.

Dims: a matrix is (N, K), a group of them multiplies the same input x (T, K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ...errors import UnsupportedError
from ...passes.upgrade import raise_opset
from ...progress import Report
from ..draft import FLOATS, Draft
from . import awq, gptq
from .calibration import feeds_of_text
from .integer_forms import (
    Codes,
    Grid,
    Rounded,
    Written,
    joined,
    write_dequantised,
    write_floats,
    write_nbits,
)  # fmt: skip
from .layers import Calibration, Layer, nearest
from .matrices import Matrix, find, read_strips
from .quantise import QuantiseOptions

Array = np.ndarray[Any, Any]
Compute = Mapping[str, Callable[[], Rounded]]

BLOCKED_OPSET = 21  # DequantizeLinear in blocks, and of 4 bits
SENSITIVE = tuple((name, "int8") for name in ("head", "values", "*v_proj*", "*attn_v.*"))
"""What has 8 bits where others have 4, unless `keep` says otherwise: the vocabulary's matrix, whose
errors nothing behind it evens out, and the small ones of an attention's values, which alone made a
quarter of the divergence that all matrices make (SmolLM2, bench/quantise.py --kinds)."""


@dataclass(frozen=True)
class Plan:
    """What becomes of a draft's matrices: `grids` by name of those that are quantised, `floats` the
    types in which others are to be stored."""

    draft: Draft
    matrices: tuple[Matrix, ...]
    grids: Mapping[str, Grid]
    floats: Mapping[str, str]
    search: bool

    @property
    def chosen(self) -> Iterator[tuple[Matrix, Grid]]:
        """The matrices that are quantised."""
        return ((m, self.grids[m.name]) for m in self.matrices if m.name in self.grids)

    def layers(self) -> Iterator[Layer]:
        """Those that calibration looks at: they multiply one input, and are not the head."""
        for matrix, grid in self.chosen:
            if matrix.input and "head" not in matrix.roles:
                yield Layer(matrix, grid)


def rounded(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """Every matrix by itself, rounded to nearest."""
    plan = _plan(draft, options)
    return _written(plan, _nearest(plan), options)


def activation_aware(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """Rounded to nearest after the channels that matter have been made larger: see awq.py."""
    plan = _plan(draft, options)
    found = awq.search(
        _calibration(plan, options, report), plan.matrices, plan.search, _windows(plan, options)[1]
    )
    folded = awq.fold(plan.draft, found)
    plan = replace(plan, draft=folded, matrices=tuple(find(folded)))
    importance = {name: each.importance for name, each in found.items()}
    return _written(plan, _nearest(plan, importance), options)


def with_feedback(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """Each element's error is made good by those behind it: see gptq.py."""
    plan = _plan(draft, options)
    solved = gptq.solve(_calibration(plan, options, report), plan.search)
    return _written(plan, {**_nearest(plan), **solved}, options)


def _plan(draft: Draft, options: QuantiseOptions) -> Plan:
    """Raises UnsupportedError when there is no matrix, or the opset cannot be raised."""
    raised = raise_opset(draft.graph, BLOCKED_OPSET)
    if raised is None:
        raise UnsupportedError(
            f"the graph is of opset {draft.graph.opset.get('', 0)} and uses operators that have no "
            f"counterpart in opset {BLOCKED_OPSET}, which quantised weights need; export it anew"
        )
    draft = draft.with_(raised)
    matrices = tuple(find(draft))
    dtypes = {m.name: _dtype(m, options) for m in matrices}
    grids = {m.name: _grid(m, dtypes[m.name], options) for m in matrices
             if dtypes[m.name] not in FLOATS}  # fmt: skip
    floats = {name: FLOATS[dtype] for name, dtype in dtypes.items() if dtype in FLOATS}
    if not grids:
        raise UnsupportedError(
            "the graph has no matrix of floats that could be quantised: it is quantised already, "
            "or --keep keeps all of them; convolutions are for --method dynamic or static"
        )
    return Plan(draft, matrices, grids, floats, options.search)


def _dtype(matrix: Matrix, options: QuantiseOptions) -> str:
    """What --keep, or what is sensitive, or --dtype says of a matrix."""
    patterns = (*options.keep, *(SENSITIVE if options.dtype == "int4" else ()))
    for pattern, dtype in patterns:
        if any(fnmatchcase(name, pattern) for name in matrix.names):
            return dtype
    return options.dtype


def _grid(matrix: Matrix, dtype: str, options: QuantiseOptions) -> Grid:
    """The integers of a matrix that has that dtype, or 8 bits where rows are looked up in it."""
    bits = 8 if dtype == "int8" or matrix.lookups else 4  # onnxruntime looks up no rows of 4 bits
    nbits = options.matmul_nbits and not matrix.lookups
    scales = "float32" if nbits and matrix.ref.dtype != "float16" else options.scales
    scales = "float16" if matrix.ref.dtype == "float16" else scales
    return Grid(bits, options.block, options.asymmetric, scales)


def _windows(plan: Plan, options: QuantiseOptions) -> tuple[int, int]:
    """Tokens of a window, within what the model was made for, and how many windows."""
    context = int(plan.draft.graph.metadata.get("context_length") or options.window)
    window = min(options.window, options.tokens, context)
    return window, max(1, options.tokens // window)


def _calibration(plan: Plan, options: QuantiseOptions, report: Report) -> Calibration:
    assert options.text is not None and options.tokenizer is not None  # QuantiseOptions sees to it
    feeds = feeds_of_text(
        plan.draft.graph, options.tokenizer, options.text, *_windows(plan, options), options.source
    )
    return Calibration(plan.draft, plan.layers(), feeds, report)


def _nearest(plan: Plan, importance: Mapping[str, Array] | None = None) -> Compute:
    """Each matrix rounded to nearest, by the importance of its K where that is known."""
    known = importance or {}

    def compute(matrix: Matrix, grid: Grid) -> Callable[[], Rounded]:
        return lambda: joined(
            nearest(rows, known.get(matrix.name), grid, plan.search)
            for rows in read_strips(plan.draft, matrix)
        )

    return {matrix.name: compute(matrix, grid) for matrix, grid in plan.chosen}


def _written(plan: Plan, compute: Compute, options: QuantiseOptions) -> Draft:
    written, codes = Written(), Codes(compute)
    for matrix, grid in plan.chosen:
        if options.matmul_nbits and not matrix.lookups and matrix.ref.dtype != "bfloat16":
            write_nbits(written, matrix, grid, codes)
        else:
            write_dequantised(written, plan.draft.graph, matrix, grid, codes)
    for matrix in plan.matrices:
        wanted = plan.floats.get(matrix.name, "")
        if wanted and not matrix.alias and matrix.ref.dtype == "float32":
            write_floats(written, plan.draft, matrix, wanted)
    return written.finish(plan.draft)
