"""How far an exported model's results are from PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ModelError, UnsupportedError
from ...session import Progress, Session
from .exporters import Case

Array = np.ndarray[Any, Any]

LIMIT = 1e-4
"""Of the largest element of a result: float32 sums in another order stay below it in deep models,
a wrong mask or position does not."""


Run = Callable[[dict[str, Array], list[str]], Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """The largest difference of an element, the largest element of the result `output` that has
    it, and `relative`, the largest quotient of the two over all results. `unsupported` says why
    the model cannot run here; then the ONNX standard's reference has computed it."""

    absolute: float
    largest: float
    relative: float
    output: str
    runs: int
    unsupported: str = ""


def difference(path: Path, cases: Sequence[Case], progress: Progress | None = None) -> Difference:
    """Run the model at `path` on the cases and compare.

    Raises ModelError when a result has another shape, is not finite where PyTorch's is, or is
    farther away than LIMIT.
    """
    worst = Difference(0.0, 0.0, 0.0, "", len(cases))
    with _opened(path, progress) as (run, inputs, unsupported):
        for case in cases:
            feeds = {name: array for name, array in case.feeds.items() if name in inputs}
            got = run(feeds, list(case.wanted))
            for name, wanted in case.wanted.items():
                found = _one(name, np.asarray(got[name]), wanted, len(cases))
                worst = max(worst, found, key=lambda d: d.relative)
    if worst.relative > LIMIT:
        raise ModelError(
            f"the exported model's {worst.output} is {worst.absolute:.3g} away from PyTorch's, "
            f"whose largest element is {worst.largest:.3g} (allowed: {LIMIT:g} of it); try the "
            "other --exporter"
        )
    return replace(worst, unsupported=unsupported)


@contextmanager
def _opened(path: Path, progress: Progress | None) -> Iterator[tuple[Run, set[str], str]]:
    """What runs the model, its inputs' names, and why that is not this package, if so. Weights are
    mapped, not read whole."""
    try:
        session = Session(path, load="mmap", precision="exact", progress=progress)
    except UnsupportedError as error:
        from onnx.reference import ReferenceEvaluator

        reference = ReferenceEvaluator(str(path))

        def run(feeds: dict[str, Array], names: list[str]) -> Mapping[str, Any]:
            return dict(zip(names, reference.run(names, feeds), strict=True))

        yield run, set(reference.input_names), str(error)
        return
    with session:
        yield session.run, {v.name for v in session.inputs}, ""


def _one(name: str, got: Array, wanted: Array, runs: int) -> Difference:
    if got.shape != wanted.shape:
        raise ModelError(
            f"the exported model's {name} has the shape {got.shape}, and PyTorch's "
            f"{wanted.shape}: a size that should be open is fixed in it; try the other --exporter"
        )
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    if not (finite == np.isfinite(a)).all():
        raise ModelError(
            f"the exported model's {name} has infinities or NaN where PyTorch's has none, or the "
            "reverse; try the other --exporter"
        )
    apart = np.abs(a - b, where=finite, out=np.zeros_like(b)).max(initial=0.0)
    largest = np.abs(b, where=finite, out=np.zeros_like(b)).max(initial=0.0)
    relative = apart / largest if largest else float(apart > 0)
    return Difference(float(apart), float(largest), float(relative), name, runs)
