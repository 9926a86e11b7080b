"""Models by name: local paths, the catalogue, hub repositories; downloads what is missing."""

from __future__ import annotations

from .catalogue import CATALOGUE, Entry
from .models import Installed, Resolved, installed, pull, remove, resolve
from .store import Progress, ProgressCallback, cache_dir, packed_dir, spill_dir

__all__ = [
    "CATALOGUE", "Entry", "Installed", "Progress", "ProgressCallback", "Resolved",
    "cache_dir", "installed", "packed_dir", "pull", "remove", "resolve", "spill_dir",
]  # fmt: skip
