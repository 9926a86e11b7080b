"""What the writers of formats write to: a folder that takes files, one after the other."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import numpy as np

Data = bytes | memoryview | np.ndarray[Any, np.dtype[np.uint8]]


def view_of(data: Data) -> memoryview:
    """The same bytes, one by one."""
    return memoryview(cast(Any, data)).cast("B")


class Sink(Protocol):
    """A file under construction."""

    def write(self, data: Data) -> None:
        """Append bytes, which must not change afterwards: they may be written later."""


class Folder(Protocol):
    """A folder under construction."""

    def file(self, name: str) -> AbstractContextManager[Sink]:
        """A new file in the folder, complete when the block ends."""

    def reserve(self, nbytes: int) -> None:
        """Say how much will be written; raises OutputError when the disk has not so much free."""
