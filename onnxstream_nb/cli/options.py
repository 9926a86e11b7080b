"""Flags as data: how each is written, read from the command line or the environment, and checked.

Every flag `--some-name` can also be given as the environment variable ONNXSTREAM_SOME_NAME. A value
that makes no sense is a UsageError that names where it came from: the flag or the variable.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import UsageError

Parse = Callable[[str, str], Any]
"""(text, source) -> value; `source` is the flag or variable that an error must name."""


@dataclass(frozen=True, slots=True)
class Option:
    """One flag. `flags` are its spellings, the long one last. A switch takes no value."""

    flags: tuple[str, ...]
    help: str
    parse: Parse
    metavar: str = ""
    default: Any = None
    repeat: bool = False
    required: bool = False

    @property
    def name(self) -> str:
        """The key of its value: `--top-k` gives `top_k`."""
        return self.flags[-1].lstrip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable that stands for it."""
        return "ONNXSTREAM_" + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone."""
        return self.parse is truth


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors instead of a usage page and an exit."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message and where to look."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def read_options(
    parser: Parser,
    options: Sequence[Option],
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """The values of all options and positionals: from the command line, else the environment,
    else the default."""
    for option in options:
        _declare(parser, option)
    given = vars(parser.parse_args(list(arguments)))
    return given | {o.name: _value(o, given[o.name], environment) for o in options}


def _declare(parser: Parser, option: Option) -> None:
    described = f"{option.help} [{option.variable}]".replace("%", "%%")
    if option.is_switch:
        parser.add_argument(
            *option.flags, dest=option.name, help=described, action="store_const", const="1"
        )
        return
    parser.add_argument(
        *option.flags,
        dest=option.name,
        metavar=option.metavar,
        help=described,
        action="append" if option.repeat else "store",
    )


def _value(option: Option, given: str | list[str] | None, environment: Mapping[str, str]) -> Any:
    source = option.flags[-1]
    if given is None and option.variable in environment:
        source, text = option.variable, environment[option.variable]
        given = [text] if option.repeat else text
    if given is None:
        if option.required:
            raise UsageError(f"{source} is missing; give it, or set {option.variable}")
        return option.default
    if isinstance(given, list):
        return tuple(option.parse(text, source) for text in given)
    return option.parse(given, source)


def text(given: str, source: str) -> str:
    """Any text but the empty one."""
    if not given:
        raise UsageError(f"{source}: the text is empty")
    return given


def truth(given: str, source: str) -> bool:
    """A switch: 1, true, yes, on, or 0, false, no, off, or empty for off."""
    word = given.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("", "0", "false", "no", "off"):
        return False
    raise UsageError(f"{source}: {given!r} is neither 1 nor 0")


def size(given: str, source: str) -> int:
    """Bytes: `2GB`, `512MB`, `1.5GiB`."""
    from ..device import parse_size

    return parse_size(given, source)


def gigabytes(given: str, source: str) -> int | str:
    """Bytes of a GPU's memory: `4GB`, or `4` for as much; 0 for none; or `auto` or `all`."""
    word = given.strip()
    if word.lower() in ("auto", "all"):
        return word.lower()
    try:
        plain = float(word)
    except ValueError:
        plain = -1.0
    if plain == 0:
        return 0
    if word.replace(".", "", 1).isdecimal():
        return int(plain * 10**9)
    try:
        return int(size(given, source))
    except UsageError:
        raise UsageError(
            f"{source}: {given!r} is no part of a GPU's memory; write a number of gigabytes, a size"
            " such as 512MB, auto or all"
        ) from None


def whole(minimum: int, maximum: int | None = None) -> Parse:
    """A whole number of at least `minimum`, and at most `maximum`."""

    def parse(given: str, source: str) -> int:
        try:
            value = int(given)
        except ValueError:
            raise UsageError(f"{source}: {given!r} is not a whole number") from None
        if value < minimum:
            raise UsageError(f"{source}: must be at least {minimum}, not {value}")
        if maximum is not None and value > maximum:
            raise UsageError(f"{source}: must be at most {maximum}, not {value}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Parse:
    """A number in [low, high], or in (low, high] when `above`."""

    def parse(given: str, source: str) -> float:
        try:
            value = float(given)
        except ValueError:
            raise UsageError(f"{source}: {given!r} is not a number") from None
        if not low <= value <= high or (above and value == low):
            if high == float("inf"):
                wanted = f"{'more than' if above else 'at least'} {low:g}"
            else:
                wanted = f"{'above' if above else 'from'} {low:g} to {high:g}"
            raise UsageError(f"{source}: must be {wanted}, not {given}")
        return value

    return parse


def dimension(given: str, source: str) -> tuple[str, int]:
    """An open size of a graph: `height=64`, or `64` with the name ""."""
    name, _, size = given.rpartition("=")
    return name, whole(1)(size, source)


def numbers(minimum: int) -> Parse:
    """Whole numbers of at least `minimum`, separated by commas."""
    one = whole(minimum)

    def parse(given: str, source: str) -> tuple[int, ...]:
        return tuple(one(part, source) for part in given.split(","))

    return parse


def choice(*names: str) -> Parse:
    """One of `names`."""

    def parse(given: str, source: str) -> str:
        if given not in names:
            raise UsageError(f"{source}: {given!r} is none of {', '.join(names)}")
        return given

    return parse
