"""Text on its way to a terminal."""

from __future__ import annotations

from collections.abc import Sequence

_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def clean(text: str) -> str:
    """`text` without control characters except line breaks and tabs: no escape sequence in what
    a model or a file name says may reach the terminal."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """`text` cleaned, and every run of white space in it one space."""
    return clean(" ".join(text.split()))


def join_within(parts: Sequence[str], width: int, separator: str = " · ") -> list[str]:
    """`parts` joined into lines of at most `width` characters, broken only between parts."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
        else:
            lines.append(part)
    return lines
