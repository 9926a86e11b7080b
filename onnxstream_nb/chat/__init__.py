"""The conversation at the terminal: turns, /commands, saved chats, Ctrl-C."""

from __future__ import annotations

from .loop import ChatOptions, run

__all__ = ["ChatOptions", "run"]
