"""Which calls of a table the thread team walks as one row, with no barrier between them.

Dims: a call is cut into S shares; a line of a table is COLUMNS int64, see threads.py.

A row of a table begins when the one before it is complete: for a small matrix that wait, and what
the shares' ends lie apart, count as much as the product. It is not needed between calls that do
not depend on each other, as the products of one x with several matrices; nor where a share of the
later one reads nothing of the earlier one's but what the same share wrote, as when what a product
gives is activated, multiplied, rotated or added element by element. Such calls become one row: each
share of it runs its part of all of them, and finds what it needs in its own cache.

Such calls have one share a member, or more where they are cut alike then, too: a member that is
held up for a moment leaves the rest to others.

What a call computes is what it computes by itself: so nothing changes, not even the last bit.
"""

from dataclasses import dataclass

from .jit import JIT, arg, kernel
from .threads import COLUMNS, LINE, call_kernel
from .vector import peek_i64, prefetch

SHARE_BYTES = 1 << 17  # of weights: some 10 us, far longer than it takes to claim a share


@kernel
def joined(args, thread, threads):
    """This share of several calls, one after the other. args: their lines (count, COLUMNS), count.

    Shapes: none of its own.
    """
    for i in range(8 * COLUMNS * arg(args, 1) // LINE):
        prefetch(arg(args, 0) + LINE * i)
    for i in range(arg(args, 1)):
        line = arg(args, 0) + 8 * COLUMNS * i
        call_kernel(peek_i64(line), line + 8, thread, threads)


@dataclass(frozen=True, slots=True)
class Flow:
    """What a call reads and writes, stretches (address, bytes) of memory, and how it is cut.

    A share writes `each` elements of every one of its `items`, which are dealt out in blocks of
    `align`; of what is in `own` it reads the same elements and no others, of what is in `whole` it
    may read all. With 0 items nobody knows which share writes what. `weights` are the bytes of its
    weights, of which each share reads its own.
    """

    writes: tuple
    whole: tuple = ()
    own: tuple = ()
    items: int = 0
    align: int = 1
    each: int = 1
    weights: int = 0

    def cut(self, shares):
        """Where the shares begin, in elements, and where the last one ends."""
        blocks = -(-self.items // self.align)
        starts = (min(self.items, blocks * t // shares * self.align) for t in range(shares + 1))
        return tuple(self.each * start for start in starts)


@dataclass(slots=True)
class Line:
    """A call (kernel, *arguments), whether the leader runs it alone, its Flow or None, and which
    arguments grow: (argument, increment a position)."""

    call: tuple
    serial: bool
    flow: Flow | None
    growth: tuple


def rows_of(parts, shares):
    """The rows of a table for these parts (lowered.Rows), each a list of Lines: calls that are not
    to be waited for stand in one. `shares` is how many a row is cut into."""
    rows = []
    for line in _without_repetition(_lines(parts)):
        joins = JIT and rows and not rows[-1][0].serial  # what has no address cannot be called
        if joins and _is_independent(line.flow, rows[-1], shares):
            rows[-1].append(line)
        else:
            rows.append([line])
    return rows


def shares_of(row, team):
    """Into how many shares a row is cut, as SHARES_ROW says it: the more, the better it is dealt
    out, as long as each has enough to read and its calls need not wait for one another."""
    if row[0].serial:
        return 1
    flows = [line.flow for line in row]
    wanted = sum(flow.weights for flow in flows if flow) // SHARE_BYTES
    shares = team.most
    while shares > team.size:
        apart = (_is_independent(flow, row[:i], shares) for i, flow in enumerate(flows))
        if shares <= wanted and all(apart):
            return shares
        shares //= 2
    return team.size if len(row) > 1 else 0


def _lines(parts):
    """The calls of all parts in an order that keeps them right: those of one `source` stand
    together, where the first of them was, since it is not written to once it is read."""
    first = {}
    places = [(first.setdefault(part.source, i) if part.source else i) for i, part in
              enumerate(parts)]  # fmt: skip
    for _, i in sorted(zip(places, range(len(parts)), strict=True)):
        part = parts[i]
        serial = part.serial if isinstance(part.serial, tuple) else [part.serial] * len(part.calls)
        flows = part.flows or [None] * len(part.calls)
        for j, each in enumerate(zip(part.calls, serial, flows, strict=True)):
            yield Line(*each, tuple(rest for call, *rest in part.growth if call == j))


def _without_repetition(lines):
    """The lines, but for those that write again what is still there."""
    done = []
    for line in lines:
        if not _is_done(line, done):
            done.append(line)
    return done


def _is_done(line, before):
    if line.flow is None:
        return False
    touched = (*line.flow.writes, *line.flow.own, *line.flow.whole)
    for other in reversed(before):
        if other.call == line.call:
            return True
        if other.flow is None or _overlap(other.flow.writes, touched):
            return False
    return False


def _is_independent(flow, row, shares):
    """Whether no share of a call has to wait for another share of the calls in a row."""
    if flow is None:
        return False
    for other in (line.flow for line in row):
        if other is None or _overlap(flow.writes, (*other.writes, *other.whole, *other.own)):
            return False
        if _overlap(flow.whole, other.writes):
            return False
        read = [s for s in flow.own if _overlap([s], other.writes)]
        alike = flow.items and other.items and flow.cut(shares) == other.cut(shares)
        if read and not (alike and all(s in other.writes for s in read)):
            return False
    return True


def _overlap(some, others):
    return any(a < b + m and b < a + n for a, n in some for b, m in others)
