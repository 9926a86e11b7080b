"""Operators as launches on a GPU: how they are declared, run at once, and captured as a graph.

Dims: none of their own.

An operator of the CPU is given to GPUs by a function that says what to launch (`on_gpu`). It is
called when an input lies on one; where it gives None, or memory does not suffice, the CPU computes,
and what it needs comes back.
"""

from dataclasses import replace

import numpy as np

from .. import registry
from ..errors import DeviceMemoryError
from .weight import decode


class DeviceRows:
    """The launches of one operator, to be run now and, as they stand, again.

    They read and write fixed addresses. `uploads` are arrays of the CPU that are read, and where;
    `slots` refer to those of a cache whose length they read; `checks` look, before they are run
    again, at what may have changed. `host` is the CPU's operator.
    """

    swift = True  # nobody needs to stop it half-way
    fetch = None

    def __init__(self, board, host=None):
        self.board, self.host = board, host
        self.outputs = ()
        self.launches, self.uploads, self.slots, self.checks, self._keep = [], [], [], [], []

    def address(self, value, dtype=None):
        """Where a value lies: an array of the CPU is copied, as elements of another type if one is
        given."""
        if isinstance(value, np.ndarray):
            target = self.board.put(value, dtype)
            if not self.board.is_constant(value):
                self.uploads.append((value, target))
            value = target
        self._keep.append(value)
        return value.address

    def room(self, shape, dtype=np.float32):
        """An array for results, or for what is between."""
        made = self.board.room(shape, dtype)
        self._keep.append(made)
        return made

    def launch(self, kernel, grid, *arguments):
        """Add a launch of `grid` blocks of as many threads as the kernel has."""
        self.add(kernel, grid, (kernel.threads,), arguments)

    def add(self, kernel, grid, block, arguments):
        """Add a launch; one of no blocks is none."""
        if all(grid):
            self.launches.append((kernel, grid, block, arguments))

    def giving(self, *outputs):
        """Itself, with these results."""
        self.outputs = outputs
        return self

    @staticmethod
    def table(parts):
        """A graph of several such rows."""
        return DeviceTable(parts)

    def run(self):
        """Launch all now; the outputs, alone when there is one."""
        for launch in self.launches:
            self.board.launch(*launch)
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs


class DeviceTable:
    """The launches of several operators as one graph, which is replayed for one position after the
    other."""

    def __init__(self, parts):
        self._parts = list(parts)
        self._board = self._parts[0].board
        self._uploads = {id(t): (a, t) for part in self._parts for a, t in part.uploads}
        self._slots = [slot for part in self._parts for slot in part.slots]
        self._checks = [check for part in self._parts for check in part.checks]
        self._graph = self._board.capture(self._launch, self)

    def _launch(self):
        for part in self._parts:
            for launch in part.launches:
                self._board.launch(*launch)

    def run(self, offset):
        """Run it for what its inputs and slots now hold."""
        for check in self._checks:
            check()
        for array, target in self._uploads.values():
            self._board.send(array, target)
        for reference in self._slots:
            slot = reference()
            if slot is not None:
                slot.past()
        self._board.replay(self._graph)


def on_gpu(op_type, *places, domain="", otherwise=None):
    """Declare how an operator is launched when one of its inputs, of which those at `places` may
    come as they are on a GPU, lies there.

    The function takes a DeviceRows to fill, and what the operator takes; it returns it with its
    outputs, or None for what it does not do. `otherwise` takes the CPU's operator and what that
    takes, for who must do more than bring the inputs back.
    """

    def declare(lower):
        for host in registry.declared(op_type, domain).values():
            registry.register(_given(host, lower, frozenset(places), otherwise or by_host))
        return lower

    return declare


def _given(host, lower, places, otherwise):
    def lowered(*arguments, **attributes):
        board = board_of(arguments)
        if board is None or any(map(_is_elsewhere, arguments)):
            return None
        try:
            return lower(DeviceRows(board, host), *arguments, **attributes)
        except DeviceMemoryError as error:
            board.failed(error)
            return None

    def run(*arguments, **attributes):
        rows = lowered(*arguments, **attributes)
        if rows is not None:
            return rows.run()
        return otherwise(host, *arguments, **attributes)

    return replace(
        host, device="cuda", function=run, lower=lowered, native=host.native | places, uses=(),
        working=None,
    )  # fmt: skip


def board_of(arguments):
    """The board on which one of them lies, or None."""
    boards = (getattr(argument, "board", None) for argument in arguments)
    return next((board for board in boards if board is not None), None)


def _is_elsewhere(value):
    """Whether it is a weight in the CPU's memory: one that others read as it is stored."""
    return hasattr(value, "ref") and not hasattr(value, "board")


def by_host(host, *arguments, **attributes):
    """The CPU's operator on what comes back from the GPU."""
    values = [host_value(a, i in host.native) for i, a in enumerate(arguments)]
    return host.function(*values, **attributes)


def host_value(value, native):
    """An argument as the CPU takes it, encoded where that is `native`: a matrix on a GPU is read
    from where it came from."""
    if hasattr(value, "host"):
        value = value.host()
    if value is None or isinstance(value, np.ndarray) or hasattr(value, "reserve"):
        return value
    if hasattr(value, "ref"):
        return value if native else np.asarray(decode(value))
    return np.asarray(value)
