"""What the terminal shows: replies, footer, progress. It knows no model."""

from __future__ import annotations

from .terminal import Reply, ReplyStats, Terminal, download_progress, footer_parts, progress
from .told import held, telling

__all__ = [
    "Reply", "ReplyStats", "Terminal", "download_progress", "footer_parts", "held", "progress",
    "telling",
]  # fmt: skip
