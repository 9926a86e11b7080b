"""Progress as every part of the package reports it: a line of text and the fraction done, and how
far a reply is that somebody waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Report = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done (None when unknown)."""


class Download(Protocol):
    """Where a download stands: bytes of all files, the file's number from 1, a remark or ""."""

    @property
    def file(self) -> str:
        """The file being fetched."""

    @property
    def done_bytes(self) -> int:
        """Bytes here."""

    @property
    def total_bytes(self) -> int:
        """Bytes in all; 0 when unknown."""

    @property
    def file_index(self) -> int:
        """Its number, from 1."""

    @property
    def file_count(self) -> int:
        """How many files."""

    @property
    def note(self) -> str:
        """A remark to show, or an empty text."""


def of_download(report: Report) -> Callable[[Download], None]:
    """A callback for downloads that tells `report` the file, its number, and its bytes."""

    def on_download(at: Download) -> None:
        done, total = at.done_bytes / 1e6, at.total_bytes / 1e6
        count = f" ({at.file_index}/{at.file_count})" if at.file_count > 1 else ""
        size = f"{done:.1f} of {total:.1f} MB" if total else f"{done:.1f} MB"
        note = f", {at.note}" if at.note else ""
        report(
            f"downloading {at.file}{count} {size}{note}", min(done / total, 1.0) if total else None
        )

    return on_download


@dataclass(frozen=True, slots=True)
class Reading:
    """A pass over a model's weights that is under way.

    `weight` is what was read from disk last ("" when every weight is in memory), `pass_read` of
    `pass_bytes` bytes of this pass have been used, `bytes_read` counts all since the model was
    opened. `tokens` of the `wanted` that the context is to hold are in it; `now` more are being
    read by this pass.
    """

    weight: str
    bytes_read: int
    pass_read: int
    pass_bytes: int
    tokens: int
    wanted: int
    now: int

    @property
    def tokens_read(self) -> float:
        """`tokens` with the share of the pass's own that is done, as far as its bytes tell it."""
        share = self.pass_read / self.pass_bytes if self.pass_bytes else 0.0
        return self.tokens + share * self.now


@dataclass(frozen=True, slots=True)
class ReplyProgress:
    """How far a reply is: `reading` is what its next token waits for, None between two passes.

    `written` tokens are there, at most `left` more will come, and one takes `token_s` seconds on
    average, None before there is an average.
    """

    reading: Reading | None
    written: int
    left: int
    token_s: float | None
