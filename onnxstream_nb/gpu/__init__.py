"""NVIDIA GPUs: memory, copies, launches and graphs, by the driver; nothing is imported without one
being asked for."""

from __future__ import annotations

from typing import Any


def asked(cuda: int | str | None) -> dict[str, Any]:
    """What `--cuda` asks for, as LanguageModel and Model.load take it; nothing without it, or of
    none of a GPU's memory."""
    return {"device": "cuda", "cuda": cuda} if cuda else {}
