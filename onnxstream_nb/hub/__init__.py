"""Models by name: local paths, the catalogue, hub repositories; downloads what is missing."""

from __future__ import annotations

from .catalogue import CATALOGUE, Entry
from .models import Installed, Resolved, installed, pull, recorded, remove, resolve
from .store import (
    Copy,
    FileRecord,
    Progress,
    ProgressCallback,
    cache_dir,
    file_digest,
    packed_dir,
    spill_dir,
)

__all__ = [
    "CATALOGUE", "Copy", "Entry", "FileRecord", "Installed", "Progress", "ProgressCallback",
    "Resolved", "cache_dir", "file_digest", "installed", "packed_dir", "pull", "recorded",
    "remove", "resolve", "spill_dir",
]  # fmt: skip
