"""Operators as rows of a table: what is computed once per token, without Python in between.

Dims: a table is (rows, COLUMNS) int64, see threads.py.

An operator that can be lowered returns `Rows`: the kernel calls that compute its outputs into
arrays of its own. A table of such rows can be run again when the inputs' elements have changed,
and for the next position of a cache: `growth` says which arguments then move, and by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..registry import op
from .threads import COLUMNS, SERIAL_ROW, fill_table, team

FEW_ROWS = 8
"""Up to so many tokens of a pass each get, to the last bit, what a pass of their own gives."""


@dataclass(slots=True)
class Rows:
    """Outputs, the calls (kernel, *arguments) that fill them, and what keeps their memory alive.

    `growth` lists (call, argument, increment a position). A `serial` operator is too small to be
    shared between threads. What is `swift` is done before anybody can want to stop it. `fetch`
    brings what they read from elsewhere, before the table that they are in begins; `check` raises
    when what they read was wrong, which is looked at after them.
    """

    outputs: tuple
    calls: list
    growth: tuple = ()
    serial: bool = False
    keep: tuple = ()
    fetch: Callable[[], object] | None = None
    check: Callable[[], object] | None = None
    swift = False

    @staticmethod
    def table(parts):
        """A table of several such rows."""
        return Table(parts)

    def run(self):
        """Run the calls now; the outputs, alone when there is one."""
        if self.fetch is not None:
            self.fetch()
        team().run(self.calls, self.serial)
        if self.check is not None:
            self.check()
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs


def plain(*arrays):
    """Whether all are contiguous float32 arrays, which kernels read as they are."""
    return all(
        isinstance(a, np.ndarray) and a.dtype == np.float32 and a.flags.c_contiguous for a in arrays
    )


class Table:
    """The rows of several operators, to be run at one position after the other."""

    def __init__(self, parts):
        calls = [call for part in parts for call in part.calls]
        self._functions = [function for function, *_ in calls]
        self._parts = list(parts)
        self._fetches = [part.fetch for part in parts if part.fetch is not None]
        self._checks = [part.check for part in parts if part.check is not None]
        self._lines = np.zeros((len(calls), COLUMNS), np.int64)
        fill_table(self._lines, calls)
        where, first = [], 0
        for part in parts:
            where += [(first + call, 1 + argument, by) for call, argument, by in part.growth]
            self._lines[first : first + len(part.calls), SERIAL_ROW] = part.serial
            first += len(part.calls)
        self._rows, self._columns, self._steps = np.array(where, np.int64).reshape(-1, 3).T
        self._start = self._lines[self._rows, self._columns]

    def run(self, offset):
        """Run it, `offset` positions after the one for which the rows were made."""
        for fetch in self._fetches:
            fetch()
        self._lines[self._rows, self._columns] = self._start + self._steps * offset
        team().run_table(self._lines, self._functions)
        for check in self._checks:
            check()


@op("Table", domain="onnxstream_nb")
def table(parts):
    """A table of lowered operators, of those that are lowered in one way."""
    return parts[0].table(parts)


@op("FewRows", domain="onnxstream_nb")
def few_rows():
    """How many rows at most are computed as if each were alone."""
    return FEW_ROWS
