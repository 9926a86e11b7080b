"""How far an exported model's results are from PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..session import Progress, Session
from .exporters import Case

Array = np.ndarray[Any, Any]

LIMIT = 1e-4
"""Of the largest element of a result: float32 sums in another order stay below it in deep models,
a wrong mask or position does not."""


@dataclass(frozen=True)
class Difference:
    """The largest difference of an element, the largest element of the result `output` that has
    it, and `relative`, the largest quotient of the two over all results."""

    absolute: float
    largest: float
    relative: float
    output: str
    runs: int


def difference(path: Path, cases: Sequence[Case], progress: Progress | None = None) -> Difference:
    """Run the model at `path` on the cases and compare; its weights are mapped, not read whole.

    Raises ModelError when a result has another shape, is not finite where PyTorch's is, or is
    farther away than LIMIT.
    """
    worst = Difference(0.0, 0.0, 0.0, "", len(cases))
    with Session(path, load="mmap", precision="exact", progress=progress) as session:
        inputs = {v.name for v in session.inputs}
        for case in cases:
            feeds = {name: array for name, array in case.feeds.items() if name in inputs}
            got = session.run(feeds, list(case.wanted))
            for name, wanted in case.wanted.items():
                found = _one(name, np.asarray(got[name]), wanted, len(cases))
                worst = max(worst, found, key=lambda d: d.relative)
    if worst.relative > LIMIT:
        raise ModelError(
            f"the exported model's {worst.output} is {worst.absolute:.3g} away from PyTorch's, "
            f"whose largest element is {worst.largest:.3g} (allowed: {LIMIT:g} of it); try the "
            "other --exporter"
        )
    return worst


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
