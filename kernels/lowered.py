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
from .joined import joined, rows_of, shares_of
from .threads import COLUMNS, SHARES_ROW, fill_table, team

FEW_ROWS = 8
"""Up to so many tokens of a pass each get, to the last bit, what a pass of their own gives."""


@dataclass(slots=True)
class Rows:
    """Outputs, the calls (kernel, *arguments) that fill them, and what keeps their memory alive.

    `growth` lists (call, argument, increment a position). A `serial` operator is too small to be
    shared between threads; a tuple says it of each call. `flows` say of each call what it depends
    on (joined.Flow, or None), so that a table need not wait where that is not needed; those of the
    same `source` may be computed where the first of them is. What is `swift` is done before anybody
    can want to stop it. `fetch` brings what the calls read from elsewhere, before the table that
    they are in begins; `check` raises when what they read was wrong, which is looked at after them.
    """

    outputs: tuple
    calls: list
    growth: tuple = ()
    serial: bool | tuple = False
    keep: tuple = ()
    flows: tuple = ()
    source: object = None
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
        self._parts = list(parts)
        self._fetches = [part.fetch for part in parts if part.fetch is not None]
        self._checks = [part.check for part in parts if part.check is not None]
        rows = rows_of(self._parts, team().size)
        inner = [line for row in rows if len(row) > 1 for line in row]
        self._lines = np.zeros((len(rows) + len(inner), COLUMNS), np.int64)
        fill_table(self._lines[len(rows) :], [line.call for line in inner])
        self._functions, where, behind = [], [], len(rows)
        for i, row in enumerate(rows):
            place, call = (i, row[0].call) if len(row) == 1 else (behind, self._joined(behind, row))
            behind += len(row) if len(row) > 1 else 0
            self._functions.append(call[0])
            fill_table(self._lines[i:], [call])
            self._lines[i, SHARES_ROW] = shares_of(row, team())
            where += [(place + j, 1 + a, by) for j, line in enumerate(row) for a, by in line.growth]
        self._rows, self._columns, self._steps = np.array(where, np.int64).reshape(-1, 3).T
        self._start = self._lines[self._rows, self._columns]

    def _joined(self, first, row):
        """The call of the lines from `first` on."""
        return joined, self._lines[first:].ctypes.data, len(row)

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
