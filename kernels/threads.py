"""The thread team: it walks a table of kernels, all members together, one row after the other.

Shapes: a table is (rows, COLUMNS) int64: column 0 a kernel's address, then its arguments. The
team's state is one int64 a cache line: claims, row, done, shares, then one "parked" flag a
member.

A row is cut into shares, two a member unless it says otherwise; a kernel's (thread, threads) are a
share and their number. A member takes its own shares first, one behind the other, so that on a
quiet machine the cut is static, and then those that nobody has taken, another's last one first: a
member that the system has put aside holds up nobody, unless it has begun a share. Who waits for
that sleeps after a while, on a futex where there is one: spinning would use up the time that the
system gives to the program, and a busy machine has little of it. `claims` holds the row's serial
number above a bit for each share that is taken, or is not there.

The calling thread is member 0 and leads from row to row. The others spin for a moment between
tables, sleep for a moment, and then park in Python on an event, so that an idle engine costs
nothing. (They spin without the processor's pause instruction: a hypervisor takes it for a reason to
run somebody else.)
"""

import platform
import sys
import threading
from functools import cache

import numpy as np
from llvmlite import ir
from numba import types

from .buffers import empty
from .jit import JIT, arg, float_bits, jit, kernel
from .simd import I64, VOID, address, primitive
from .vector import (
    atomic_add, atomic_compare_exchange, atomic_load, atomic_store, peek_i64,
)  # fmt: skip

COLUMNS = 40
LINE = 64
CLAIMS, ROW, DONE, SHARES, WAITING, STARTED, SLEEPERS, TIMEOUT = (i * LINE for i in range(8))
PARKED = 8 * LINE
SERIAL = 32  # claims holds the shares in its lower bits, the serial number above
LEADER_SPINS = 40000  # some 0.1 ms: then the system has put a member aside, with its share
MEMBER_SPINS = 80000  # as long as what Python does between two tables, and more
SPINS_BEFORE_PARKING = 160000
SPINS_A_SLEEP = 20000  # what a sleep counts for
SHARES_ROW = COLUMNS - 1  # this column of a row: into how many shares it is cut, at most as many
# as any is; 0 when it is two a member. What is not worth sharing is 1: the leader runs it alone.
TAKEN = (1 << SERIAL) - 1  # of claims: nothing is left
MAX_THREADS = 32
FINEST = 8  # shares a member, of any row
KEPT_EACH, KEPT = 1 << 18, 1 << 20  # bytes of a share's, and of common working memory that a team
# keeps; more is lent by the arena, for a call

SYSTEM_CALLS = {"x86_64": 202, "aarch64": 98}  # futex
FUTEX = SYSTEM_CALLS.get(platform.machine()) if sys.platform == "linux" else None
WAIT, WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, for threads of one process

if JIT and FUTEX:
    system_call = types.ExternalFunction("syscall", types.int64(*7 * [types.int64]))
elif JIT and sys.platform != "win32":
    yield_core = types.ExternalFunction("sched_yield", types.int32())
else:
    yield_core = jit(lambda: 0)

if FUTEX:

    @jit
    def sleep_while(word, value, timeout):
        """Sleep while the lower half of the int64 at `word` is that of `value`, or some 2 ms."""
        system_call(FUTEX, word, WAIT, value & 0xFFFFFFFF, timeout, 0, 0)

    @jit
    def wake(word):
        """Wake all that sleep on it."""
        system_call(FUTEX, word, WAKE, MAX_THREADS, 0, 0, 0)

else:

    @jit
    def sleep_while(word, value, timeout):
        """Let somebody else run."""
        yield_core()

    @jit
    def wake(word):
        """Nobody sleeps."""


@primitive(types.void, address, address, types.int64, types.int64, twin=None)
def call_kernel(b, function, args, thread, threads):
    """Call the kernel at an address."""
    kind = ir.FunctionType(VOID, [I64, I64, I64])
    b.call(b.inttoptr(function, kind.as_pointer()), [args, thread, threads])


