"""Watch streamed text for stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError


class StopStrings:
    """Cuts streamed text at the first stop string to be completed, however the text is chunked.

    Text that might be the beginning of a stop string is held back until that is settled."""

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise UsageError("stop should be a list of texts, none of them empty (--stop)")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met: nothing comes after it)."""
        if self.stopped:
            return "", True
        held = self._held + text
        found = [(held.find(s) + len(s), -len(s)) for s in self._stops if s in held]
        if found:
            self.stopped, self._held = True, ""
            end, length = min(found)
            return held[: end + length], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
