"""Weights and activations in 8 bits: products and convolutions of integers.

`dynamic` finds the range of an activation at every run (DynamicQuantizeLinear, MatMulInteger,
ConvInteger), `static` has seen it on calibration data (QuantizeLinear and DequantizeLinear around
the operators, which engines read as products of integers). Weights have a scale for each output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ... import passes
from ...errors import UnsupportedError, UsageError
from ...graph import Node
from ...passes.rewriting import Rewriter
from ...progress import Report
from ..draft import FLOATS, Draft
from .activations import OTHERS, PRODUCTS, Activations, calibrated_values, quantised_values, seen
from .batch_norm import fold_batch_norms
from .calibration import feeds_of_text
from .feeds import feeds_of_files
from .integer_dynamic import DynamicProducts
from .integer_forms import Written, write_floats
from .integer_weights import Constant, Constants, Keep, Stored
from .matrices import find
from .quantise import QuantiseOptions
from .ranges import Range, by_value, format_ranges, read_ranges
from .smooth import smoothed

Array = np.ndarray[Any, Any]

_DYNAMIC_OPSET = 11  # DynamicQuantizeLinear
_STATIC_OPSET = 13  # DequantizeLinear along an axis


def dynamic(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """The draft with MatMulInteger and ConvInteger in the place of products and convolutions with
    constant weights, their activations quantised at every run.

    With a calibration text, outliers of activations go into weights before that. Raises UsageError
    when there is nothing to quantise.
    """
    draft = prepared(draft)
    if options.text is not None and options.tokenizer is not None:
        draft = smoothed(draft, feeds_of(draft, options), report)
    step = DynamicProducts(draft, kept_by(draft, options.keep), options.asymmetric)
    for node in draft.graph.nodes:
        step.visit(node)
    done = _finished(draft, step.stored, _DYNAMIC_OPSET, report)
    return with_kept_floats(done, options.keep)


def static(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """The draft with QuantizeLinear and DequantizeLinear before its products and convolutions, by
    ranges of range data or seen on calibration data: activations uint8, weights int8, biases int32.

    Range data that is not there yet is written, and holds all floats that the model computes. In
    language models, outliers of activations go into weights before that, unless there is range
    data: it says what the model itself computes.
    Raises UsageError when there is nothing to quantise, or neither range data nor calibration data.
    """
    if options.asymmetric:
        raise UsageError("--asymmetric is for --method dynamic: static weights are symmetric")
    draft = prepared(draft)
    if options.range_data is None and options.feeds is None:
        draft = smoothed(draft, feeds_of(draft, options), report)
    step = StaticProducts(draft, kept_by(draft, options.keep))
    values = step.values()
    if options.range_data is None:
        feeds, clipped = feeds_of(draft, options), _clipped(options)
        ranges = seen(draft, values, feeds, clipped, report)
    else:
        ranges = _known(draft, values, _range_data(draft, options, options.range_data, report))
    done = with_rounded_activations(draft, step, ranges, report)
    return with_kept_floats(done, options.keep)


def with_rounded_activations(
    draft: Draft, step: StaticProducts, ranges: Mapping[str, Range], report: Report
) -> Draft:
    """The draft with what `step` found in integers, as far as the ranges of values are known."""
    step.activations.ranges = ranges
    for node in draft.graph.nodes:
        step.visit(node)
    return _finished(draft, step.stored, _STATIC_OPSET, report)


def prepared(draft: Draft) -> Draft:
    """The draft with constants folded, and batch normalizations in the convolutions before them."""
    if not draft.made:  # a constant that only a draft makes has no bytes to see in another way
        draft = draft.with_(passes.clean(draft.graph, draft.read))
    return fold_batch_norms(_with_last_axes(draft))


def _with_last_axes(draft: Draft) -> Draft:
    """The draft with every Softmax over its last axis. Before opset 13 all axes from one on were
    taken as one: there they become one before it."""
    if draft.graph.opset.get("", _STATIC_OPSET) >= _STATIC_OPSET:
        return draft
    rewriter = Rewriter(draft.graph, draft.read)
    for node in draft.graph.nodes:
        axis = node.attributes.get("axis", 1)
        if node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and not node.domain and axis != -1:
            (x,), (y,) = node.inputs, node.outputs
            shape = rewriter.node("Shape", (x,), f"{y}.shape")
            flat = rewriter.node("Flatten", (x,), f"{y}.flat", axis=axis)
            last = rewriter.node(node.op_type, flat.outputs, f"{y}.rows", axis=-1)
            parts = (last.outputs[0], shape.outputs[0])
            back = Node("Reshape", parts, node.outputs, {}, node.name)
            rewriter.replace(node, shape, flat, last, back)
    return draft.with_(rewriter.finish())


def feeds_of(draft: Draft, options: QuantiseOptions) -> Iterator[Mapping[str, Array]]:
    """The inputs that the model is calibrated on: of files, or windows of a text.

    Raises UsageError when there are neither.
    """
    if options.feeds is not None:
        return feeds_of_files(options.feeds, draft.graph)
    if options.text is None or options.tokenizer is None:
        raise UsageError(
            "--method static is calibrated: give --calibration, a text for a language model, .npz "
            "files with the inputs by name for another, or --range-data of an earlier calibration"
        )
    window = min(options.window, options.tokens)
    return feeds_of_text(
        draft.graph, options.tokenizer, options.text, window, options.tokens // window,
        options.source,
    )  # fmt: skip


def kept_by(draft: Draft, keep: tuple[tuple[str, str], ...]) -> Keep:
    """Whether a node or weight of these names stays in floats.

    Raises UsageError for a layer that is to have 4 bits.
    """
    for pattern, dtype in keep:
        if dtype == "int4":
            raise UsageError(f"--keep {pattern}={dtype}: weights and activations have 8 bits here")
    roles = {name: matrix.names for matrix in find(draft) for name in matrix.names}

    def is_kept(*names: str) -> bool:
        every = {*names, *(other for name in names for other in roles.get(name, ()))}
        for pattern, dtype in keep:
            if any(fnmatchcase(name, pattern) for name in every):
                return dtype != "int8"
        return False

    return is_kept


def with_kept_floats(draft: Draft, keep: tuple[tuple[str, str], ...]) -> Draft:
    """The draft with matrices that stay in floats marked to be stored as those asked for."""
    written = Written()
    for matrix in find(draft):
        matching = (d for p, d in keep if any(fnmatchcase(name, p) for name in matrix.names))
        dtype = FLOATS.get(next(matching, ""), "")
        if dtype and not matrix.alias and matrix.ref.dtype == "float32":
            write_floats(written, draft, matrix, dtype)
    return written.finish(draft)


class StaticProducts:
    """The products and convolutions with constant weights, and other `operators` of OTHERS, whose
    activations are rounded; `visit` puts the integers in.

    Raises UsageError for an operator that is not known.
    """

    def __init__(self, draft: Draft, keep: Keep, operators: tuple[str, ...] = PRODUCTS) -> None:
        unknown = set(operators) - {*PRODUCTS, *OTHERS}
        if unknown:
            raise UsageError(
                f"{', '.join(sorted(unknown))} cannot be computed in 8 bits; known are "
                f"{', '.join((*PRODUCTS, *OTHERS))}"
            )
        self.draft, self.operators = draft, operators
        rewriter = Rewriter(draft.graph, draft.read)
        self.stored = Stored(rewriter)
        self.constants = Constants(draft, rewriter, keep)
        self.activations = Activations(rewriter, self.stored, self.constants)
        self.found = {id(n): w for n in draft.graph.nodes if (w := self._weight(n))}

    def _weight(self, node: Node) -> Constant | None:
        if node.domain or node.op_type not in self.operators or node.op_type not in PRODUCTS:
            return None
        weight = self.constants.weight(node)
        if weight is None or node.attributes.get("transA", 0):
            return None
        return weight if node.op_type == "Conv" or len(weight.shape) == 2 else None

    def values(self) -> list[str]:
        """The values that are rounded, in the graph's order."""
        return quantised_values(self.draft, self.found, self.operators)

    def visit(self, node: Node) -> None:
        """Put integers in before a node that was found."""
        weight = self.found.get(id(node))
        if weight is not None:
            self.activations.product(node, weight)
        elif node.op_type in OTHERS and node.op_type in self.operators and not node.domain:
            self.activations.other(node)


