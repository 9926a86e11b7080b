"""Patterns over a graph: what makes a value, walked backwards from its last node.

    square = op("Pow", Var("x"), Num(2))

matches a value that is some value squared. The same `Var` name must be the same value wherever it
stands; Add, Mul and their like match in either order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

from onnxstream_nb.graph import Node
from onnxstream_nb.passes.rewriting import CLOSE, Rewriter

_COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Equal", "Max", "Min"})


@dataclass(frozen=True, slots=True)
class Var:
    """Any value."""

    name: str


@dataclass(frozen=True, slots=True)
class Num:
    """A constant with one element: close to `expected`, or whatever it is, kept as `name`."""

    expected: float | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Op:
    """A value made by a node of this type; `rest`: further inputs are allowed and not looked at."""

    op_type: str
    inputs: tuple[Pattern, ...]
    bind: str = ""
    rest: bool = False
    output: int = 0


@dataclass(frozen=True, slots=True)
class Either:
    """The first of these patterns that makes the whole match."""

    options: tuple[Pattern, ...]


Pattern = Var | Num | Op | Either


@dataclass(frozen=True, slots=True)
class Match:
    """What the names of a pattern stand for, and the nodes it went through."""

    values: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    bound: dict[str, Node] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()


def op(
    op_type: str, *inputs: Pattern, bind: str = "", rest: bool = False, output: int = 0
) -> Pattern:
    """The pattern of one node."""
    return Op(op_type, inputs, bind, rest, output)


def either(*options: Pattern) -> Pattern:
    """The pattern of several spellings."""
    return Either(options)


def maybe(op_type: str, inner: Pattern, bind: str = "") -> Pattern:
    """The inner pattern, with or without a node of one input around it."""
    return Either((Op(op_type, (inner,), bind), inner))


def product(a: Pattern, b: Pattern, c: Pattern) -> Pattern:
    """Three factors, multiplied in any order."""
    return either(
        op("Mul", op("Mul", a, b), c), op("Mul", op("Mul", a, c), b), op("Mul", a, op("Mul", b, c))
    )


def matches(rewriter: Rewriter, pattern: Pattern, root: Node) -> Iterator[Match]:
    """Every way in which the root's first output is the pattern, its interior used nowhere else."""
    for match in _search(rewriter, pattern, root.outputs[0], Match()):
        if rewriter.is_private(match.nodes, root):
            yield match


def _search(rewriter: Rewriter, pattern: Pattern, value: str, match: Match) -> Iterator[Match]:
    if isinstance(pattern, Either):
        for option in pattern.options:
            yield from _search(rewriter, option, value, match)
    elif isinstance(pattern, Op):
        yield from _search_op(rewriter, pattern, value, match)
    elif isinstance(pattern, Num):
        yield from _search_num(rewriter, pattern, value, match)
    elif match.values.get(pattern.name, value) == value:
        values = {**match.values, pattern.name: value}
        yield Match(values, match.numbers, match.bound, match.nodes)


def _search_num(rewriter: Rewriter, num: Num, value: str, match: Match) -> Iterator[Match]:
    number = rewriter.scalar(value)
    if number is None:
        return
    if num.expected is not None and abs(number - num.expected) > CLOSE * abs(num.expected):
        return
    numbers = {**match.numbers, num.name: number} if num.name else match.numbers
    yield Match(match.values, numbers, match.bound, match.nodes)


def _search_op(rewriter: Rewriter, wanted: Op, value: str, match: Match) -> Iterator[Match]:
    node = rewriter.made_by(value, wanted.op_type)
    if node is None or node.outputs[wanted.output : wanted.output + 1] != (value,):
        return
    if len(node.inputs) != len(wanted.inputs) and not wanted.rest:
        return
    bound = {**match.bound, wanted.bind: node} if wanted.bind else match.bound
    start = Match(match.values, match.numbers, bound, (*match.nodes, node))
    orders = permutations(node.inputs) if node.op_type in _COMMUTATIVE else [node.inputs]
    for inputs in dict.fromkeys(orders):
        yield from _search_all(rewriter, wanted.inputs, inputs, start)


def _search_all(
    rewriter: Rewriter, patterns: tuple[Pattern, ...], values: tuple[str, ...], match: Match
) -> Iterator[Match]:
    if not patterns:
        yield match
    elif values:
        for found in _search(rewriter, patterns[0], values[0], match):
            yield from _search_all(rewriter, patterns[1:], values[1:], found)
