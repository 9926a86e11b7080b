"""Sizes that are known only at run time: integer polynomials over named symbols.

A symbol stands for one dimension of one value, so it is never negative. Equal polynomials are
equal sizes; unequal ones may still be equal at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Monomial = tuple[str, ...]
"""The symbols of one product, sorted; the empty tuple is the constant term."""


@dataclass(frozen=True, slots=True)
class Poly:
    """A polynomial that is not a plain integer: sorted (product, coefficient) pairs."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Size) -> Size:
        return _collect((*self.terms, *_terms(other)))

    def __mul__(self, other: Size) -> Size:
        return _collect(
            (tuple(sorted(a + b)), m * n) for a, m in self.terms for b, n in _terms(other)
        )

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + other * -1

    def __rsub__(self, other: Size) -> Size:
        return self * -1 + other

    def __str__(self) -> str:
        return " + ".join("*".join((*names, str(n))) for names, n in self.terms)


Size = int | Poly
"""A dimension, or an element of a shape."""


def symbol(name: str) -> Poly:
    """The size called `name`."""
    return Poly((((name,), 1),))


def is_nonnegative(size: Size) -> bool:
    """Whether the size can be shown not to be negative."""
    return all(n >= 0 for _, n in _terms(size))


def divide(a: Size, b: Size) -> Size:
    """ONNX's integer division, truncating; an inexact quotient of symbols is a new symbol."""
    if isinstance(a, int) and isinstance(b, int):
        quotient = abs(a) // abs(b)
        return quotient if (a < 0) == (b < 0) else -quotient
    if a == b:
        return 1
    if isinstance(b, int) and all(n % b == 0 for _, n in _terms(a)):
        return _collect((names, n // b) for names, n in _terms(a))
    return symbol(f"({a})/({b})")


def quotient(sizes: Sequence[Size], divisors: Sequence[Size]) -> Size | None:
    """The product of `sizes` over the product of `divisors`, or None where it stays unknown."""
    remaining = list(sizes)
    product: Size = 1
    for divisor in divisors:
        if isinstance(divisor, Poly) and divisor in remaining:
            remaining.remove(divisor)
        else:
            product = product * divisor
    total: Size = 1
    for size in remaining:
        total = total * size
    if total == product:
        return 1
    if not isinstance(product, int) or product == 0:
        return None
    if any(n % product for _, n in _terms(total)):
        return None
    return divide(total, product)


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Poly) else (((), size),)


def _collect(terms: Iterable[tuple[Monomial, int]]) -> Size:
    total: dict[Monomial, int] = {}
    for names, n in terms:
        total[names] = total.get(names, 0) + n
    kept: Mapping[Monomial, int] = {names: n for names, n in total.items() if n}
    if not kept.keys() - {()}:
        return kept.get((), 0)
    return Poly(tuple(sorted(kept.items())))
