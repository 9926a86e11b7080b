"""What to say while the next token of a reply takes long: what is read, how fast, for how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..device import format_size
from ..progress import Reading, ReplyProgress
from .text import one_line

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
LONG_S = 1.0
FEW_TOKENS = 8  # a pass of no more writes, or checks guesses; one of more reads
SEPARATOR = " · "

Watch = Callable[[], ReplyProgress]
"""How far the reply is now; called from the thread that draws."""


class Waiting:
    """Knows how long the next token of a reply has been waited for. Call `arrived` with each."""

    def __init__(self, watch: Watch, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._clock = watch, clock
        self.arrived()

    def arrived(self) -> None:
        """A token is there; the next one is waited for."""
        self._since = self._clock()
        self._first: Reading | None = None  # of this wait
        self._last: Reading | None = None

    @property
    def waited_s(self) -> float:
        """Seconds since the last token, or since the reply was asked for."""
        return self._clock() - self._since

    def line(self, width: int) -> str:
        """The line to show, of at most `width` characters; empty in the first second."""
        progress, seconds = self._watch(), self.waited_s
        if progress.reading is not None:
            self._first, self._last = self._first or progress.reading, progress.reading
        if seconds < LONG_S or width < 1:
            return ""
        spinner = SPINNER[int(seconds * 10) % len(SPINNER)]
        parts = self._parts(progress, seconds)
        return f"{spinner} {fit(parts, width - 2)}"[:width]

    def _parts(self, progress: ReplyProgress, seconds: float) -> dict[str, str]:
        """The phrases by their kind, in the order in which they are shown."""
        at, first = self._last, self._first
        is_prompt = progress.written == 0 or (at is not None and at.now > FEW_TOKENS)
        parts = {"what": "reading the prompt" if is_prompt else f"token {progress.written + 1}"}
        if at is None or first is None:
            return parts
        if is_prompt:
            parts["what"] = f"prompt {at.tokens} of {at.wanted} tokens"
        rate = (at.bytes_read - first.bytes_read) / seconds
        if at.pass_bytes:
            parts |= _disk(at, rate, is_prompt)
        if is_prompt:
            left = _prompt_left(first, at, seconds)
            return parts if left is None else parts | {"left": f"{duration(left)} left"}
        token_s = progress.token_s
        if token_s is None and rate > 0:
            token_s = at.pass_bytes / rate  # nothing else is known of the first ones
        if token_s:
            left = max(0.0, progress.left * token_s - seconds)
            parts["left"] = f"at most {duration(left)} left"
        return parts


def _disk(at: Reading, rate: float, is_prompt: bool) -> dict[str, str]:
    weight = one_line(at.weight)
    if is_prompt:
        reading = {"weight": weight or "waiting for the disk"}
    else:
        reading = {"what": f"reading {weight}" if weight else "waiting for the disk"}
    return reading | {
        "rate": f"{format_size(rate)}/s",
        "amount": share(at.pass_read, at.pass_bytes),
    }


def _prompt_left(first: Reading, at: Reading, seconds: float) -> float | None:
    """Seconds until the prompt is read, if it goes on as it went; None when nothing is read yet."""
    done = at.tokens_read - first.tokens
    return seconds * (at.wanted - at.tokens_read) / done if done > 0 else None


def fit(parts: dict[str, str], width: int) -> str:
    """The phrases joined, the less important ones left out where they do not fit."""
    kept = dict(parts)
    for kind in ("amount", "rate", "weight", "what"):
        if len(SEPARATOR.join(kept.values())) <= width or len(kept) == 1:
            break
        kept.pop(kind, None)
    return SEPARATOR.join(kept.values())


def share(done: int, total: int) -> str:
    """Two sizes in the unit of the larger: `0.9 of 2.1 GB`."""
    units: Sequence[tuple[float, str]] = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((u for u in units if total >= u[0]), (1.0, "B"))
    digits = 0 if total >= 100 * unit or unit == 1 else 1
    return f"{done / unit:.{digits}f} of {total / unit:.{digits}f} {name}"


def duration(seconds: float) -> str:
    """Minutes and seconds, or with hours: `1:05`, `2:00:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
