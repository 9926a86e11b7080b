"""The thread team: it walks a table of kernels, all threads together, a barrier after each row.

Shapes: a table is (rows, COLUMNS) int64: column 0 a kernel's address, the rest its arguments. The
team's state is one int64 a cache line: generation, table, rows, threads, barrier count, barrier
epoch, stop, then one "parked" flag a thread.

The calling thread is member 0. The others spin for a moment between tables and then park in
Python on an event, so that an idle engine costs nothing. A member that waits yields its core to
whoever needs it after some spinning.
"""

import sys
import threading
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types

from .jit import JIT, arg, float_bits, jit, kernel
from .simd import I32, I64, ON_X86, VOID, address, call, primitive
from .vector import atomic_add, atomic_load, atomic_store, peek_i64

COLUMNS = 32
LINE = 64
GENERATION, TABLE, ROWS, THREADS, COUNT, EPOCH, STOP = (i * LINE for i in range(7))
PARKED = 8 * LINE
SPINS_BEFORE_YIELD = 2000
SPINS_BEFORE_PARKING = 40000
MAX_THREADS = 64

if JIT and sys.platform != "win32":
    yield_core = types.ExternalFunction("sched_yield", types.int32())
else:
    yield_core = jit(lambda: 0)


@primitive(types.void, twin=lambda: None)
def pause(b):
    """Tell the core that this is a spin loop."""
    if ON_X86:
        call(b, "llvm.x86.sse2.pause", VOID, [])
    else:
        call(b, "llvm.aarch64.hint", VOID, [ir.Constant(I32, 1)])


@primitive(types.void, address, address, types.int64, types.int64, twin=None)
def call_kernel(b, function, args, thread, threads):
    """Call the kernel at an address."""
    kind = ir.FunctionType(VOID, [I64, I64, I64])
    b.call(b.inttoptr(function, kind.as_pointer()), [args, thread, threads])


@jit
def wait_at_barrier(state, threads):
    """Return when all `threads` members have come here."""
    epoch = atomic_load(state + EPOCH)
    if atomic_add(state + COUNT, 1) == threads - 1:
        atomic_store(state + COUNT, 0)
        atomic_store(state + EPOCH, epoch + 1)
        return
    spins = 0
    while atomic_load(state + EPOCH) == epoch:
        pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            yield_core()


@jit
def walk(state, thread):
    """Run this member's part of every row of the published table."""
    table = peek_i64(state + TABLE)
    rows = peek_i64(state + ROWS)
    threads = peek_i64(state + THREADS)
    for i in range(rows):
        row = table + 8 * COLUMNS * i
        call_kernel(peek_i64(row), row + 8, thread, threads)
        if threads > 1:
            wait_at_barrier(state, threads)


@kernel
def team_lead(args, thread, threads):
    """Publish a table and walk it as member 0. args: state, table, rows, threads, publish, parked.

    Shapes: none; table is (rows, COLUMNS) int64. With publish set, `parked` (an address) receives
    how many members sleep in Python; when any does, return at once so that they can be woken, and
    expect to be called again with publish unset.
    """
    state = arg(args, 0)
    if arg(args, 4):
        atomic_store(state + TABLE, arg(args, 1))
        atomic_store(state + ROWS, arg(args, 2))
        atomic_store(state + THREADS, arg(args, 3))
        atomic_add(state + GENERATION, 1)
        asleep = 0
        for member in range(1, arg(args, 3)):
            asleep += atomic_load(state + PARKED + LINE * member)
        atomic_store(args + 8 * 5, asleep)
        if asleep:
            return
    walk(state, 0)


@kernel
def team_member(args, thread, threads):
    """Walk tables as member `thread` until told to stop, or until nothing came for a while.

    args: state, the generation last seen (updated). Shapes: none.
    """
    state = arg(args, 0)
    parked = state + PARKED + LINE * thread
    spins = 0
    while atomic_load(state + STOP) == 0:
        generation = atomic_load(state + GENERATION)
        if generation != arg(args, 1):
            atomic_store(parked, 0)
            atomic_store(args + 8, generation)
            if thread < atomic_load(state + THREADS):
                walk(state, thread)
            spins = 0
            continue
        if spins > SPINS_BEFORE_PARKING:
            atomic_store(parked, 1)
            # The leader publishes before it looks at the flag, so one of the two sees the other.
            if atomic_load(state + GENERATION) == generation:
                return
        pause()
        spins += 1


class Team:
    """`size` threads that run tables of kernels. `run` is for one caller at a time."""

    def __init__(self, size):
        self.size = max(1, min(int(size), MAX_THREADS))
        memory = np.zeros((PARKED + LINE * (MAX_THREADS + 1)) // 8 + 8, np.int64)
        self._memory = memory
        self._state = (memory.ctypes.data + LINE - 1) // LINE * LINE
        self._args = np.zeros(8, np.int64)
        self._table = np.zeros((16, COLUMNS), np.int64)
        self._scratch = np.empty(0, np.uint8)
        self._lock = threading.Lock()
        self._wake = [threading.Event() for _ in range(self.size)]
        self._started = False

    def scratch(self, each):
        """Working memory of at least `each` bytes a thread: its address, and the bytes between."""
        each = (each + 4095) // 4096 * 4096
        if each * self.size + LINE > self._scratch.nbytes:
            self._scratch = np.empty(each * self.size + LINE, np.uint8)
        return (self._scratch.ctypes.data + LINE - 1) // LINE * LINE, each

    def _start(self):
        self._started = True
        if JIT:
            team_member.call, team_lead.call  # noqa: B018 - loaded here, not in the threads
            for member in range(1, self.size):
                threading.Thread(target=self._work, args=(member,), daemon=True).start()

    def _work(self, member):
        args = np.array([self._state, 0], np.int64)
        where, call, wake = args.ctypes.data, team_member.call, self._wake[member]
        while True:
            call(where, member, self.size)
            wake.wait()
            wake.clear()

    def run(self, rows):
        """Run rows of (kernel, *arguments) in order; floats are passed as `float_bits`."""
        with self._lock:
            if len(rows) > len(self._table):
                self._table = np.zeros((2 * len(rows), COLUMNS), np.int64)
            if not JIT:
                return self._run_uncompiled(rows)
            for line, (function, *values) in zip(self._table, rows, strict=False):
                line[0] = function.address
                line[1 : 1 + len(values)] = values
            return self._run_table(self._table.ctypes.data, len(rows))

    def _run_table(self, table, rows):
        if not self._started:
            self._start()
        args = self._args
        args[:5] = self._state, table, rows, self.size, 1
        where = args.ctypes.data
        args[5] = 0
        team_lead.call(where, 0, self.size)
        if args[5]:
            for event in self._wake[1:]:
                event.set()
            args[4] = 0
            team_lead.call(where, 0, self.size)

    def _run_uncompiled(self, rows):
        for line, (function, *values) in zip(self._table, rows, strict=False):
            line[: len(values)] = values
            for thread in range(self.size):
                function(line.ctypes.data, thread, self.size)


@cache
def team_of(size):
    """The process's team of that size; teams are shared by all sessions."""
    return Team(size)


_local = threading.local()


def team():
    """The team that kernels called from this Python thread use; one thread unless told."""
    return team_of(getattr(_local, "size", 1))


def set_threads(size):
    """Choose how many threads kernels called from this Python thread use."""
    _local.size = int(size)


__all__ = ["float_bits", "set_threads", "team", "team_of"]
