"""Sets of integers as intervals: which parts of a range of memory are free, and which were used.

Shapes: none. An interval (start, stop) holds start and not stop.
"""

from bisect import bisect_left, bisect_right
from operator import itemgetter

_start, _stop = itemgetter(0), itemgetter(1)


class Intervals:
    """Sorted intervals, none of which touches another.

    Every change is one assignment, so that an interrupt between two lines leaves a valid set.
    """

    def __init__(self, *spans):
        self.spans = []
        for span in spans:
            self.add(*span)

    def __iter__(self):
        return iter(self.spans)

    @property
    def total(self):
        """How many integers it holds."""
        return sum(stop - start for start, stop in self.spans)

    def add(self, start, stop):
        """Take in start .. stop, whether it is there or not."""
        first = bisect_left(self.spans, start, key=_stop)
        behind = bisect_right(self.spans, stop, key=_start)
        if first < behind:  # these touch it
            start = min(start, self.spans[first][0])
            stop = max(stop, self.spans[behind - 1][1])
        if start < stop:
            self.spans[first:behind] = [(start, stop)]

    def remove(self, start, stop):
        """Let go of start .. stop, whether it is there or not."""
        first, behind = self._within(start, stop)
        if first >= behind:
            return
        left, right = (self.spans[first][0], start), (stop, self.spans[behind - 1][1])
        self.spans[first:behind] = [s for s in (left, right) if s[0] < s[1]]

    def overlap(self, start, stop):
        """What it holds of start .. stop, as intervals."""
        first, behind = self._within(start, stop)
        return [(max(start, a), min(stop, b)) for a, b in self.spans[first:behind]]

    def lowest(self, size):
        """Where the first interval of at least `size` starts, or None."""
        return next((start for start, stop in self.spans if stop - start >= size), None)

    def _within(self, start, stop):
        """The places of those that share an element with start .. stop."""
        if start >= stop:
            return 0, 0
        first = bisect_right(self.spans, start, key=_stop)
        return first, bisect_left(self.spans, stop, key=_start)
