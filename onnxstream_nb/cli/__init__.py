"""The command line. Importing it imports nothing heavy: `--help` answers at once."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
