"""Time and bytes per node, while somebody wants to know: feeds --trace, the footer and bench.

The executor asks `current()` once per run; None means that nothing is recorded and nothing costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Total:
    """What one operator has taken: calls, seconds, bytes of weights read."""

    calls: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(slots=True)
class Trace:
    """Totals by operator type."""

    totals: dict[str, Total] = field(default_factory=dict)

    def record(self, op_type: str, seconds: float, nbytes: int = 0) -> None:
        """Add one run of a node: its wall time, and the bytes of weights that it read."""
        total = self.totals.setdefault(op_type, Total())
        total.calls += 1
        total.seconds += seconds
        total.nbytes += nbytes

    def table(self) -> str:
        """The totals as text, the longest first."""
        if not self.totals:
            return "trace: no node was run"
        everything = sum(t.seconds for t in self.totals.values()) or 1.0
        lines = [f"{'operator':<28}{'calls':>9}{'seconds':>11}{'share':>8}{'GB':>10}{'GB/s':>8}"]
        for name, t in sorted(self.totals.items(), key=lambda item: -item[1].seconds):
            rate = t.nbytes / t.seconds / 1e9 if t.seconds else 0.0
            lines.append(
                f"{name:<28}{t.calls:>9}{t.seconds:>11.4f}{t.seconds / everything:>8.1%}"
                f"{t.nbytes / 1e9:>10.3f}{rate:>8.2f}"
            )
        return "\n".join(lines)


_current: Trace | None = None


def current() -> Trace | None:
    """The trace being recorded in this process, or None."""
    return _current


@contextmanager
def tracing() -> Iterator[Trace]:
    """Record into a new trace until the block ends; an outer one then goes on."""
    global _current
    outer, _current = _current, Trace()
    try:
        yield _current
    finally:
        _current = outer
