"""The errors a user meets. Every message names the file, tensor or flag, and the remedy."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""What an OSError's errno is when a disk, a limit on files or a quota is full."""


class OnnxstreamError(Exception):
    """Base of all errors this package raises on purpose; the command line prints it on one line."""


class ModelError(OnnxstreamError):
    """The model's files are missing, damaged, unsafe or of an unsupported kind."""


class UnsupportedError(OnnxstreamError):
    """The model is well formed, but uses an operator, encoding or field that is not supported."""


class ShapeError(OnnxstreamError, ValueError):
    """A feed or a tensor has another shape or type than the graph declares."""


class MemoryBudgetError(OnnxstreamError):
    """The model cannot run in the memory it was given; the message says what would do."""


class DeviceError(OnnxstreamError):
    """A GPU, or its driver, refused something."""


class DeviceMemoryError(DeviceError):
    """A GPU has no memory of that size left."""


class DownloadError(OnnxstreamError):
    """A download failed or a file is not what its hash says."""


class OutputError(OnnxstreamError):
    """A result cannot be written where it is wanted; nothing of it is left there."""


class UsageError(OnnxstreamError, ValueError):
    """A flag, an option or an argument makes no sense; the message names it."""


class Interrupted(OnnxstreamError):
    """The caller stopped a run that was under way."""