def _finished(draft: Draft, stored: Stored, opset: int, report: Report) -> Draft:
    if not stored.made:
        raise UsageError(
            "nothing to quantise: the model has no MatMul, Gemm or Conv with a constant float "
            "weight that is not kept"
        )
    graph = stored.rewriter.finish(opset)
    if graph is draft.graph:
        raise UnsupportedError(
            f"the model's opset {draft.graph.opset.get('')} cannot be raised to {opset}, which "
            "quantisation needs; export it at a newer opset"
        )
    report("quantised", 1.0)
    return draft.with_(graph, stored.made)


def _clipped(options: QuantiseOptions) -> float:
    """The share of the elements, in percent, that is clipped at each end."""
    if not 50 < options.percentile <= 100:
        raise UsageError(f"--percentile {options.percentile}: not above 50 and at most 100")
    return 100 - options.percentile


def _range_data(
    draft: Draft, options: QuantiseOptions, path: Path, report: Report
) -> dict[str, Range]:
    """What the file says, or what it says once the model has been calibrated."""
    if path.exists():
        report(f"ranges of {path}, no calibration", None)
        return read_ranges(path)
    found = calibrated_values(draft, feeds_of(draft, options), _clipped(options), report)
    data, partial = format_ranges(found), path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as e:
        raise UsageError(f"--range-data {path}: cannot be written ({e.strerror})") from e
    finally:
        partial.unlink(missing_ok=True)
    return read_ranges(path)


def _known(draft: Draft, values: list[str], ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges of values among those of operators.

    OnnxStream keeps none of the graph's inputs: what reads one that has none stays in floats.
    """
    inputs = {value.name for value in draft.graph.inputs}
    wanted = [name for name in values if name not in inputs or name in ranges]
    return by_value(draft.graph, ranges, wanted, "range data")