@jit
def claim(state, serial, first, own, shares):
    """Take a share of row `serial`: one of the `own` from `first` on, or the next before them,
    around; -1 when none is left."""
    while True:
        claims = atomic_load(state + CLAIMS)
        if claims >> SERIAL != serial:
            return -1
        found = -1
        for i in range(shares):
            share = (first + (i if i < own else own - 1 - i)) % shares
            if claims >> share & 1 == 0:
                found = share
                break
        if found < 0:
            return -1
        if atomic_compare_exchange(state + CLAIMS, claims, claims | 1 << found) == claims:
            return found


@jit
def work(state, serial, member, members, shares):
    """Run shares of row `serial` until none is left. Of another row's number of `shares` none is
    free, and the row stays as long as one that was taken is not done."""
    first = member * shares // members
    own = (member + 1) * shares // members - first
    share = claim(state, serial, first, own, shares)
    while share >= 0:
        row, shares = atomic_load(state + ROW), atomic_load(state + SHARES)
        call_kernel(peek_i64(row), row + 8, share, shares)
        atomic_add(state + DONE, 1)
        if atomic_load(state + WAITING):
            wake(state + DONE)
        share = claim(state, serial, first, own, shares)


@kernel
def team_lead(args, thread, threads):
    """Walk a table as member 0. args: state, table, rows, shares of a row that does not say, and
    the most of any.

    Shapes: table (rows, COLUMNS).
    """
    state, table, most = arg(args, 0), arg(args, 1), arg(args, 4)
    for i in range(arg(args, 2)):
        row = table + 8 * COLUMNS * i
        said = peek_i64(row + 8 * SHARES_ROW)
        shares = min(most, said) if said else arg(args, 3)
        if shares == 1:
            call_kernel(peek_i64(row), row + 8, 0, 1)
            continue
        serial = (atomic_load(state + CLAIMS) >> SERIAL) + 1 & 0x3FFFFFFF
        atomic_store(state + ROW, row)
        atomic_store(state + SHARES, shares)
        atomic_store(state + DONE, 0)
        atomic_store(state + CLAIMS, serial << SERIAL | TAKEN >> shares << shares)
        atomic_store(state + STARTED, serial)
        if atomic_load(state + SLEEPERS):
            wake(state + STARTED)
        work(state, serial, 0, threads, shares)
        spins, done = 0, atomic_load(state + DONE)
        while done < shares:
            spins += 1
            if spins > LEADER_SPINS:
                atomic_store(state + WAITING, 1)
                sleep_while(state + DONE, done, state + TIMEOUT)
            done = atomic_load(state + DONE)
        if spins > LEADER_SPINS:
            atomic_store(state + WAITING, 0)


@kernel
def team_member(args, thread, threads):
    """Help with rows as member `thread` until nothing has come for a while.

    args: state. Shapes: none.
    """
    state = arg(args, 0)
    parked = state + PARKED + LINE * thread
    atomic_store(parked, 0)
    serial, spins = -1, 0
    while True:
        now = atomic_load(state + CLAIMS) >> SERIAL
        if now != serial:
            serial, spins = now, 0
            shares = atomic_load(state + SHARES)
            work(state, serial, thread, threads, shares)
            continue
        if spins > SPINS_BEFORE_PARKING:
            atomic_store(parked, 1)
            if atomic_load(state + CLAIMS) >> SERIAL == serial:
                return
            atomic_store(parked, 0)
        if spins > MEMBER_SPINS:
            atomic_add(state + SLEEPERS, 1)
            if atomic_load(state + CLAIMS) >> SERIAL == serial:
                sleep_while(state + STARTED, serial, state + TIMEOUT)
                spins += SPINS_A_SLEEP
            atomic_add(state + SLEEPERS, -1)
        spins += 1


