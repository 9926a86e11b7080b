"""Operators by name: declaring them, finding them, loading the files that hold them.

An operator is declared beside its kernels:

    @op("Softmax", since=13)
    def softmax(x, *, axis=-1):
        '''x: (..., C, ...) -> same shape, each slice along `axis` sums to one.'''

Positional parameters are the ONNX inputs in the standard's order (None when omitted), keyword-only
parameters are its attributes with the standard's defaults. This module imports nothing of the
package; every other room may import it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Operator:
    """One version of one operator on one device.

    `native` names the inputs that the function takes in the engine's own form (an encoded
    `Weight`, a `KVSlot`); all other inputs reach it as numpy arrays. `packs` names those of them
    that it may be given as panels (kernels/panels.py), `lookups` those of which it reads single
    rows. `attributes` are the keyword-only parameters; `wants_outputs` says that it takes
    `n_outputs`, the number of outputs the node names. `uses` names the kernels it may call, so
    that they are compiled before the first run; "{encoding}" stands for its weight's encoding.
    `lower` takes what the function takes and returns the kernel calls that compute it, into
    arrays of its own, or None when for these inputs there is more to it. `view` says that it reads
    no elements of its first input and returns looks at it, where NumPy has them; `working` takes
    the shapes of the inputs (None: not there) and says how many bytes it needs beside its results.
    """

    op_type: str
    domain: str
    since: int
    device: str
    function: Callable[..., Any]
    native: frozenset[int]
    packs: frozenset[int]
    lookups: frozenset[int]
    attributes: frozenset[str]
    wants_outputs: bool
    uses: tuple[str, ...]
    lower: Callable[..., Any] | None
    view: bool
    working: Callable[..., int] | None


_OPERATORS: dict[tuple[str, str, str], dict[int, Operator]] = {}
_KERNELS: dict[str, Any] = {}


def op(
    op_type: str,
    *,
    since: int = 1,
    domain: str = "",
    device: str = "cpu",
    native: tuple[str, ...] = (),
    packs: tuple[str, ...] = (),
    lookups: tuple[str, ...] = (),
    uses: tuple[str, ...] = (),
    lower: Callable[..., Any] | None = None,
    view: bool = False,
    working: Callable[..., int] | None = None,
) -> Callable[[F], F]:
    """Declare that the function implements `op_type` of `domain` from opset `since` on."""

    def declare(function: F) -> F:
        parameters = list(inspect.signature(function).parameters.values())
        keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        entry = Operator(
            op_type, domain, since, device, function,
            native=frozenset(positional.index(n) for n in native),
            packs=frozenset(positional.index(n) for n in packs),
            lookups=frozenset(positional.index(n) for n in lookups),
            attributes=frozenset(keywords - {"n_outputs"}),
            wants_outputs="n_outputs" in keywords,
            uses=uses,
            lower=lower,
            view=view,
            working=working,
        )  # fmt: skip
        register(entry)
        return function

    return declare


def register(operator: Operator) -> None:
    """Remember an operator."""
    where = operator.domain, operator.op_type, operator.device
    _OPERATORS.setdefault(where, {})[operator.since] = operator


def declared(op_type: str, domain: str = "", device: str = "cpu") -> Mapping[int, Operator]:
    """{since: Operator} of what files of kernels that are loaded have declared."""
    return _OPERATORS[domain, op_type, device]


def lookup(op_type: str, domain: str, version: int, device: str = "cpu") -> Operator | None:
    """The newest declared version not above `version`; on another device, else on the CPU."""
    load_kernels()
    for where in dict.fromkeys((device, "cpu")):
        versions = _OPERATORS.get((domain, op_type, where), {})
        usable = [since for since in versions if since <= version]
        if usable:
            return versions[max(usable)]
    return None


def internal(name: str) -> Callable[..., Any]:
    """What the kernels package offers the engine under a name of its own domain."""
    operator = lookup(name, "onnxstream_nb", 1)
    assert operator is not None, name
    return operator.function


def register_kernel(name: str, kernel: Any) -> None:
    """Remember a kernel under its name, which must be unique."""
    if name in _KERNELS:
        raise ValueError(f"two kernels are called {name}")
    _KERNELS[name] = kernel


def kernels() -> Mapping[str, Any]:
    """All declared kernels by name."""
    load_kernels()
    return _KERNELS


def operators() -> Mapping[tuple[str, str, str], Mapping[int, Operator]]:
    """All declared operators: (domain, op_type, device) -> {since: Operator}."""
    load_kernels()
    return _OPERATORS


@cache
def load_kernels() -> None:
    """Import every file of the kernels package once (and thereby numba)."""
    package = importlib.import_module("onnxstream_nb.kernels")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
