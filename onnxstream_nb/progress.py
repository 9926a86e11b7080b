"""Progress as every part of the package reports it: a line of text and the fraction done."""

from __future__ import annotations

from collections.abc import Callable
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