class Team:
    """`size` threads that run tables of kernels in `shares` parts; callers take turns."""

    def __init__(self, size):
        self.size = max(1, min(int(size), MAX_THREADS))
        memory = np.zeros((PARKED + LINE * (MAX_THREADS + 1)) // 8 + 8, np.int64)
        self._memory = memory
        skip = -memory.ctypes.data % LINE // 8
        self._state = memory.ctypes.data + 8 * skip
        self.shares, self.most = (
            1 if self.size == 1 else min(n * self.size, SERIAL) for n in (2, FINEST)
        )
        memory[skip + TIMEOUT // 8 :][:2] = 0, 2_000_000  # seconds, nanoseconds
        memory[skip + CLAIMS // 8] = TAKEN  # nothing to take before the first row
        self._parked = memory[skip + PARKED // 8 :: LINE // 8][1 : self.size]
        self._args = np.array([self._state, 0, 0, self.shares, self.most], np.int64)
        self._table = np.zeros((16, COLUMNS), np.int64)
        self._rooms = {}  # what it keeps of working memory, by name
        self._lock = threading.Lock()
        self._wake = [threading.Event() for _ in range(self.size)]
        self._started = False

    def scratch(self, each, shares=0):
        """Working memory of at least `each` bytes a share: address, bytes between, what holds it.

        All kernels that run one after the other may share it; a later call may get other memory.
        It is for two shares a member, or for more if `shares` says so.
        """
        each, shares = (each + 4095) // 4096 * 4096, shares or self.shares
        where, held = self._room("scratch", each * shares, KEPT_EACH * self.shares)
        return where, each, held

    def workspace(self, nbytes, name="workspace"):
        """Working memory for all members together, as `scratch`: address, what holds it; apart from
        that of another name."""
        return self._room(name, nbytes, KEPT)

    def _room(self, name, nbytes, kept):
        held = self._rooms.get(name)  # once: another Python thread may replace it meanwhile
        if nbytes > kept:
            held = empty(nbytes + LINE, np.uint8)
        elif held is None or nbytes + LINE > held.nbytes:
            held = self._rooms[name] = np.empty(nbytes + LINE, np.uint8)
        return (held.ctypes.data + LINE - 1) // LINE * LINE, held

    def _start(self):
        self._started = True
        if JIT:
            team_member.call, team_lead.call  # noqa: B018 - loaded here, not in the threads
            for member in range(1, self.size):
                threading.Thread(target=self._work, args=(member,), daemon=True).start()

    def _work(self, member):
        args = np.array([self._state], np.int64)
        where, call, wake = args.ctypes.data, team_member.call, self._wake[member]
        while True:
            call(where, member, self.size)
            wake.wait()
            wake.clear()

    def run(self, rows, serial=False):
        """Run rows of (kernel, *arguments) in order; floats are passed as `float_bits`.

        `serial` ones are not worth sharing: the calling thread runs them alone.
        """
        with self._lock:
            if len(rows) > len(self._table):
                self._table = np.zeros((2 * len(rows), COLUMNS), np.int64)
            fill_table(self._table, rows)
            self._table[: len(rows), SHARES_ROW] = serial
            self._walk(self._table, [function for function, *_ in rows])

    def run_table(self, table, functions):
        """Run a table (rows, COLUMNS) that `fill_table` made of these kernels."""
        with self._lock:
            self._walk(table, functions)

    def _walk(self, table, functions):
        if JIT:
            return self._run_table(table.ctypes.data, len(functions))
        for line, function in zip(table, functions, strict=False):
            said = int(line[SHARES_ROW])
            shares = min(self.most, said) if said else self.shares
            for share in range(shares):
                function(line.ctypes.data + 8, share, shares)
        return None

    def _run_table(self, table, rows):
        if not self._started:
            self._start()
        if self._parked.any():  # they join when they have woken up; nobody waits for them
            for event in self._wake[1:]:
                event.set()
        self._args[1:3] = table, rows
        team_lead.call(self._args.ctypes.data, 0, self.size)


def fill_table(table, rows):
    """Write rows of (kernel, *arguments) into a table (rows or more, COLUMNS)."""
    for line, (function, *values) in zip(table, rows, strict=False):
        line[0] = function.address
        line[1 : 1 + len(values)] = values


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


def set_precision(name):
    """Choose "fast" or "exact" products for kernels called from this Python thread."""
    _local.precision = name


def precision():
    """The precision of products in this Python thread; "exact" unless told."""
    return getattr(_local, "precision", "exact")


__all__ = [
    "fill_table",
    "float_bits",
    "precision",
    "set_precision",
    "set_threads",
    "team",
    "team_of",
]
